"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder with real data: `LLAMA2_CHAT_DATA`, by default `../shared/data` beside the repository."""
    named = os.environ.get("LLAMA2_CHAT_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        if named:
            pytest.fail(f"LLAMA2_CHAT_DATA names {folder}, which is not a folder")
        pytest.skip(f"no real data at {folder}; set LLAMA2_CHAT_DATA to the folder that holds it")
    return folder
