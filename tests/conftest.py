"""Fixtures that every test folder shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of public data sets and small models; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("LLAMA2_CHAT_DATA", REPOSITORY / ".." / "shared" / "data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}; set LLAMA2_CHAT_DATA to the folder of public data sets")
    return folder
