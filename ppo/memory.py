"""What PPO's models take of the device's memory, counted before training: a plan, not a measurement.

Activations of the passes come on top; they follow `training.micro_batch_size`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

_MIB = 2**20
_ADAM_STATES = 2
"""First and second moment, each of a weight's own type and size."""


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """One of PPO's models: how many weights it has, and how many of those lie in an earlier model's memory.

    `trained` counts those that get gradients, `held` those that it holds itself; bytes are of one weight.
    """

    name: str
    parameters: int
    trained: int
    held: int
    held_trained: int
    weight_bytes: int
    dtype: str
    shares_with: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CacheShape:
    """The key/value cache of sampling: `tokens` of all rows together, bytes of one number."""

    tokens: int
    layers: int
    key_value_heads: int
    head_size: int
    number_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """A line of the plan; memory in MiB."""

    name: str
    parameters: int
    trained: int
    dtype: str
    weights_mib: float
    gradients_mib: float
    optimiser_mib: float
    shares_with: tuple[str, ...]

    @property
    def total_mib(self) -> float:
        """Weights, gradients and optimiser state."""
        return self.weights_mib + self.gradients_mib + self.optimiser_mib


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """All models, the adapter's product while it samples, the cache; memory in MiB."""

    rows: tuple[MemoryRow, ...]
    merged_mib: float
    cache_mib: float
    cache_tokens: int

    @property
    def total_mib(self) -> float:
        """Everything together; cache and merged weights are there during sampling alone."""
        return sum(row.total_mib for row in self.rows) + self.merged_mib + self.cache_mib

    def to_event(self) -> dict[str, Any]:
        """JSON values."""
        rows = [
            {
                "model": row.name,
                "parameters": row.parameters,
                "trained": row.trained,
                "dtype": row.dtype,
                "weights_mib": round(row.weights_mib, 1),
                "gradients_mib": round(row.gradients_mib, 1),
                "optimiser_mib": round(row.optimiser_mib, 1),
                "shares_with": list(row.shares_with),
            }
            for row in self.rows
        ]
        return {
            "models": rows,
            "merged_adapter_mib": round(self.merged_mib, 1),
            "cache_mib": round(self.cache_mib, 1),
            "cache_tokens": self.cache_tokens,
            "total_mib": round(self.total_mib, 1),
        }

    def to_lines(self) -> list[str]:
        """A table for a terminal."""
        head = f"{'model':<16}{'parameters':>14}{'trained':>14}  {'type':<9}{'weights':>9}{'gradients':>11}{'AdamW':>9}"
        lines = ["memory that the models take, in MiB; activations come on top", head]
        for row in self.rows:
            shared = f"  shared with {', '.join(row.shares_with)}" if row.shares_with else ""
            trained = f"{row.trained:,}" if row.trained else "frozen"
            lines.append(
                f"{row.name:<16}{row.parameters:>14,}{trained:>14}  {row.dtype:<9}{row.weights_mib:>9.1f}"
                f"{row.gradients_mib:>11.1f}{row.optimiser_mib:>9.1f}{shared}"
            )
        if self.merged_mib:
            lines.append(f"{'merged adapter, while sampling':<53}{self.merged_mib:>9.1f}")
        cache = f"cache of {self.cache_tokens:,} tokens, while sampling"
        return [*lines, f"{cache:<53}{self.cache_mib:>9.1f}", f"{'sum':<53}{self.total_mib:>9.1f}"]


def memory_plan(
    models: Sequence[ModelWeights], cache: CacheShape, *, merged_weights: int = 0, merged_bytes: int = 4
) -> MemoryPlan:
    """What the models take: weights once, gradients and two AdamW moments of what is trained, the cache.

    Args:
        models: In the order in which they were counted; each counts what it holds itself.
        merged_weights: Weights of the layers with an adapter, of which sampling makes a second copy.
        merged_bytes: Of one of them.
    """
    rows = tuple(
        MemoryRow(
            name=model.name,
            parameters=model.parameters,
            trained=model.trained,
            dtype=model.dtype,
            weights_mib=model.held * model.weight_bytes / _MIB,
            gradients_mib=model.held_trained * model.weight_bytes / _MIB,
            optimiser_mib=_ADAM_STATES * model.held_trained * model.weight_bytes / _MIB,
            shares_with=model.shares_with,
        )
        for model in models
    )
    numbers = 2 * cache.tokens * cache.layers * cache.key_value_heads * cache.head_size  # keys and values
    return MemoryPlan(
        rows,
        merged_mib=merged_weights * merged_bytes / _MIB,
        cache_mib=numbers * cache.number_bytes / _MIB,
        cache_tokens=cache.tokens,
    )


def count_weights(models: Mapping[str, Sequence[nn.Parameter]]) -> list[ModelWeights]:
    """Each model's weights, in order; those in memory that an earlier model holds are that one's."""
    holders: dict[int, str] = {}
    counted = []
    for name, parameters in models.items():
        held = held_trained = 0
        shared: dict[str, None] = {}
        for parameter in parameters:
            place = parameter.untyped_storage().data_ptr()
            if place in holders:
                shared[holders[place]] = None
                continue
            holders[place] = name
            held += parameter.numel()
            held_trained += parameter.numel() if parameter.requires_grad else 0
        counted.append(
            ModelWeights(
                name=name,
                parameters=sum(p.numel() for p in parameters),
                trained=sum(p.numel() for p in parameters if p.requires_grad),
                held=held,
                held_trained=held_trained,
                weight_bytes=parameters[0].element_size(),
                dtype=str(parameters[0].dtype).removeprefix("torch."),
                shares_with=tuple(other for other in shared if other != name),
            )
        )
    return counted
