"""What one of several launched processes does: run a stage's command, and write down what it saw.

torchrun … launched.py RECORD [--stop-at STEP] -- COMMAND …
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.distributed.tensor import DTensor

from llama2_chat import distributed, interruption
from llama2_chat.cli.main import run_command
from llama2_chat.sft.trainer import PackedSftTrainer, Watch

_WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "shutil.copyfile"}


def main() -> None:
    sharded = watch_weights()
    run_launched(stopped, lambda: {"sharded": sorted(sharded)})


def run_launched(stopped: Callable[[list[str], int], int], seen: Callable[[], Mapping[str, Any]]) -> None:
    """Run the command that the command line names, stopped once if it says so; write RECORD.NUMBER.

    Args:
        stopped: Runs a command, interrupts it at a step and returns its exit code.
        seen: What else goes into the record, beside exit codes and written files.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("record", type=Path)
    parser.add_argument("--stop-at", type=int)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    written = watch_writes(Path(options.command[options.command.index("--output-dir") + 1]).resolve())
    codes = []
    if options.stop_at is not None:
        codes.append(stopped(options.command, options.stop_at))
    codes.append(run_command(options.command))
    record = {"codes": codes, "written": sorted(written), **seen()}
    options.record.with_suffix(f".{distributed.process_number()}").write_text(json.dumps(record))


def run_with(owner: type, name: str, replacement: Callable[..., Any], command: list[str]) -> int:
    """Run the command with a method replaced, then put things back; returns the exit code."""
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    code = run_command(command)
    setattr(owner, name, original)
    interruption.reset()
    return code


def signal_last_process() -> None:
    """SIGTERM to this process if it is the last one."""
    if distributed.process_number() == distributed.process_count() - 1:
        os.kill(os.getpid(), signal.SIGTERM)


def watch_writes(output: Path) -> set[str]:
    """Paths under `output` that this process opens for writing, makes, moves or removes, from now on."""
    written: set[str] = set()

    def note(path: object) -> None:
        if str(path).startswith(str(output)):
            written.add(os.path.relpath(str(path), output))

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if opened or event in _WRITES:
            note(arguments[0])

    sys.addaudithook(audit)
    # These two write without Python's knowledge.
    save, serialize_file = torch.save, safetensors.torch.serialize_file

    def noted_save(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        note(path)
        save(value, path, *args, **kwargs)

    def noted_serialize(tensors: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        note(path)
        serialize_file(tensors, path, *args, **kwargs)

    torch.save, safetensors.torch.serialize_file = noted_save, noted_serialize
    return written


def watch_weights() -> set[bool]:
    """Whether every parameter is a DTensor, before each micro-batch and after each measurement."""
    sharded: set[bool] = set()
    compute_loss, measure = PackedSftTrainer.compute_loss, Watch.measure

    def note(model: Any) -> None:
        sharded.add(all(isinstance(parameter, DTensor) for parameter in model.parameters()))

    def noted_loss(self: PackedSftTrainer, model: Any, *args: Any, **kwargs: Any) -> Any:
        note(model)
        return compute_loss(self, model, *args, **kwargs)

    def noted_measure(self: Watch) -> Any:
        found = measure(self)
        if self.trainer.state.global_step > 0:  # before, nothing is shared yet
            note(self.trainer.model)
        return found

    PackedSftTrainer.compute_loss, Watch.measure = noted_loss, noted_measure
    return sharded


def stopped(command: list[str], step: int) -> int:
    """Run the command; the last process alone gets a SIGTERM as it ends that step."""
    after_step = Watch.after_step

    def signalled(self: Watch, now: int) -> dict[str, float]:
        if now == step:
            signal_last_process()
        return after_step(self, now)

    return run_with(Watch, "after_step", signalled, command)


if __name__ == "__main__":
    main()
