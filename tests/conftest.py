"""Fixtures that every test folder shares."""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest

from llama2_chat import interruption

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of public data sets and small models; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("LLAMA2_CHAT_DATA", REPOSITORY / ".." / "shared" / "data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}; set LLAMA2_CHAT_DATA to the folder of public data sets")
    return folder


@pytest.fixture
def interrupted_after(monkeypatch: pytest.MonkeyPatch):
    """A context in which training is stopped by SIGTERM after so many steps; that it stopped is asserted."""

    @contextmanager
    def make(stop_after: int):
        asked = 0

        def requested() -> int | None:
            nonlocal asked
            asked += 1
            return signal.SIGTERM if asked >= stop_after else None

        def raise_if_requested() -> None:
            if asked >= stop_after:
                raise interruption.Interrupted(signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(interruption, "requested", requested)
            patch.setattr(interruption, "raise_if_requested", raise_if_requested)
            with pytest.raises(interruption.Interrupted):
                yield

    return make
