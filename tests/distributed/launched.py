"""What one of several launched processes does: run `llama2-chat sft`, and write down what it saw.

torchrun … launched.py CONFIG OUTPUT RECORD [KEY=VALUE …] [--stop-at STEP]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor

from llama2_chat import distributed, interruption
from llama2_chat.cli.main import run_command
from llama2_chat.sft.trainer import PackedSftTrainer

_WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "shutil.copyfile"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("output", type=Path)
    parser.add_argument("record", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--stop-at", type=int)
    options = parser.parse_args()
    output = str(options.output.resolve())
    written: set[str] = set()

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        """Python's own report of every file that is opened, made, moved or removed."""
        opened = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if (opened or event in _WRITES) and str(arguments[0]).startswith(output):
            written.add(os.path.relpath(str(arguments[0]), output))

    sys.addaudithook(watch)
    sharded: set[bool] = set()
    compute_loss = PackedSftTrainer.compute_loss

    def observed(self: PackedSftTrainer, model: Any, *args: Any, **kwargs: Any) -> Any:
        sharded.add(all(isinstance(parameter, DTensor) for parameter in model.parameters()))
        return compute_loss(self, model, *args, **kwargs)

    PackedSftTrainer.compute_loss = observed
    command = ["sft", options.config, *options.overrides, "--output-dir", output]
    codes = []
    if options.stop_at is not None:
        codes.append(_stopped(command, options.stop_at))
    codes.append(run_command(command))
    record = {"codes": codes, "sharded": sorted(sharded), "written": sorted(written)}
    options.record.with_suffix(f".{distributed.process_number()}").write_text(json.dumps(record))


def _stopped(command: list[str], step: int) -> int:
    """Run the command; the last process alone is told to stop after so many steps."""
    asked = iter(range(1, 1000))
    last = distributed.process_number() == distributed.process_count() - 1
    requested = interruption.requested
    interruption.requested = lambda: signal.SIGTERM if last and next(asked) >= step else None
    code = run_command(command)
    interruption.requested = requested
    return code


if __name__ == "__main__":
    main()
