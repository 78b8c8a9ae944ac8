"""What the best of n samples is worth, and the middle one: estimates from K scored samples a prompt (Fig. 7, Fig. 8).

P prompts, K samples per prompt, N sample counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import comb
from typing import Any

import torch
from torch import Tensor

RESAMPLES = 1000
"""Bootstrap resamples of an interval."""


def order_statistic_weights(samples: int, *, size: int, rank: int) -> Tensor:
    """Probability that the i-th smallest of K values is the `rank`-th smallest of a random subset.

    `C(i-1, rank-1) · C(K-i, size-rank) / C(K, size)` for i = 1 … K; the subset is drawn without replacement.

    Args:
        samples: K.
        size: Number of values in the subset, 1 to K.
        rank: 1 (the smallest) to `size` (the largest).

    Returns:
        float64 (K,), for values in ascending order; their sum is 1.

    Raises:
        ValueError: `size` or `rank` is out of range.
    """
    if not 1 <= size <= samples:
        raise ValueError(f"size is {size}; a subset of {samples} values has 1 to {samples}")
    if not 1 <= rank <= size:
        raise ValueError(f"rank is {rank}; a subset of {size} values has ranks 1 to {size}")
    # Whole numbers until the division: they pass the range of floats long before K does.
    subsets = comb(samples, size)
    weights = [comb(i, rank - 1) * comb(samples - 1 - i, size - rank) / subsets for i in range(samples)]
    return torch.tensor(weights, dtype=torch.float64)


def expected_maximum(scores_PK: Tensor, *, size: int) -> Tensor:
    """Mean over all subsets of `size` samples of the highest score in them, for each prompt.

    The unbiased estimate of what the best of `size` draws scores: `Σ_i C(i-1, n-1) / C(K, n) · x_(i)`.

    Args:
        scores_PK: Any float dtype, finite.
        size: n, 1 to K.

    Returns:
        float64 (P,).

    Raises:
        ValueError: `size` is out of range or `scores_PK` has not two dimensions.
    """
    return _weighted(scores_PK, order_statistic_weights(_samples(scores_PK), size=size, rank=size))


def expected_median(scores_PK: Tensor, *, size: int) -> Tensor:
    """Mean over all subsets of `size` samples of the median score in them, for each prompt.

    The median of an even number of values is the mean of the lower and the upper one. Arguments, result and errors as
    of `expected_maximum`.
    """
    samples = _samples(scores_PK)
    lower = order_statistic_weights(samples, size=size, rank=(size + 1) // 2)
    upper = order_statistic_weights(samples, size=size, rank=size // 2 + 1)
    return _weighted(scores_PK, (lower + upper) / 2)


def true_score_of_best(rewards_PK: Tensor, truths_PK: Tensor, *, size: int) -> Tensor:
    """Mean over all subsets of `size` samples of the true score of the one that is rewarded most.

    Where rewards tie, the true scores of the tied samples count by their mean.

    Args:
        rewards_PK: What the samples are chosen by.
        truths_PK: What they are worth.
        size: n, 1 to K.

    Returns:
        float64 (P,).

    Raises:
        ValueError: `size` is out of range or the shapes are not the same (P, K).
    """
    if rewards_PK.shape != truths_PK.shape:
        raise ValueError(
            f"rewards {tuple(rewards_PK.shape)} and truths {tuple(truths_PK.shape)} differ in shape"
        )
    weights = order_statistic_weights(_samples(rewards_PK), size=size, rank=size)
    result = torch.empty(len(rewards_PK), dtype=torch.float64)
    for p in range(len(rewards_PK)):
        _, group = torch.unique(
            rewards_PK[p], return_inverse=True
        )  # ascending: group g is the g-th lowest reward
        count = torch.bincount(group).double()
        share = torch.zeros_like(count).index_add_(0, group.sort().values, weights)
        truth = torch.zeros_like(count).index_add_(0, group, truths_PK[p].double()) / count
        result[p] = (share * truth).sum()
    return result


def bootstrap_interval(
    values_PN: Tensor, *, seed: int, resamples: int = RESAMPLES, level: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Percentile interval of the columns' means, prompts resampled with replacement.

    All columns share the resampled prompts.

    Args:
        values_PN: float (P, N).
        seed: The interval is a function of it and the values.
        resamples: Number of bootstrap resamples.
        level: Coverage, in (0, 1).

    Returns:
        Lower and upper ends, float64 (N,) each.
    """
    values = values_PN.double()
    prompts = values.shape[0]
    generator = torch.Generator().manual_seed(seed)
    means = torch.empty(resamples, values.shape[1], dtype=torch.float64)
    for row in means:
        drawn = torch.randint(prompts, (prompts,), generator=generator)
        row.copy_(torch.bincount(drawn, minlength=prompts).double() @ values / prompts)
    tail = (1 - level) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
    return low, high


def sample_counts(samples: int) -> list[int]:
    """The N at which curves are drawn: the powers of two below K, and K."""
    return [*(2**power for power in range(samples.bit_length()) if 2**power < samples), samples]


def best_of_curves(
    scores_PK: Tensor, *, sizes: Sequence[int], seed: int
) -> dict[str, list[Mapping[str, Any]]]:
    """Expected maximum and median over n samples, mean over prompts, with 95 % bootstrap intervals.

    Args:
        scores_PK: At least one prompt.
        sizes: The n.
        seed: Of the bootstrap.

    Returns:
        `{"maximum": rows, "median": rows}`, each row `{"n", "mean", "low", "high"}`.

    Source: §3.2.3, Figure 7.
    """
    curves: dict[str, list[Mapping[str, Any]]] = {}
    for name, estimate in (("maximum", expected_maximum), ("median", expected_median)):
        values_PN = torch.stack([estimate(scores_PK, size=size) for size in sizes], dim=1)
        low, high = bootstrap_interval(values_PN, seed=seed)
        columns = (values_PN.mean(0).tolist(), low.tolist(), high.tolist())
        curves[name] = [
            {"n": n, "mean": mean, "low": start, "high": end}
            for n, mean, start, end in zip(sizes, *columns, strict=True)
        ]
    return curves


def _samples(scores_PK: Tensor) -> int:
    if scores_PK.dim() != 2:
        raise ValueError(f"scores have shape {tuple(scores_PK.shape)}; (prompts, samples) is wanted")
    return scores_PK.shape[1]


def _weighted(scores_PK: Tensor, weights_K: Tensor) -> Tensor:
    return scores_PK.double().sort(dim=1).values @ weights_K
