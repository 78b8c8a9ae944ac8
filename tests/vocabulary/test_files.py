"""What is written as JSON is JSON, which has no infinity and no NaN."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from llama2_chat.evaluation.statistics import mean_interval
from llama2_chat.files import read_json, write_json


def _refuse(constant: str) -> None:
    pytest.fail(f"{constant} is no JSON")


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    """The interval of one observation has no ends."""
    value = {
        "one": mean_interval([0.5]),
        "more": [1.0, (math.nan, -math.inf)],
        "text": "Infinity",
        "none": None,
    }
    write_json(tmp_path / "value.json", value)
    found = json.loads((tmp_path / "value.json").read_text(), parse_constant=_refuse)
    assert found == {
        "one": {"mean": 0.5, "count": 1, "low": None, "high": None},
        "more": [1.0, [None, None]],
        "text": "Infinity",
        "none": None,
    }


def test_other_values_are_written_as_they_are(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, True, "é"], "b": {"c": None}}
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json") == value
    assert (tmp_path / "value.json").read_text(encoding="utf-8") == (
        json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    )
