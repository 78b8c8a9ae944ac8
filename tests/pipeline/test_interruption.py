"""Signals: the first sets a flag, the second stops at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from llama2_chat import interruption
from llama2_chat.interruption import Interrupted


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    interruption.reset()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_first_signal_is_a_request(
    number: signal.Signals, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    interruption.install_handlers()
    interruption.raise_if_requested()
    assert interruption.requested() is None
    os.kill(os.getpid(), number)
    assert interruption.requested() == number
    assert f"{number.name}: stopping after the next checkpoint" in capfd.readouterr().err
    with pytest.raises(Interrupted) as caught:
        interruption.raise_if_requested()
    assert (caught.value.signal_number, caught.value.exit_code) == (number, code)
    assert str(caught.value) == f"stopped by {number.name}"


def test_second_signal_stops_at_once() -> None:
    interruption.install_handlers()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted) as caught:
        os.kill(os.getpid(), signal.SIGINT)
    assert caught.value.exit_code == 130


def test_no_handler_of_errors_swallows_it() -> None:
    assert not issubclass(Interrupted, Exception)


def test_reset() -> None:
    interruption.install_handlers()
    os.kill(os.getpid(), signal.SIGINT)
    interruption.reset()
    interruption.raise_if_requested()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_other_threads_leave_the_handlers_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=interruption.install_handlers)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before
