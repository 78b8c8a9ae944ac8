"""Ctrl-C and SIGTERM: work goes on to the next safe point, saves a checkpoint and stops.

The first signal only sets a flag. A loop that can be resumed asks `requested()` after each step and, once
its checkpoint is written, calls `raise_if_requested()`. A second signal stops at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from llama2_chat.distributed import any_process, is_main_process, process_count

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STDERR = 2
_requested: int | None = None
_deferred = False


class Interrupted(BaseException):
    """A signal asked for the end. Not an `Exception`, so that no handler of errors swallows it."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number

    @property
    def exit_code(self) -> int:
        """The shell's convention: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signal_number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signal_number).name}"


def install_handlers() -> None:
    """Let SIGINT and SIGTERM ask for an orderly end; does nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in _SIGNALS:
        signal.signal(number, _handle)


def requested() -> int | None:
    """Number of the signal that asked for the end, or None."""
    return _requested


def raise_if_requested() -> None:
    """Raise `Interrupted` if a signal has asked for the end. Call it where nothing would be lost."""
    if _requested is not None and not _deferred:
        raise Interrupted(_requested)


def raise_together() -> None:
    """`raise_if_requested` in all processes as soon as one of them is asked to end; all must call it."""
    if process_count() == 1:
        raise_if_requested()
    elif not _deferred and any_process(_requested is not None):
        raise Interrupted(_requested or signal.SIGTERM)


@contextmanager
def deferred() -> Iterator[None]:
    """Within the block nothing is raised: the work before it is kept only by the checkpoint after it."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False


def reset() -> None:
    """Forget an earlier request and restore Python's own handlers."""
    global _requested
    _requested = None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _handle(number: int, frame: FrameType | None) -> None:
    global _requested
    if _requested is not None:
        raise Interrupted(number)
    _requested = number
    if not is_main_process():
        return
    name = signal.Signals(number).name
    # Not print(): the signal may have arrived while a buffered stream was being written.
    message = f"\n{name}: stopping after the next checkpoint; send it again to stop at once\n"
    try:
        os.write(_STDERR, message.encode())
    except OSError:
        return
