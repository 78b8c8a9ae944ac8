"""A key/value cache with room for the tokens to come.

The dynamic cache of transformers copies everything that it holds whenever a token is appended. Here the tensors
have free columns at their end, so that appending writes the new tokens alone. The columns are no more than
a batch's token budget counts anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


def growing_cache(config: PreTrainedConfig, room: int) -> Cache:
    """An empty cache; its tensors get `room` columns beyond what they are made for."""
    return Cache(layers=[GrowingLayer(room) for _ in range(config.num_hidden_layers)])


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """`keys` and `values` are the filled columns, (rows, heads, columns, width), of tensors that have more."""

    def __init__(self, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.room = room
        self.filled = 0
        self.all_keys = self.all_values = torch.empty(0)

    def hold(self, keys: Tensor, values: Tensor, filled: int) -> None:
        """Take over tensors of which the first `filled` columns count."""
        self.lazy_initialization(keys, values)
        self._show(keys, values, filled)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append (rows, heads, tokens, width) and return all that is held."""
        if not self.is_initialized:
            self.hold(key_states[:, :, :0], value_states[:, :, :0], 0)
        start, end = self.filled, self.filled + key_states.shape[-2]
        if end > self.all_keys.shape[-2]:
            self.all_keys = _enlarged(self.all_keys, start, end + self.room)
            self.all_values = _enlarged(self.all_values, start, end + self.room)
        self.all_keys[:, :, start:end] = key_states
        self.all_values[:, :, start:end] = value_states
        return self._show(self.all_keys, self.all_values, end)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, side by side."""
        self._map_rows(lambda whole: whole.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only."""
        self._map_rows(lambda whole: whole[indices])

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self._show(change(self.all_keys), change(self.all_values), self.filled)

    def _show(self, keys: Tensor, values: Tensor, filled: int) -> tuple[Tensor, Tensor]:
        self.all_keys, self.all_values, self.filled = keys, values, filled
        shown = keys[:, :, :filled], values[:, :, :filled]
        self.keys, self.values = shown
        return shown


def _enlarged(held: Tensor, filled: int, columns: int) -> Tensor:
    """The filled columns in a tensor that has so many."""
    rows, heads, _, width = held.shape
    larger = torch.empty((rows, heads, columns, width), dtype=held.dtype, device=held.device)
    larger[:, :, :filled] = held[:, :, :filled]
    return larger
