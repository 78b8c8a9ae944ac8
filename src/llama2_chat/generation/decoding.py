"""The decoding loop: rows of a batch with their key/value cache, extended by given or by drawn tokens.

B rows, V vocabulary, C columns of the cache. A row's tokens stand in the columns where its mask is 1, in
order; the other columns hold padding. Positions count a row's own tokens, so padding changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from llama2_chat.generation.engine import Response
from llama2_chat.generation.sampling import draw
from llama2_chat.settings import SamplingConfig

_COMPACT_BELOW = 0.75  # Copying the cache pays once a quarter of its rows are dead.


@dataclass
class CachedBatch:
    """What the next token of each row is drawn from, and what it will be computed with."""

    logits: Tensor
    """(B, V), after each row's last token, float32."""
    cache: Cache
    mask: Tensor
    """(B, C), int64."""
    positions: Tensor
    """(B, 1), of each row's next token."""

    def repeat(self, times: int) -> None:
        """Every row `times` times, side by side."""
        if times > 1:
            self.cache.batch_repeat_interleave(times)
            self.logits = self.logits.repeat_interleave(times, 0)
            self.mask = self.mask.repeat_interleave(times, 0)
            self.positions = self.positions.repeat_interleave(times, 0)

    def select(self, rows: Tensor) -> None:
        """Keep these rows only; the logits, which have been drawn from, are left as they are."""
        self.cache.batch_select_indices(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]


LeaveFunction = Callable[[CachedBatch, int, int], None]
"""Called with the batch, a row of it, and the number of the response that the row held, before the row goes.

The row's first tokens in the cache are its prompt and its response without the last token, which was never
fed; others may follow."""


def feed(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    *,
    padding_id: int,
    cache: Cache,
    mask_BC: Tensor | None = None,
) -> CachedBatch:
    """Append tokens to every row, at least one each.

    Args:
        cache: What earlier tokens left, grown in place; an empty one at first.
        mask_BC: int64, the cache's columns that hold a row's tokens; not needed for an empty cache.
    """
    longest = max(len(row) for row in rows)
    device = model.device
    ids = torch.full((len(rows), longest), padding_id, device=device)
    mask = torch.zeros((len(rows), longest), dtype=torch.long, device=device)
    for place, row in enumerate(rows):
        ids[place, longest - len(row) :] = torch.tensor(row, device=device)
        mask[place, longest - len(row) :] = 1
    if mask_BC is not None:
        mask = torch.cat([mask_BC, mask], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -longest:]
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return CachedBatch(output.logits[:, -1].float(), cache, mask, positions[:, -1:] + 1)


def decode(
    model: PreTrainedModel,
    batch: CachedBatch,
    uniforms_BT: Tensor,
    sampling: SamplingConfig,
    *,
    stop_id: int,
    on_leave: LeaveFunction | None = None,
) -> list[Response]:
    """Draw tokens until every row has stopped or is at its length limit; rows that have stopped may leave.

    Args:
        batch: Used up.
        uniforms_BT: The random numbers of each row, one a step.
    """
    rows = len(batch.logits)
    uniforms_BT = uniforms_BT.to(model.device)
    tokens: list[list[int]] = [[] for _ in range(rows)]
    logprobs: list[list[float]] = [[] for _ in range(rows)]
    owner = torch.arange(rows, device=model.device)  # which response a batch row belongs to
    alive = torch.ones(rows, dtype=torch.bool, device=model.device)

    def leave(places: Tensor) -> None:
        if on_leave is not None:
            for row in places.tolist():
                on_leave(batch, row, int(owner[row]))

    for step in range(sampling.max_new_tokens):
        drawn = draw(
            batch.logits,
            uniforms_BT[owner, step, None],
            temperature=sampling.temperature,
            top_p=sampling.top_p,
        )
        chosen, chosen_logprobs = (part.squeeze(1) for part in drawn)
        for row, living, token, logprob in zip(
            owner.tolist(), alive.tolist(), chosen.tolist(), chosen_logprobs.tolist(), strict=True
        ):
            if living:
                tokens[row].append(token)
                logprobs[row].append(logprob)
        alive &= chosen != stop_id
        if step + 1 == sampling.max_new_tokens or not bool(alive.any()):
            break
        if alive.float().mean() < _COMPACT_BELOW:
            leave((~alive).nonzero().squeeze(1))
            kept = alive.nonzero().squeeze(1)
            batch.select(kept)
            owner, alive, chosen = owner[kept], alive[kept], chosen[kept]
        _feed_drawn(model, batch, chosen)
    leave(torch.arange(len(owner)))
    return [
        Response(ids, values, "stop" if ids and ids[-1] == stop_id else "length")
        for ids, values in zip(tokens, logprobs, strict=True)
    ]


def _feed_drawn(model: PreTrainedModel, batch: CachedBatch, chosen_B: Tensor) -> None:
    """One token for every row."""
    mask = batch.mask
    batch.mask = torch.cat([mask, mask.new_ones((len(mask), 1))], dim=1)
    output = model(
        input_ids=chosen_B[:, None],
        attention_mask=batch.mask,
        position_ids=batch.positions,
        past_key_values=batch.cache,
        use_cache=True,
    )
    batch.logits = output.logits[:, -1].float()
    batch.positions = batch.positions + 1
