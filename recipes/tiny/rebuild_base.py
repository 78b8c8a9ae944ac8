"""Rebuild the embedded base model: run `pretrain.yaml`, put the result into `base/` beside this file.

make pretrain-tiny
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from llama2_chat.cli.main import run_command
from llama2_chat.jsonl import read_rows, write_rows

HERE = Path(__file__).resolve().parent
STEPS_A_LINE = 50


def rebuild(run: Path) -> int:
    """Run the recipe into `run` and copy its model and training log; returns the exit code."""
    code = run_command(["run", str(HERE / "pretrain.yaml"), "--output-dir", str(run)])
    if code == 0:
        stage = run / "stages" / "01-tiny-base"
        shutil.copytree(stage / "model", HERE / "base", dirs_exist_ok=True)
        write_rows(HERE / "base" / "training_log.jsonl", thinned(stage / "metrics.jsonl"))
    return code


def thinned(log: Path) -> Iterator[dict[str, float]]:
    """Means over every `STEPS_A_LINE` steps: what a curve needs, a fiftieth of the size."""
    rows = [row for _, row in read_rows(log)]
    for start in range(0, len(rows), STEPS_A_LINE):
        part = rows[start : start + STEPS_A_LINE]
        means = {name: sum(row[name] for row in part) / len(part) for name in ("loss", "learning_rate")}
        yield {"step": part[-1]["step"], **means}


if __name__ == "__main__":
    sys.exit(rebuild(Path("runs") / "tiny-pretrain"))
