"""A reward model measured on held-out preference files."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from llama2_chat.dialogue import Domain
from llama2_chat.errors import UserInputError
from llama2_chat.reward.data import PairReport, read_pairs
from llama2_chat.reward.metrics import reward_metrics
from llama2_chat.reward.scoring import RewardModel
from llama2_chat.stage import StageDirectory
from llama2_chat.testbed.annotator import attainable_accuracy


def held_out_metrics(
    scorer: RewardModel,
    files: Sequence[Path | str],
    *,
    domain: Domain | None = None,
    directory: StageDirectory | None = None,
) -> dict[str, Any]:
    """Accuracy by rating and by safety labels, unsafe recall, gate, calibration, controls.

    On testbed pairs also the accuracy that the annotator's noise allows. The domain defaults to that of
    the first pair. Pairs that are shortened or dropped are said in `directory`, where there is one, and counted.

    Raises:
        UserInputError: no usable pair.
    """
    found = read_pairs(files, scorer.chat_format, scorer.max_tokens)
    if directory is not None:
        for file in found:
            file.announce(directory)
    pairs = list(chain.from_iterable(file.pairs for file in found))
    tokens = list(chain.from_iterable(file.tokens for file in found))
    report = sum((file.report for file in found), PairReport())
    if not pairs:
        raise UserInputError(f"{', '.join(map(str, files))}: no usable pair; {report.to_row()}")
    chosen = scorer.score_tokens([ids for ids, _ in tokens]).tolist()
    rejected = scorer.score_tokens([ids for _, ids in tokens]).tolist()
    metrics = reward_metrics(pairs, chosen, rejected)
    if all(pair.source == "testbed" for pair in pairs):
        metrics["attainable_accuracy"] = attainable_accuracy(
            [pair.to_row() for pair in pairs], domain=domain or pairs[0].domain or "helpfulness"
        )
    by_file = [file.to_row() for file in found]
    return {"held_out_pairs": report.to_row(), "held_out_pairs_by_file": by_file, **metrics}
