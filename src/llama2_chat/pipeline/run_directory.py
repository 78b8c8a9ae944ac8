"""The run directory: what belongs to a whole run, and the guard that only one process writes it."""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llama2_chat.errors import OutputFolderError, UserInputError
from llama2_chat.files import read_json, write_json, write_text
from llama2_chat.pipeline.recipe import Recipe
from llama2_chat.pipeline.yaml_files import dump, read_mapping
from llama2_chat.stage import EventLog, StageDirectory

FORMAT_VERSION = 1
_PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
    "tokenizers",
    "numpy",
)


class RunDirectory:
    """Paths inside a run directory."""

    def __init__(self, path: Path, stage_names: list[str]) -> None:
        self.path = path.resolve()
        self.events = EventLog(self.path / "events.jsonl")
        self._numbers = {name: number for number, name in enumerate(stage_names, start=1)}

    def stage(self, name: str) -> StageDirectory:
        """The folder of a stage, `stages/NN-name`."""
        return StageDirectory(
            self.path / "stages" / f"{self._numbers[name]:02d}-{name}", self.events.within(stage=name)
        )

    @property
    def evaluation(self) -> Path:
        """Where the evaluation of every policy goes."""
        return self.path / "evaluation"

    @property
    def summary(self) -> Path:
        """The run's results."""
        return self.path / "summary.json"


@contextmanager
def opened(path: Path, recipe: Recipe) -> Iterator[RunDirectory]:
    """A run directory, made or continued, locked against other processes.

    Raises:
        OutputFolderError: it cannot be written, or another process is at it.
        UserInputError: it belongs to another recipe or another version of the format.
    """
    run = RunDirectory(path, list(recipe.stages))
    ensure_writable(run.path)
    with locked(run.path, path):
        _check_belongs(run, recipe, path)
        write_text(run.path / "recipe.yaml", dump(recipe.to_mapping()))
        write_json(run.path / "environment.json", environment())
        yield run


@contextmanager
def locked(folder: Path, shown: Path) -> Iterator[None]:
    """Keep other processes out of `folder` while the block runs; the lock goes with the process.

    Raises:
        OutputFolderError: another process is at it; the message names the folder as `shown`.
    """
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputFolderError(f"{shown}: another process is running in this folder") from error
        yield


def ensure_writable(path: Path) -> None:
    """Make the folder, and a file in it.

    Raises:
        OutputFolderError: that does not work.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputFolderError(
            f"{path}: cannot write here ({error.strerror}); choose another --output-dir"
        ) from error


def environment() -> dict[str, Any]:
    """Versions, hardware and the code's state: what a result depends on beside the recipe."""
    return {
        "format_version": FORMAT_VERSION,
        "llama2_chat": importlib.metadata.version("llama2-chat"),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "git": _git_state(),
    }


def _check_belongs(run: RunDirectory, recipe: Recipe, path: Path) -> None:
    stored_environment, stored_recipe = run.path / "environment.json", run.path / "recipe.yaml"
    if stored_environment.exists():
        version = read_json(stored_environment).get("format_version")
        if version != FORMAT_VERSION:
            raise UserInputError(
                f"{path}: made with run directory format {version}, this version writes {FORMAT_VERSION}; "
                "choose another --output-dir"
            )
    if stored_recipe.exists():
        name = read_mapping(stored_recipe).get("name")
        if name != recipe.head.name:
            raise UserInputError(
                f'{path}: holds a run of recipe "{name}", not of "{recipe.head.name}"; '
                "choose another --output-dir, or remove the folder"
            )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git_state() -> str | None:
    """Commit of the checkout that the code runs from, with `-dirty` if it has changes; None outside git."""
    command = [
        "git",
        "-C",
        str(Path(__file__).resolve().parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
