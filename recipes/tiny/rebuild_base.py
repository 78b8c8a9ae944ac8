"""Rebuild the embedded base model: run `pretrain.yaml`, put the result into `base/` beside this file.

make pretrain-tiny
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from llama2_chat.cli.main import run_command

HERE = Path(__file__).resolve().parent


def rebuild(run: Path) -> int:
    """Run the recipe into `run` and copy its model and training log; returns the exit code."""
    code = run_command(["run", str(HERE / "pretrain.yaml"), "--output-dir", str(run)])
    if code == 0:
        stage = run / "stages" / "01-tiny-base"
        shutil.copytree(stage / "model", HERE / "base", dirs_exist_ok=True)
        shutil.copyfile(stage / "metrics.jsonl", HERE / "base" / "training_log.jsonl")
    return code


if __name__ == "__main__":
    sys.exit(rebuild(Path("runs") / "tiny-pretrain"))
