"""The run directory: what belongs to a whole run, and the guard that only one process writes it."""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llama2_chat.errors import OutputFolderError, UserInputError, disk_full
from llama2_chat.files import read_json, write_json, write_text
from llama2_chat.pipeline.recipe import Recipe
from llama2_chat.pipeline.yaml_files import dump, read_mapping
from llama2_chat.stage import EventLog, StageDirectory

FORMAT_VERSION = 1
_ENVIRONMENT = "environment.json"
_RECIPE = "recipe.yaml"
_CONTENTS = (_RECIPE, "summary.json", "data", "stages", "evaluation")
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
        """The folder of a stage, `stages/NN-name`; under another number if it was made under that one."""
        folder = self._numbered(name)
        if not folder.exists():
            folder = next(iter(self._of_other_numbers(name)), folder)
        return StageDirectory(folder, self.events.within(stage=name))

    def renumber(self) -> bool:
        """Give the folders of stages whose place in the recipe has changed their new number; True if any."""
        moved = False
        for name in self._numbers:
            folder = self._numbered(name)
            for other in self._of_other_numbers(name):
                if not folder.exists():
                    other.rename(folder)
                    moved = True
        return moved

    def _numbered(self, name: str) -> Path:
        return self.path / "stages" / f"{self._numbers[name]:02d}-{name}"

    def _of_other_numbers(self, name: str) -> list[Path]:
        return [
            folder
            for folder in sorted(self.path.glob(f"stages/*-{name}"))
            if re.fullmatch(rf"\d+-{re.escape(name)}", folder.name) and folder != self._numbered(name)
        ]

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
        OutputFolderError: it cannot be written, holds something else, or another process is at it.
        UserInputError: it belongs to another recipe or another version of the format.
    """
    run = RunDirectory(path, list(recipe.stages))
    ensure_writable(run.path)
    with locked(run.path, path):
        check_belongs(run, recipe, path)
        # First what tells a run directory from any other folder.
        write_json(run.path / _ENVIRONMENT, environment())
        write_text(run.path / _RECIPE, dump(recipe.to_mapping()))
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
        OutputFolderError: that does not work (a full disk is no fault of the folder and stays an OSError).
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        if disk_full(error):
            raise
        raise OutputFolderError(
            f"{path}: cannot write here ({error.strerror}); choose another --output-dir"
        ) from error


def check_belongs(run: RunDirectory, recipe: Recipe, path: Path) -> None:
    """Raise if a folder, shown as `path`, is not empty and not a run of this recipe in this format."""
    stored_environment, stored_recipe = run.path / _ENVIRONMENT, run.path / _RECIPE
    if not stored_environment.exists():
        # Stages that were run alone, each into its place, are as good as the run's own.
        alone = all((stage / "started.json").exists() for stage in run.path.glob("stages/*"))
        there = [name for name in _CONTENTS if (run.path / name).exists()]
        if alone and "stages" in there:
            there.remove("stages")
        if there:
            raise OutputFolderError(
                f"{path}: holds {there[0]}, which no run made; choose another --output-dir"
            )
        return
    version = read_json(stored_environment).get("format_version")
    if version != FORMAT_VERSION:
        raise UserInputError(
            f"{path}: made with run directory format {version}, this version writes {FORMAT_VERSION}; "
            "choose another --output-dir"
        )
    name = read_mapping(stored_recipe).get("name") if stored_recipe.exists() else recipe.head.name
    if name != recipe.head.name:
        raise UserInputError(
            f'{path}: holds a run of recipe "{name}", not of "{recipe.head.name}"; '
            "choose another --output-dir, or remove the folder"
        )


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
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": _output_of(
            "nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"
        ).splitlines(),
        "git": _git_state(),
    }


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
    file = Path(__file__).resolve()
    git = ("git", "-C", str(file.parent))
    # An environment inside somebody else's repository is not this code's checkout.
    if not _output_of(*git, "ls-files", file.name):
        return None
    return _output_of(*git, "describe", "--always", "--dirty", "--abbrev=12") or None


def _output_of(*command: str) -> str:
    """What a program prints; nothing if it is not there, fails or takes long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
