"""Rough needs of a stage before it runs: memory, disk, time.

Training: 16 bytes a parameter (float32 weights, gradients and two AdamW moments; activations come on top)
and 6·N FLOPs a token; sampling and scoring: 4 bytes a parameter and 2·N FLOPs a token. Time divides by what
this machine's matrix product reaches now, which no training does, so memory and time are lower bounds.
"""

from __future__ import annotations

import json
import shutil
import struct
import time
from collections.abc import Callable
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


def matmul_flops(device: str) -> float:
    """FLOP/s of this machine: the best of five float32 products of 1024 x 1024 matrices (4096 on a GPU).

    Args:
        device: As in a recipe; `auto` is the GPU where NVIDIA's driver is installed.
    """
    if device.startswith("cuda") or (device == "auto" and shutil.which("nvidia-smi")):
        return _best_rate(*_torch_product(4096))
    return _best_rate(*_numpy_product(1024))


def _best_rate(product: Callable[[], object], operations: float) -> float:
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        product()
        best = max(best, operations / (time.perf_counter() - started))
    return best


def _numpy_product(size: int) -> tuple[Callable[[], object], float]:
    # torch would be imported for seconds, to multiply for milliseconds.
    import numpy

    a = numpy.random.default_rng(0).random((size, size), dtype=numpy.float32)
    return (lambda: a @ a), 2.0 * size**3


def _torch_product(size: int) -> tuple[Callable[[], object], float]:
    import torch

    a = torch.rand(size, size, device="cuda" if torch.cuda.is_available() else "cpu")
    return (lambda: (a @ a)[0, 0].item()), 2.0 * size**3


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
    trained = tokens * config.training.epochs
    if (steps := getattr(config.training, "max_steps", None)) is not None:
        trained = min(trained, steps * config.training.batch_size * config.training.sequence_length)
    operations = 6.0 * parameters * trained
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
