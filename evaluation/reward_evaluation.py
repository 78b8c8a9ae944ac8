"""One or several reward models on the same held-out pairs: their figures side by side, as JSON values."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from llama2_chat.dialogue import Preference
from llama2_chat.errors import UserInputError
from llama2_chat.reward.calibration import score_histograms
from llama2_chat.reward.data import EncodedPairs, read_pairs
from llama2_chat.reward.held_out import file_names, measure, pair_lengths, restricted_to, score_pairs
from llama2_chat.reward.metrics import accuracy_points, paired_difference
from llama2_chat.reward.scoring import RewardModel
from llama2_chat.stage import EventLog, StageDirectory


def evaluate_reward_models(
    models: Mapping[str, RewardModel],
    files: Sequence[Path],
    *,
    length_rule_from: Sequence[Path] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """Measure every model on the pairs that all of them can take.

    What is shortened, dropped or left out is said on standard error.

    Args:
        models: By the name that tables show; the first is the one the others are compared with.
        length_rule_from: Training pairs that the best length rule is chosen on, in each model's own tokens.
        seed: Orients the pairs for calibration.

    Returns:
        `model`, `seed`, the first model's figures (`held_out.measure`), `compared`: for each other model its
        figures and `accuracy_difference` (its accuracy minus the first's, on the same pairs); `left_out`: pairs
        that not every model can take; `score_histogram`.

    Raises:
        UserInputError: a file without a usable pair, or no pair that all models can take.
    """
    found = {name: _usable(name, model, files) for name, model in models.items()}
    training = {name: _usable(name, model, length_rule_from) for name, model in models.items()}
    left_out = 0
    if len(models) > 1:
        found, left_out = _common(found)
    first = next(iter(models))
    overlap = _overlap(training[first], found[first])
    if overlap:
        print(
            f"{_listed(length_rule_from)}: {overlap:,} of the evaluated pairs are in it, so the length rule "
            "has seen them; give pairs that are not evaluated",
            file=sys.stderr,
        )
    scored = {name: score_pairs(model, found[name]) for name, model in models.items()}
    figures = {
        name: measure(
            scored[name],
            found[name],
            training=pair_lengths(model, training[name]) if length_rule_from else None,
            seed=seed,
        )
        for name, model in models.items()
    }
    points = {name: accuracy_points(pairs.chosen, pairs.rejected) for name, pairs in scored.items()}
    for name in list(models)[1:]:
        figures[name]["accuracy_difference"] = paired_difference(points[name], points[first])
    for one in figures.values() if length_rule_from else ():
        one["length_rule"] |= {
            "from": file_names(training[first]),
            "train_pairs_also_evaluated": overlap,
        }
    return {
        "model": first,
        "seed": seed,
        "left_out": left_out,
        **figures.pop(first),
        "compared": figures,
        "score_histogram": score_histograms(
            {name: {"chosen": rows.chosen, "rejected": rows.rejected} for name, rows in scored.items()}
        ),
    }


def model_names(folders: Sequence[Path]) -> list[str]:
    """Short names that tell model folders apart: the part of the path in which they differ.

    `run-a/stages/02-rm/model` alone is `02-rm`; beside `run-b/stages/02-rm/model` it is `run-a`.
    """
    paths = [folder.absolute() for folder in folders]
    parts = [list(path.parent.parts if path.name == "model" else path.parts) for path in paths]
    if len(parts) == 1:
        return [parts[0][-1]]
    while all(len(path) > 1 for path in parts) and len({path[0] for path in parts}) == 1:
        parts = [path[1:] for path in parts]
    while all(len(path) > 1 for path in parts) and len({path[-1] for path in parts}) == 1:
        parts = [path[:-1] for path in parts]
    names = ["/".join(path) for path in parts]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


class _Unrecorded(EventLog):
    """An evaluation belongs to no run, so nothing keeps its events; what it has to say goes to the terminal."""

    def write(self, event: str, **fields: Any) -> None:
        """Nothing."""


def _usable(name: str, model: RewardModel, files: Sequence[Path]) -> list[EncodedPairs]:
    """Each file's usable pairs for one model; says what is not used, and refuses a file of which nothing is left."""
    found = read_pairs(files, model.chat_format, model.max_tokens)
    place = StageDirectory(Path(name.replace("/", ":")), _Unrecorded(Path(os.devnull)))
    for file in found:
        if not file.pairs:
            reasons = "; ".join(
                f"{count:,} {reason}" for reason, count in sorted(file.report.dropped.items())
            )
            raise UserInputError(f"{file.file}: no usable pair for {name}; dropped: {reasons}")
        file.announce(place)
    return found


def _common(found: Mapping[str, list[EncodedPairs]]) -> tuple[dict[str, list[EncodedPairs]], int]:
    """The files with the pairs that every model can take, and how many pairs are left out.

    Rows that are equal share their fate, so a set of pairs says it all.
    """
    kept = set.intersection(*({pair for file in files for pair in file.pairs} for files in found.values()))
    common = {name: [restricted_to(file, kept) for file in files] for name, files in found.items()}
    every = {pair for files in found.values() for file in files for pair in file.pairs}
    if not kept:
        raise UserInputError(f"no pair that all of {', '.join(found)} can take; evaluate them one by one")
    left_out = len(every - kept)
    if left_out:
        print(
            f"{left_out:,} pairs left out of the comparison: not every model can take them", file=sys.stderr
        )
    return common, left_out


def _overlap(training: Sequence[EncodedPairs], evaluated: Sequence[EncodedPairs]) -> int:
    def identity(pair: Preference) -> tuple[Any, ...]:
        return pair.prompt, frozenset((pair.chosen, pair.rejected))

    seen = {identity(pair) for file in training for pair in file.pairs}
    return sum(identity(pair) in seen for pair in chain.from_iterable(file.pairs for file in evaluated))


def _listed(files: Sequence[Path]) -> str:
    return ", ".join(file.name for file in files)
