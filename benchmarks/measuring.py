"""What benchmarks have in common: sides that take turns in processes of their own, medians, the machine's peak."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from smollm2_shape import smollm2_shape

Measurement = dict[str, float]


def in_turn(
    script: str, sides: Sequence[str], rounds: int, arguments: Sequence[str]
) -> dict[str, Measurement]:
    """Medians over the rounds of what `script --measure SIDE ARGUMENTS` prints last, as JSON, the sides in turn."""
    runs: dict[str, list[Measurement]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, found in runs.items():
            ended = subprocess.run(
                [sys.executable, script, "--measure", side, *arguments], capture_output=True, text=True
            )
            if ended.returncode:
                sys.exit("\n".join(ended.stderr.strip().splitlines()[-20:]))
            found.append(json.loads(ended.stdout.splitlines()[-1]))
    return {
        side: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for side, found in runs.items()
    }


def matmul_peak() -> float:
    """Operations a second of the best of five float32 products of 2048 x 2048."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - started)
    return 2 * 2048**3 / best


def peak_memory() -> int:
    """The most memory, in bytes, that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def layer_weights(layers: int) -> int:
    """Weights of the layers that every token is multiplied with; without embeddings and head."""
    shape = smollm2_shape(layers)
    hidden = shape.hidden_size
    key_value_width = shape.num_key_value_heads * hidden // shape.num_attention_heads
    return layers * (2 * hidden * (hidden + key_value_width) + 3 * hidden * shape.intermediate_size)


def as_json(measured: dict[str, Any]) -> None:
    """What a measuring process prints last."""
    print(json.dumps(measured))
