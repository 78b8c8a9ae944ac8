"""The stage killed in each of its phases and run again, against one that ran through."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from small_stage import World, rows_of

from llama2_chat.generation import sample_file


@pytest.fixture
def stage(world: World, monkeypatch: pytest.MonkeyPatch):
    """A function that runs the stage with all its phases, in chunks of 8 so that there are several of each."""
    monkeypatch.setattr(sample_file, "ITEMS_PER_CHUNK", 8)
    first = world.prompts("first.jsonl", [f"question {n}" for n in range(20)])
    earlier, _ = world.run("v1", first)
    world.helpfulness.version = "helpful 2"
    prompts = world.prompts("prompts.jsonl", [f"question {n}" for n in range(10, 40)])
    held_out = world.prompts("held_out.jsonl", [f"held out {n}" for n in range(20)])

    def run(name: str) -> dict:
        _, metrics = world.run(
            name,
            prompts,
            iteration=2,
            earlier_samples=[str(earlier.samples)],
            temperatures=[0.5, 1.0, 2.0],
            temperature_prompts=[held_out],
        )
        return metrics

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "events.jsonl"}


@pytest.mark.parametrize(
    ("dies_at", "left"),
    [
        ("temperature_samples.jsonl", 5),
        ("samples.jsonl", 2),
        ("pool.jsonl", 12),
        ("pool.jsonl", 0),
    ],
)
def test_killed_while_chunks_are_written(
    world: World, stage, monkeypatch: pytest.MonkeyPatch, dies_at: str, left: int
) -> None:
    """A fork of this process is killed when a file has so many whole chunks and half a line more."""
    metrics = stage("whole")
    child = os.fork()
    if child == 0:
        _die_in_fork(stage, dies_at, left)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    folder = world.folder / "killed"
    assert (folder / f"{dies_at}.partial").exists()
    assert not (folder / dies_at).exists()
    assert stage("killed") == metrics
    assert contents(folder) == contents(world.folder / "whole")
    assert set(contents(folder)) == {
        *("temperature_samples.jsonl", "temperature.json", "samples.jsonl", "best_of.json", "pool.jsonl"),
        "dataset.jsonl",
    }
    assert world.trained_on[-1] == world.trained_on[-2]


def _die_in_fork(stage, file: str, chunks: int) -> None:
    """Never returns."""
    try:
        fsync = os.fsync

        def dying(descriptor: int) -> None:
            fsync(descriptor)
            name = Path(f"/proc/self/fd/{descriptor}").readlink().name
            if name == f"{file}.partial":
                seen.append(name)
                if len(seen) > chunks:
                    os.write(descriptor, b'{"prompt": [{"ro')
                    os.kill(os.getpid(), signal.SIGKILL)

        seen: list[str] = []
        os.fsync = dying
        stage("killed")
    finally:
        os._exit(99)


@pytest.mark.parametrize("dies_at", ["temperature.json", "best_of.json", "dataset.jsonl"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_between_files(world: World, stage, dies_at: str, when: str) -> None:
    metrics = stage("whole")
    child = os.fork()
    if child == 0:
        try:
            replace = Path.replace

            def dying(self: Path, target: Path) -> Path:
                here = Path(target).name == dies_at
                if not (here and when == "before"):
                    replace(self, target)
                if here:
                    os.kill(os.getpid(), signal.SIGKILL)
                return Path(target)

            Path.replace = dying  # type: ignore[method-assign]
            stage("killed")
        finally:
            os._exit(99)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert (world.folder / "killed" / dies_at).exists() == (when == "after")
    assert stage("killed") == metrics
    found = {name: data for name, data in contents(world.folder / "killed").items() if name[0] != "."}
    assert found == contents(world.folder / "whole")


def test_nothing_that_is_done_is_sampled_or_scored_again(world: World, stage) -> None:
    stage("whole")
    asked = len(world.helpfulness.scored)
    stage("whole")
    assert len(world.helpfulness.scored) == asked
    assert len(rows_of(world.folder / "whole" / "pool.jsonl")) > 100
