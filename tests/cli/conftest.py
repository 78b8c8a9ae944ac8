"""The fixtures of tests/pipeline, for tests of the command line."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_FILE = Path(__file__).resolve().parent.parent / "pipeline" / "conftest.py"
_SPEC = importlib.util.spec_from_file_location("pipeline_fixtures", _FILE)
assert _SPEC is not None
assert _SPEC.loader is not None
pipeline_fixtures = importlib.util.module_from_spec(_SPEC)
sys.modules["pipeline_fixtures"] = pipeline_fixtures
_SPEC.loader.exec_module(pipeline_fixtures)

_fake_kinds = pipeline_fixtures._fake_kinds
workspace = pipeline_fixtures.workspace
change = pipeline_fixtures.change
cli = pipeline_fixtures.cli
other_process = pipeline_fixtures.other_process
