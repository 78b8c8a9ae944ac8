"""Writing what was sampled, chunk by chunk, so that a kill in the middle loses at most one chunk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

from llama2_chat import interruption
from llama2_chat.dialogue import Row
from llama2_chat.files import remove
from llama2_chat.progress import track

ITEMS_PER_CHUNK = 128
"""Sampling resumes at multiples of this many items: what a kill can lose."""

_Item = TypeVar("_Item")


def write_samples(
    file: Path,
    items: Sequence[_Item],
    sample: Callable[[Sequence[_Item]], Sequence[Row]],
    *,
    rows_per_item: int = 1,
    description: str,
    unit: str,
) -> None:
    """Write `file`: the rows that `sample` gives for each chunk of `items`, in order.

    A killed call leaves `<file>.partial`; the next one continues after its last whole chunk and ends
    with the same bytes, since a chunk is always the same batch of work.
    """
    if file.exists():
        return
    partial = file.with_name(file.name + ".partial")
    done = keep_whole_chunks(partial, ITEMS_PER_CHUNK * rows_per_item) // rows_per_item
    with track(description, total=len(items), unit=unit, done=done) as progress:
        for start in range(done, len(items), ITEMS_PER_CHUNK):
            interruption.raise_if_requested()
            chunk = items[start : start + ITEMS_PER_CHUNK]
            rows = sample(chunk)
            with partial.open("a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                stream.flush()
                os.fsync(stream.fileno())
            progress.advance(len(chunk))
    partial.replace(file)


def keep_whole_chunks(partial: Path, chunk_rows: int) -> int:
    """Cut a partial file after its last whole chunk; returns the rows that stay."""
    if not partial.exists():
        return 0
    with partial.open("rb") as stream:
        whole_lines = sum(1 for line in stream if line.endswith(b"\n"))
    rows = whole_lines - whole_lines % chunk_rows
    if rows == 0:
        remove(partial)
        return 0
    with partial.open("rb+") as stream:
        kept = sum(len(line) for line in islice(stream, rows))
        stream.truncate(kept)
    return rows
