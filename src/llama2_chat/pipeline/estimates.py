"""Rough needs of a stage before it runs: memory, disk, time.

Training: 16 bytes a parameter (float32 weights, gradients and two AdamW moments) and 6·N FLOPs a token;
sampling and scoring: 4 bytes a parameter and 2·N FLOPs a token. Time divides by what this machine's
matrix product reaches now; small models stay below that, so the figure is a lower bound.
"""

from __future__ import annotations

import json
import struct
import time
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

_TRAINING_BYTES = 16
_WEIGHT_BYTES = 4
_TOKENS_PER_BYTE = 0.3


@dataclass(frozen=True)
class Estimate:
    """Bytes, bytes and seconds; None where it cannot be told."""

    memory: float | None
    disk: float | None
    seconds: float | None


def parameter_count(folder: Path) -> int | None:
    """Parameters of a local model folder, from the heads of its safetensors files; None if there are none."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header: dict[str, Any] = json.loads(stream.read(length))
        total += sum(prod(t["shape"]) for name, t in header.items() if name != "__metadata__")
    return total or None


def data_tokens(file: Path) -> float:
    """Tokens of a text file, at about 0.3 a byte (JSON included)."""
    packed = 4.0 if file.suffix == ".gz" else 1.0
    return file.stat().st_size * packed * _TOKENS_PER_BYTE


def matmul_flops() -> float:
    """FLOP/s of this machine: the best of five float32 products of 1024 x 1024 matrices."""
    import torch

    a, b = torch.rand(1024, 1024), torch.rand(1024, 1024)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(a, b)
        best = max(best, 2 * 1024**3 / (time.perf_counter() - started))
    return best


def estimate_stage(config: Any, parameters: int | None, tokens: float | None, flops: float) -> Estimate:
    """Needs of one stage.

    Args:
        config: The stage's configuration.
        parameters: Of the base model.
        tokens: Of the stage's data, one pass; for rejection sampling of its prompts.
        flops: FLOP/s of the machine.
    """
    if parameters is None:
        return Estimate(None, None, None)
    checkpoints = 2 * (_TRAINING_BYTES - _WEIGHT_BYTES) * parameters
    disk = _WEIGHT_BYTES * parameters + checkpoints
    if tokens is None:
        return Estimate(_TRAINING_BYTES * parameters, disk, None)
    operations = 6.0 * parameters * tokens * config.training.epochs
    if config.kind == "rejection_sampling":
        # Two or three models pass over K answers of each prompt.
        operations += 2.0 * 3 * parameters * tokens * config.samples_per_prompt
    return Estimate(_TRAINING_BYTES * parameters, disk, operations / flops)


def format_bytes(value: float | None) -> str:
    """`1.2 GiB`, or `unknown`."""
    if value is None:
        return "unknown"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
