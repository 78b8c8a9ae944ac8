"""Progress of long work: a bar with rate and time left on a terminal, plain lines every ten seconds elsewhere.

Everything goes to standard error, so that what a command prints on standard output can be piped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

from llama2_chat.distributed import is_main_process

SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
    """What `track` yields: tell it how much more has been done."""

    def advance(self, amount: float = 1) -> None:
        """Add `amount` units to what is done."""
        ...


@contextmanager
def track(description: str, total: float | None, unit: str, *, done: float = 0) -> Iterator[Progress]:
    """Show the progress of a piece of work for as long as the block runs; of several processes the first does.

    Args:
        description: what is being done, for example `sft: training`.
        total: how many units there are; None if that is unknown.
        unit: plural name of what is counted, for example `steps`.
        done: units that an earlier, interrupted run did; they do not count for the rate.
    """
    if not is_main_process():
        yield _Bar(lambda amount: None)
    elif sys.stderr.isatty():
        with _bar(description, total, unit, done) as bar:
            yield bar
    else:
        lines = PlainProgress(description, total, unit, done=done)
        try:
            yield lines
        finally:
            lines.finish()


class PlainProgress:
    """Progress as lines of text, for logs: one about every ten seconds and one at the end."""

    def __init__(
        self,
        description: str,
        total: float | None,
        unit: str,
        *,
        done: float = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._done = self._done_before = done
        self._stream, self._clock = stream, clock
        self._started = self._last_line = clock()

    def advance(self, amount: float = 1) -> None:
        """Add `amount` units to what is done; prints a line if the last one is old enough."""
        self._done += amount
        now = self._clock()
        if now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._print(now, final=False)

    def finish(self) -> None:
        """Print the last line."""
        self._print(self._clock(), final=True)

    def _print(self, now: float, *, final: bool) -> None:
        elapsed = now - self._started
        rate = (self._done - self._done_before) / elapsed if elapsed > 0 else 0.0
        text = f"{self._description}: {self._done:,.0f}"
        if self._total is not None:
            share = f" ({self._done / self._total:.0%})" if self._total > 0 else ""
            text += f" of {self._total:,.0f} {self._unit}{share}"
        else:
            text += f" {self._unit}"
        text += f", {format_rate(rate, self._unit)}"
        if final:
            text += f", {format_duration(elapsed)} taken"
        elif self._total is not None and rate > 0:
            text += f", {format_duration((self._total - self._done) / rate)} left"
        print(text, file=self._stream or sys.stderr, flush=True)


def format_rate(per_second: float, unit: str) -> str:
    """`12.3 steps/s`; slow work is given per minute."""
    if 0 < per_second < 0.1:
        return f"{per_second * 60:.2f} {unit}/min"
    return f"{per_second:,.{0 if per_second >= 100 else 1 if per_second >= 10 else 2}f} {unit}/s"


def format_duration(seconds: float) -> str:
    """`0:02:05`, rounded to whole seconds; never negative."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


class _Bar:
    """A task of a rich progress display."""

    def __init__(self, advance: Callable[[float], None]) -> None:
        self._advance = advance

    def advance(self, amount: float = 1) -> None:
        self._advance(amount)


@contextmanager
def _bar(description: str, total: float | None, unit: str, done: float) -> Iterator[Progress]:
    # rich.progress takes a tenth of a second to import, which `--help` should not pay for.
    from rich import progress as rich_progress
    from rich.console import Console
    from rich.text import Text

    class RateColumn(rich_progress.ProgressColumn):
        """Units per second since the display began."""

        def render(self, task: rich_progress.Task) -> Text:
            elapsed = task.elapsed or 0.0
            rate = (task.completed - done) / elapsed if elapsed > 0 else 0.0
            return Text(format_rate(rate, unit))

    display = rich_progress.Progress(
        # Without markup: a description may well hold "[INST]".
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        RateColumn(),
        rich_progress.TimeRemainingColumn(),
        console=Console(file=sys.stderr),
    )
    with display:
        task = display.add_task(description, total=total, completed=int(done))
        yield _Bar(lambda amount: display.advance(task, amount))
