"""Examples that a stage could not use as they are: said on the terminal and kept as an event, never passed over."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from llama2_chat.distributed import is_main_process
from llama2_chat.stage import StageDirectory


def announce_reductions(
    directory: StageDirectory, file: str, *, rows: int, what: str, reasons: Mapping[str, int]
) -> None:
    """One line on standard error and one `data_reduced` event; nothing where every count is 0, and of several
    processes by the first alone.

    Args:
        file: What the rows come from; it is named without its folder.
        rows: How many rows of `file` were looked at.
        what: What the rows are, in the plural, for example `dialogues`.
        reasons: What was done to rows and why, and to how many.
    """
    found = {reason: count for reason, count in reasons.items() if count}
    if not found or not is_main_process():
        return
    name = Path(file).name
    listed = "; ".join(f"{count:,} {reason}" for reason, count in found.items())
    print(
        f"{directory.path.name}: {name}: of {rows:,} {what} {listed}",
        file=sys.stderr,
        flush=True,
    )
    directory.events.write("data_reduced", file=name, rows=rows, what=what, reasons=found)
