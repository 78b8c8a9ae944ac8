"""How much of each source is seen: sampling proportions of tokens, as the papers state them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from llama2_chat.pretrain.token_store import Integers, Source
from llama2_chat.settings import TrainingConfig


def planned_tokens(available: int, training: TrainingConfig) -> int:
    """Tokens of a run: `epochs` times all there are, at most what `max_steps` full batches hold."""
    planned = round(training.epochs * available)
    if training.max_steps is not None:
        planned = min(planned, training.max_steps * training.batch_size * training.sequence_length)
    return max(planned, 1)


def draw_rounds(
    lengths: Sequence[Integers], proportions: Sequence[float], tokens: int, seed: int
) -> list[Integers]:
    """Which documents a run sees, in rounds in each of which a document occurs at most once.

    A source gets its proportion of `tokens`: whole passes over its documents, and for the rest documents drawn
    without replacement until there are enough; that is too many by less than a document.

    Args:
        lengths: For each source the lengths of its documents.
        proportions: For each source its share of the tokens, relative to the sum of all.

    Returns:
        For each round the numbers of its documents, counted through all sources, in ascending order.
    """
    whole = math.fsum(proportions)
    times = np.concatenate(
        [
            _occurrences(
                source,
                # However few tokens there are, a source with a proportion above 0 gives a document.
                max(round(tokens * (share / whole)), int(share > 0)),
                np.random.default_rng((seed, number)),
            )
            for number, (source, share) in enumerate(zip(lengths, proportions, strict=True))
        ]
    )
    return [np.flatnonzero(times > number) for number in range(int(times.max()))]


def _occurrences(lengths: Integers, tokens: int, rng: np.random.Generator) -> Integers:
    """How often each document of one source occurs, so that they are at least `tokens` tokens in all."""
    passes, rest = divmod(tokens, int(lengths.sum()))
    times = np.full(len(lengths), passes, dtype=np.int64)
    if rest:
        order = rng.permutation(len(lengths))
        enough = int(np.searchsorted(np.cumsum(lengths[order]), rest)) + 1
        times[order[:enough]] += 1
    return times


def passes_over_rows(rows: int, steps: int, batch_size: int) -> float:
    """How often a row was seen on average; the last batch of an epoch may be short."""
    epochs, steps_left = divmod(steps, math.ceil(rows / batch_size))
    return epochs + min(steps_left * batch_size, rows) / rows


def source_records(sources: Sequence[Source], drawn: Sequence[int], passes: float) -> list[dict[str, Any]]:
    """A table like the paper's, one row for each source: what it holds, the share it had, the epochs seen.

    Where the run ended within a pass (`passes` is no whole number), `tokens_seen` is what random rows hold on
    average.

    Args:
        drawn: Tokens of each source in one pass over the rows.
        passes: How often a row was seen.
    """
    total = sum(drawn)
    return [
        {
            "file": source.file,
            "documents": source.documents,
            "empty": source.empty,
            "tokens": source.tokens,
            "tokens_seen": round(tokens * passes),
            "share": tokens / total,
            "epochs": tokens * passes / source.tokens,
        }
        for source, tokens in zip(sources, drawn, strict=True)
    ]
