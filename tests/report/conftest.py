"""A finished run and its report; the fixtures of tests/pipeline, for runs through the command line."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from page_reader import Page
from small_run import MakeRun, build_run

from llama2_chat.report.page import write_report

_FILE = Path(__file__).resolve().parent.parent / "pipeline" / "conftest.py"
_SPEC = importlib.util.spec_from_file_location("pipeline_fixtures", _FILE)
assert _SPEC is not None
assert _SPEC.loader is not None
pipeline_fixtures = importlib.util.module_from_spec(_SPEC)
sys.modules["pipeline_fixtures"] = pipeline_fixtures
_SPEC.loader.exec_module(pipeline_fixtures)

cli = pipeline_fixtures.cli
workspace = pipeline_fixtures.workspace
_fake_kinds = pipeline_fixtures._fake_kinds


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A function that writes a finished run into a folder of that name."""
    return lambda name="run", seed=0: build_run(tmp_path / name, seed)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The report of a finished run that no test changes."""
    run = build_run(tmp_path_factory.mktemp("whole") / "run")
    return Page(write_report(run))
