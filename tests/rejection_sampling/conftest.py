"""A folder in which the stage runs with a policy and reward models that are functions of the text."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_stage import World


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)
