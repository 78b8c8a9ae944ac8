"""The reward model's losses. B pairs, N labelled responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

_RATINGS = ("significantly_better", "better", "slightly_better", "negligibly_better")
MARGIN_TABLES: dict[str, dict[str, float]] = {
    "none": dict.fromkeys(_RATINGS, 0.0),
    "small": dict(zip(_RATINGS, (1.0, 2 / 3, 1 / 3, 0.0), strict=True)),
    "large": dict(zip(_RATINGS, (3.0, 2.0, 1.0, 0.0), strict=True)),
}
"""Table 27: the margin m(r) for each degree of preference."""


def rating_margins(ratings: Sequence[str | None], *, table: str | Mapping[str, float]) -> Tensor:
    """The margin of each pair.

    Args:
        ratings: One of the four ratings, or None (margin 0), for each pair.
        table: "none", "small", "large", or a margin for each rating.

    Returns:
        float32 (B,).

    Raises:
        ValueError: a table or rating is unknown.

    Source: §3.2.2, Table 27.
    """
    if isinstance(table, str):
        if table not in MARGIN_TABLES:
            raise ValueError(f'margin table "{table}" unknown; one of {", ".join(MARGIN_TABLES)}')
        table = MARGIN_TABLES[table]
    for rating in ratings:
        if rating is not None and rating not in table:
            raise ValueError(f'rating "{rating}" has no margin; the table has {", ".join(table)}')
    return torch.tensor([0.0 if rating is None else table[rating] for rating in ratings])


def preference_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, *, margins: Tensor | None = None
) -> Tensor:
    """Binary ranking loss with margin.

    Formula: mean of -log(sigmoid(chosen - rejected - margin)).

    Args:
        chosen_scores: (B,) scores of the preferred responses.
        rejected_scores: (B,) scores of the others.
        margins: (B,) or None for 0.

    Returns:
        A scalar tensor.

    Raises:
        ValueError: shapes differ (they would broadcast to a wrong loss without a word).

    Source: §3.2.2, equations 1 and 2.
    """
    if chosen_scores.shape != rejected_scores.shape:
        raise ValueError(
            f"chosen {tuple(chosen_scores.shape)} and rejected {tuple(rejected_scores.shape)} differ in shape"
        )
    difference = chosen_scores - rejected_scores
    if margins is not None:
        if margins.shape != chosen_scores.shape:
            raise ValueError(
                f"margins {tuple(margins.shape)} and scores {tuple(chosen_scores.shape)} differ in shape"
            )
        difference = difference - margins.to(difference)
    return -functional.logsigmoid(difference).mean()


def centering_loss(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """Penalty on scores whose level drifts: only their difference enters the ranking loss.

    Formula: mean of (chosen + rejected)².

    Args:
        chosen_scores: (B,) scores of the preferred responses.
        rejected_scores: (B,) scores of the others.

    Returns:
        A scalar tensor.

    Raises:
        ValueError: shapes differ.

    Source: Eisenstein et al. 2023, arXiv 2312.09244; not in the Llama 2 paper.
    """
    if chosen_scores.shape != rejected_scores.shape:
        raise ValueError(
            f"chosen {tuple(chosen_scores.shape)} and rejected {tuple(rejected_scores.shape)} differ in shape"
        )
    return (chosen_scores + rejected_scores).square().mean()


def safety_loss(scores: Tensor, safe: Tensor) -> Tensor:
    """Auxiliary safety classification: binary cross-entropy of sigmoid(score) against "is safe".

    Args:
        scores: (N,) scores of the responses that have a safety label.
        safe: (N,) bool or 0/1; True where the response is safe.

    Returns:
        A scalar tensor; 0 with a gradient path where there is no row.

    Raises:
        ValueError: shapes differ.

    Source: §3.2.2 and A.3.3 name the loss without its formula.
    Deviates: docs/deviations.md, "Safety auxiliary loss".
    """
    if scores.shape != safe.shape:
        raise ValueError(f"scores {tuple(scores.shape)} and labels {tuple(safe.shape)} differ in shape")
    if scores.numel() == 0:
        return scores.sum()
    return functional.binary_cross_entropy_with_logits(scores, safe.to(scores))
