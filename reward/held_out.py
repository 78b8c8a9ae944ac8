"""A reward model measured on held-out preference files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from llama2_chat.dialogue import Domain, Message, Preference
from llama2_chat.errors import UserInputError
from llama2_chat.progress import track
from llama2_chat.reward.calibration import preference_calibration, safety_calibration, score_spread
from llama2_chat.reward.data import EncodedPairs, PairReport, read_pairs
from llama2_chat.reward.length_bias import Lengths, Unit, length_bias, length_rule_metrics, matched_length
from llama2_chat.reward.metrics import (
    GATE_THRESHOLD,
    accuracy_by,
    accuracy_points,
    accuracy_row,
    accuracy_table,
    unsafe_detection,
)
from llama2_chat.reward.scoring import RewardModel
from llama2_chat.stage import StageDirectory
from llama2_chat.testbed.annotator import attainable_accuracy
from llama2_chat.tokenization import tokenize_dialogue

NO_SOURCE = "not named"
_ROWS_AT_ONCE = 2048


@dataclass(frozen=True, slots=True)
class ScoredPairs:
    """Held-out pairs with both responses' raw scores and lengths; lists of the same order."""

    pairs: list[Preference]
    chosen: list[float]
    rejected: list[float]
    lengths: dict[Unit, Lengths]


def held_out_metrics(
    scorer: RewardModel,
    files: Sequence[Path | str],
    *,
    domain: Domain | None = None,
    directory: StageDirectory | None = None,
    training: Sequence[EncodedPairs] = (),
) -> dict[str, Any]:
    """All of a reward stage's held-out metrics in `summary.json`'s form.

    Pairs that are shortened or dropped are said in `directory`, where there is one, and counted. `training`
    are the pairs that the best length rule is chosen on. For the rest see `measure`.

    Raises:
        UserInputError: no usable pair.
    """
    found = read_pairs(files, scorer.chat_format, scorer.max_tokens)
    if directory is not None:
        for file in found:
            file.announce(directory)
    return measure(
        score_pairs(scorer, found),
        found,
        domain=domain,
        training=pair_lengths(scorer, training) if training else None,
    )


def score_pairs(scorer: RewardModel, files: Sequence[EncodedPairs]) -> ScoredPairs:
    """Score both responses of every pair, with progress; raises UserInputError where there is no pair."""
    pairs = list(chain.from_iterable(file.pairs for file in files))
    if not pairs:
        report = sum((file.report for file in files), PairReport())
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in sorted(report.dropped.items()))
        names = ", ".join(file.file for file in files)
        raise UserInputError(f"{names}: no usable pair; dropped: {reasons or 'none, there is no row'}")
    tokens = list(chain.from_iterable(file.tokens for file in files))
    sides = [tuple(ids) for ids, _ in tokens] + [tuple(ids) for _, ids in tokens]
    # Equal dialogues are scored once: it saves time where responses are ranked, and makes them a tie, which
    # rounding at two places of a batch would break.
    rows = sorted(set(sides))  # in this order neighbours begin alike, and what they share is computed once
    scores: dict[tuple[int, ...], float] = {}
    with track(f"{scorer.name}: scoring", total=len(rows), unit="dialogues") as progress:
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            some = rows[start : start + _ROWS_AT_ONCE]
            scores |= zip(some, scorer.score_tokens(some).tolist(), strict=True)
            progress.advance(len(some))
    values = [scores[row] for row in sides]
    return ScoredPairs(pairs, values[: len(pairs)], values[len(pairs) :], pair_lengths(scorer, files))


def pair_lengths(scorer: RewardModel, files: Sequence[EncodedPairs]) -> dict[Unit, Lengths]:
    """Lengths of (chosen, rejected) responses, in this model's tokens and in characters."""

    def tokens(question: Message, answer: str) -> int:
        # The last turn alone: a response's own tokens do not depend on what stands before its question.
        dialogue = (question, Message("assistant", answer))
        return sum(tokenize_dialogue(dialogue, scorer.chat_format, "last_answer").loss_mask)

    pairs = list(chain.from_iterable(file.pairs for file in files))
    return {
        "tokens": [(tokens(p.prompt[-1], p.chosen), tokens(p.prompt[-1], p.rejected)) for p in pairs],
        "characters": [(len(p.chosen), len(p.rejected)) for p in pairs],
    }


def measure(
    scored: ScoredPairs,
    files: Sequence[EncodedPairs],
    *,
    domain: Domain | None = None,
    training: dict[Unit, Lengths] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything that is reported of one model on these pairs, as JSON values.

    Accuracy (overall, by rating, by safety labels, and so for each source and file), detection of unsafe
    responses, calibration, spread of the scores, length bias, controls. On testbed pairs also the accuracy
    that the annotator's noise allows; its domain defaults to each pair's own.

    Args:
        files: Where the pairs come from, in their order.
        training: Lengths of training pairs, to choose the best length rule on.
        seed: Orients the pairs for calibration.
    """
    pairs, chosen, rejected = scored.pairs, scored.chosen, scored.rejected
    labelled = [
        (score, safe)
        for pair, c, r in zip(pairs, chosen, rejected, strict=True)
        for score, safe in ((c, pair.chosen_safe), (r, pair.rejected_safe))
        if safe is not None
    ]
    scores, safe = [score for score, _ in labelled], [ok for _, ok in labelled]
    points = accuracy_points(chosen, rejected)
    at_half = unsafe_detection(scores, safe, 0.5)
    calibration = preference_calibration(chosen, rejected, seed=seed)
    places = [name for name, file in zip(file_names(files), files, strict=True) for _ in file.pairs]
    metrics: dict[str, Any] = {
        "held_out_pairs": sum((file.report for file in files), PairReport()).to_row(),
        "held_out_pairs_by_file": [file.to_row() for file in files],
        "distinct_prompts": len({pair.prompt for pair in pairs}),
        "accuracy": accuracy_table(pairs, chosen, rejected),
        "by_source": accuracy_by([pair.source or NO_SOURCE for pair in pairs], pairs, chosen, rejected),
        "by_file": accuracy_by(places, pairs, chosen, rejected),
        "unsafe_recall": at_half["recall"],
        "unsafe_at_half": at_half,
        "gate": unsafe_detection(scores, safe, GATE_THRESHOLD),
        "calibration_error": calibration["error"],
        "calibration": {"preference": calibration, "safety": safety_calibration(scores, safe)},
        "score_spread": score_spread(chosen, rejected),
        "length": {unit: length_bias(rows, chosen, rejected) for unit, rows in scored.lengths.items()},
        "matched_length": {unit: matched_length(rows, points) for unit, rows in scored.lengths.items()},
        "controls": {
            "constant_scorer": accuracy_row([0.5] * len(pairs)),
            "length_scorer": accuracy_row(
                accuracy_points([len(p.chosen) for p in pairs], [len(p.rejected) for p in pairs])
            ),
        },
    }
    if training is not None:
        metrics["length_rule"] = length_rule_metrics(training, scored.lengths, points)
    if all(pair.source == "testbed" for pair in pairs):
        metrics["attainable_accuracy"] = attainable_accuracy([pair.to_row() for pair in pairs], domain=domain)
    return metrics


def file_names(files: Sequence[EncodedPairs]) -> list[str]:
    """The files' names without their folders; those that occur twice with as much of the path as tells them apart."""
    paths = [Path(file.file).parts for file in files]
    depth = 1
    while len({path[-depth:] for path in paths}) < len(set(paths)):
        depth += 1
    return ["/".join(path[-depth:]) for path in paths]


def restricted_to(file: EncodedPairs, kept: set[Preference]) -> EncodedPairs:
    """The file with those pairs alone; its report still counts what was read."""
    rows = [(pair, ids) for pair, ids in zip(file.pairs, file.tokens, strict=True) if pair in kept]
    return replace(file, pairs=[pair for pair, _ in rows], tokens=[ids for _, ids in rows])
