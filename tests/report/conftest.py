"""A finished run and its report; the fixtures of tests/pipeline, for runs through the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_runs import _fake_kinds, cli, workspace  # noqa: F401
from page_reader import Page
from small_run import MakeRun, build_run

from llama2_chat.report.page import write_report


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A function that writes a finished run into a folder of that name."""
    return lambda name="run", seed=0: build_run(tmp_path / name, seed)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The report of a finished run that no test changes."""
    run = build_run(tmp_path_factory.mktemp("whole") / "run")
    return Page(write_report(run))
