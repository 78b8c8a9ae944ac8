"""Progress as lines of text and as a bar; rates and times worked out by hand."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from collections.abc import Callable

import pytest

from llama2_chat.progress import PlainProgress, format_duration, format_rate, track


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain(total: float | None, done: float = 0) -> tuple[PlainProgress, Clock, Callable[[], list[str]]]:
    stream, clock = io.StringIO(), Clock()
    progress = PlainProgress("sft [INST]", total, "steps", done=done, stream=stream, clock=clock)
    return progress, clock, lambda: stream.getvalue().splitlines()


def test_a_line_every_ten_seconds() -> None:
    progress, clock, lines = plain(total=100)
    for _ in range(25):
        clock.now += 1
        progress.advance(2)
    assert lines() == [
        "sft [INST]: 20 of 100 steps (20%), 2.00 steps/s, 0:00:40 left",
        "sft [INST]: 40 of 100 steps (40%), 2.00 steps/s, 0:00:30 left",
    ]
    progress.finish()
    assert lines()[2:] == ["sft [INST]: 50 of 100 steps (50%), 2.00 steps/s, 0:00:25 taken"]


def test_what_an_earlier_run_did_does_not_count_for_the_rate() -> None:
    progress, clock, lines = plain(total=1000, done=900)
    clock.now += 20
    progress.advance(10)
    assert lines() == ["sft [INST]: 910 of 1,000 steps (91%), 0.50 steps/s, 0:03:00 left"]


def test_unknown_total_and_no_time() -> None:
    progress, clock, lines = plain(total=None)
    progress.finish()
    clock.now += 30
    progress.advance(1)
    assert lines() == [
        "sft [INST]: 0 steps, 0.00 steps/s, 0:00:00 taken",
        "sft [INST]: 1 steps, 2.00 steps/min",
    ]


def test_nothing_to_do() -> None:
    progress, _, lines = plain(total=0)
    progress.finish()
    assert lines() == ["sft [INST]: 0 of 0 steps, 0.00 steps/s, 0:00:00 taken"]


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (0.0, "0.00 rows/s"),
        (0.05, "3.00 rows/min"),
        (0.1, "0.10 rows/s"),
        (9.876, "9.88 rows/s"),
        (12.34, "12.3 rows/s"),
        (12345.6, "12,346 rows/s"),
    ],
)
def test_rates(rate: float, text: str) -> None:
    assert format_rate(rate, "rows") == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00:00"), (59.6, "0:01:00"), (125, "0:02:05"), (100 * 3600 + 61, "100:01:01"), (-3, "0:00:00")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_without_a_terminal_the_lines_go_to_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with track("work", 2, "rows") as progress:
            progress.advance()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("work: 1 of 2 rows (50%), ")


def test_a_bar_on_a_terminal() -> None:
    """In another process, whose standard error is a real (pseudo-)terminal."""
    code = (
        "from llama2_chat.progress import track\n"
        "with track('sft [INST] [/INST]', 4, 'steps', done=1) as p:\n"
        "    [p.advance() for _ in range(3)]\n"
        "with track('unknown', None, 'rows') as p:\n"
        "    p.advance(0.5)\n"
    )
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": "150", "TERM": "xterm"}
    child = subprocess.Popen(
        [sys.executable, "-c", code], stderr=theirs, stdout=subprocess.PIPE, env=environment
    )
    os.close(theirs)
    shown = b""
    try:
        while block := os.read(ours, 4096):
            shown += block
    except OSError:  # how Linux tells that the other side is closed
        pass
    assert child.wait(timeout=30) == 0
    os.close(ours)
    assert child.stdout is not None
    assert child.stdout.read() == b""
    text = shown.decode()
    assert "sft [INST] [/INST]" in text
    assert "4/4" in text
    assert "steps/s" in text
