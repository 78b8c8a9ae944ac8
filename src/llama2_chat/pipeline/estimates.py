"""Rough needs of a stage before it runs: memory, disk, time.

N parameters, times for each token: 6·N operations to train every weight, 4·N to train an adapter, 2·N to sample,
score or compare. Bytes: 16·N to train (float32 weights, gradients and two AdamW moments), 4·N to hold a model or
to train an adapter on it. Activations, caches and an adapter's own few weights come on top, answers that are yet
to be sampled count nothing, and time divides by what this machine's matrix product reaches now, which no
training does: all of them are lower bounds.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

_TRAINING_BYTES = 16
_WEIGHT_BYTES = 4
_TOKENS_PER_BYTE = 0.3
_ROWS_LOOKED_AT = 1000
_SIZE_IN_NAME = re.compile(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([mb])(?![a-z])", re.IGNORECASE)


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


def named_parameter_count(name: str) -> int | None:
    """Parameters as a model's name gives them: 7 billion for `Llama-2-7b-hf`; None where it gives none."""
    found = _SIZE_IN_NAME.search(Path(name).name)
    return None if found is None else round(float(found[1]) * (1e9 if found[2] in "bB" else 1e6))


def data_size(file: Path) -> tuple[float, float]:
    """Tokens, at about 0.3 a byte (JSON included), and rows of a JSONL file; from its head and its size."""
    packed = file.suffix == ".gz"
    with gzip.open(file) if packed else file.open("rb") as stream:
        head = [len(line) for line in islice(stream, _ROWS_LOOKED_AT)]
    if len(head) < _ROWS_LOOKED_AT:
        return sum(head) * _TOKENS_PER_BYTE, float(len(head))
    whole = file.stat().st_size * (4.0 if packed else 1.0)
    return whole * _TOKENS_PER_BYTE, whole / sum(head) * len(head)


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


def estimate_stage(
    config: Any, parameters: int | None, tokens: float | None, rows: float | None, flops: float
) -> Estimate:
    """Needs of one stage.

    Args:
        config: The stage's configuration.
        parameters: Of the base model.
        tokens: Of the stage's data, one pass; of its prompts where it samples answers.
        rows: Of the same data.
        flops: FLOP/s of the machine.
    """
    if parameters is None:
        return Estimate(None, None, None)
    if config.kind == "preferences":
        # One policy at a time is held, and every prompt gets two answers.
        if not tokens or not rows:
            return Estimate(_WEIGHT_BYTES * parameters, 0.0, None)
        drawn = min(1.0, (config.max_prompts or rows) / rows)
        return Estimate(_WEIGHT_BYTES * parameters, 0.0, 2 * 2.0 * tokens * drawn * parameters / flops)
    adapter = getattr(config.training, "lora", None) is not None
    trained = _WEIGHT_BYTES if adapter else _TRAINING_BYTES
    checkpoints = 0 if adapter else 2 * (_TRAINING_BYTES - _WEIGHT_BYTES)
    whole = not adapter or config.training.lora.save == "merged"
    disk = (whole * _WEIGHT_BYTES + checkpoints) * parameters
    memory: float = trained * parameters
    if config.kind == "ppo":
        memory = _ppo_models_bytes(config, adapter) * parameters
        disk += _WEIGHT_BYTES * parameters if config.keeps_best and not adapter else 0
    if not tokens or not rows:
        return Estimate(memory, disk, None)
    operations = _operations(config, tokens, rows, 4.0 if adapter else 6.0) * parameters
    return Estimate(memory, disk, operations / flops)


def _ppo_models_bytes(config: Any, adapter: bool) -> float:
    """Bytes for each parameter: what is trained, what stands by; what stands still counts once (`ppo/models.py`)."""
    judges = (_reward_models(config) + isinstance(config.independent, str)) * _WEIGHT_BYTES
    if not adapter:
        trunks = 1 if config.value_head == "shared" else 2
        return trunks * _TRAINING_BYTES + _WEIGHT_BYTES + judges
    other_reference = config.reference not in (None, config.policy)
    other_value = config.value not in (None, config.helpfulness, config.safety)
    # The policy, and with its adapter merged once more while it samples.
    return (2 + other_reference + other_value) * _WEIGHT_BYTES + judges


def _operations(config: Any, tokens: float, rows: float, training: float) -> float:
    """Operations for each parameter, with `training` of them for each trained token."""
    if config.kind == "ppo":
        responses: int = config.training.iterations * config.training.batch_size
        epochs: int = config.training.epochs_per_batch
        # Sampling, reference, values and reward models; then the policy and the value model learn.
        return (2.0 * (3 + _reward_models(config)) + 2 * training * epochs) * responses * tokens / rows
    trained: float = tokens * config.training.epochs
    if (steps := config.training.max_steps) is not None:
        trained = min(trained, steps * config.training.batch_size * config.training.sequence_length)
    if config.kind == "rejection_sampling":
        samples: int = config.samples_per_prompt
        return training * trained + 2.0 * (1 + _reward_models(config)) * tokens * samples
    if config.kind == "ghost_attention":
        return training * trained + 2.0 * tokens
    if config.kind == "context_distillation":
        # Sampled and scored with and without the preprompt; how many answers are kept is not known before.
        answers = 3 if config.compare_preprompts else 2
        return (training * trained if config.keep == "all" else 0.0) + answers * (2.0 + 2.0) * tokens
    return training * trained


def _reward_models(config: Any) -> int:
    """Those that are held beside the policy; a custom reward is none."""
    return sum(isinstance(source, str) for source in (config.helpfulness, config.safety))


def format_bytes(value: float | None) -> str:
    """`1.2 GiB`, or `unknown`."""
    if value is None:
        return "unknown"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
