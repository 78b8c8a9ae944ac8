"""A reward model measured on held-out preference files."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from llama2_chat.dialogue import Domain
from llama2_chat.errors import UserInputError
from llama2_chat.jsonl import read_preferences
from llama2_chat.reward.data import encode_pairs
from llama2_chat.reward.metrics import reward_metrics
from llama2_chat.reward.scoring import RewardModel
from llama2_chat.testbed.annotator import attainable_accuracy


def held_out_metrics(
    scorer: RewardModel, files: Sequence[Path | str], *, domain: Domain | None = None
) -> dict[str, Any]:
    """Accuracy by rating and by safety labels, unsafe recall, gate, calibration, controls.

    On testbed pairs also the accuracy that the annotator's noise allows. The domain defaults to that of
    the first pair.

    Raises:
        UserInputError: no usable pair.
    """
    rows = chain.from_iterable(read_preferences(Path(file)) for file in files)
    pairs, tokens, report = encode_pairs(rows, scorer.chat_format, scorer.max_tokens)
    if not pairs:
        raise UserInputError(f"{', '.join(map(str, files))}: no usable pair; {report.to_row()}")
    chosen = scorer.score_tokens([ids for ids, _ in tokens]).tolist()
    rejected = scorer.score_tokens([ids for _, ids in tokens]).tolist()
    metrics = reward_metrics(pairs, chosen, rejected)
    if all(pair.source == "testbed" for pair in pairs):
        metrics["attainable_accuracy"] = attainable_accuracy(
            [pair.to_row() for pair in pairs], domain=domain or pairs[0].domain or "helpfulness"
        )
    return {"held_out_pairs": report.to_row(), **metrics}
