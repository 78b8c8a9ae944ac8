"""Estimates of the plan, worked out by hand."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest

from llama2_chat.pipeline.estimates import data_tokens, estimate_stage, format_bytes, parameter_count


def test_training_counts_six_operations_a_parameter_and_token() -> None:
    config = SimpleNamespace(kind="sft", training=SimpleNamespace(epochs=2.0))
    need = estimate_stage(config, parameters=1_000, tokens=500.0, flops=1e6)
    assert need.seconds == pytest.approx(6 * 1_000 * 500 * 2 / 1e6, rel=1e-12)
    assert need.memory == 16 * 1_000
    assert need.disk == 4 * 1_000 + 2 * 12 * 1_000  # the model and two checkpoints' moments and weights


def test_rejection_sampling_adds_k_answers_of_three_models() -> None:
    config = SimpleNamespace(
        kind="rejection_sampling", training=SimpleNamespace(epochs=1.0), samples_per_prompt=8
    )
    need = estimate_stage(config, parameters=10, tokens=100.0, flops=1.0)
    assert need.seconds == pytest.approx(6 * 10 * 100 + 3 * 2 * 10 * 100 * 8, rel=1e-12)


def test_unknown_stays_unknown() -> None:
    config = SimpleNamespace(kind="sft", training=SimpleNamespace(epochs=1.0))
    need = estimate_stage(config, parameters=None, tokens=5.0, flops=1.0)
    assert (need.memory, need.disk, need.seconds) == (None, None, None)
    assert estimate_stage(config, parameters=5, tokens=None, flops=1.0).seconds is None


def test_parameters_are_read_from_the_heads_of_the_files(tmp_path: Path) -> None:
    assert parameter_count(tmp_path) is None
    for name, shape in (("a", [3, 5]), ("b", [7])):
        header = json.dumps(
            {"__metadata__": {}, name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
        ).encode()
        (tmp_path / f"{name}.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert parameter_count(tmp_path) == 22


def test_tokens_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"x" * 100)
    (tmp_path / "a.jsonl.gz").write_bytes(b"x" * 100)
    assert data_tokens(tmp_path / "a.jsonl") == pytest.approx(30.0, rel=1e-12)
    assert data_tokens(tmp_path / "a.jsonl.gz") == pytest.approx(120.0, rel=1e-12)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "unknown"), (12, "12 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB"), (2**41, "2.0 TiB")],
)
def test_sizes_as_text(value: float | None, text: str) -> None:
    assert format_bytes(value) == text
