"""Kills, signals and full disks: the same command continues and ends with the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

DRIVER = Path(__file__).resolve().parent / "fake_stages.py"


def content(run: Path) -> dict[str, Any]:
    """Every file's bytes, without what tells times (and the checkout's state, which may change meanwhile)."""
    found: dict[str, Any] = {}
    for file in sorted(run.rglob("*")):
        name = str(file.relative_to(run))
        if not file.is_file() or name in (
            *("events.jsonl", "environment.json", "report.html"),
            *(".lock", "waiting"),
        ):
            continue
        if file.name in ("done.json", "summary.json"):
            found[name] = _without_times(json.loads(file.read_text()))
        else:
            found[name] = file.read_bytes()
    return found


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if key != "wall_seconds"}
    return value


@pytest.fixture
def uninterrupted(workspace: Path, cli: Any) -> dict[str, Any]:
    """Content of a run that nothing disturbed."""
    assert cli("run", "recipe.yaml", "--output-dir", "whole").code == 0
    return content(workspace / "whole")


def command(*arguments: str) -> list[str]:
    """`llama2-chat ARGUMENTS` with the fake kinds, as another process."""
    return [sys.executable, str(DRIVER), *arguments]


def test_a_second_undisturbed_run_is_the_same(
    workspace: Path, cli: Any, uninterrupted: dict[str, Any]
) -> None:
    assert cli("run", "recipe.yaml", "--output-dir", "out").code == 0
    assert content(workspace / "out") == uninterrupted


@pytest.mark.parametrize(
    "moments",
    [
        ["01-first:0"],  # before its first step
        ["01-first:3", "01-first:6", "03-second:1"],  # between checkpoints, three times
        ["02-judge:4"],  # just after a checkpoint
    ],
)
def test_kill_inside_stages(
    workspace: Path, cli: Any, other_process: Any, uninterrupted: dict[str, Any], moments: list[str]
) -> None:
    for moment in moments:
        ended = other_process("run", "recipe.yaml", "--output-dir", "out", action=f"{moment}:kill")
        assert ended.code == -signal.SIGKILL
    assert cli("run", "recipe.yaml", "--output-dir", "out").code == 0
    assert content(workspace / "out") == uninterrupted


@pytest.mark.parametrize(
    ("file", "when"),
    [
        ("01-first/started.json", "before"),
        ("01-first/started.json", "after"),
        ("01-first/config.yaml", "before"),
        ("01-first/config.yaml", "after"),
        ("01-first/model", "before"),
        ("01-first/model", "after"),
        ("01-first/done.json", "before"),
        ("01-first/done.json", "after"),
        ("summary.json", "before"),
        ("environment.json", "before"),
        ("recipe.yaml", "before"),
    ],
)
def test_kill_between_writes(
    workspace: Path, cli: Any, uninterrupted: dict[str, Any], file: str, when: str
) -> None:
    """A fork runs the recipe and dies just before or after a file takes its place."""
    child = os.fork()
    if child == 0:
        _die_at(file, when)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    ended = cli("run", "recipe.yaml", "--output-dir", "out")
    assert ended.code == 0, ended.err
    assert content(workspace / "out") == uninterrupted


def _die_at(file: str, when: str) -> None:
    """Never returns: runs the command in a forked child until `file` is about to be put in place."""
    try:
        from llama2_chat.cli.main import run_command

        replace = Path.replace

        def dying(self: Path, target: Path) -> Path:
            here = str(target).endswith(f"/{file}")
            if here and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = replace(self, target)
            if here:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        Path.replace = dying  # type: ignore[assignment,method-assign]
        run_command(["run", "recipe.yaml", "--output-dir", "out"])
    finally:
        os._exit(99)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_signal_in_a_stage(
    workspace: Path, cli: Any, other_process: Any, uninterrupted: dict[str, Any], name: str, code: int
) -> None:
    ended = other_process("run", "recipe.yaml", "--output-dir", "out", action=f"02-judge:3:{name}")
    assert ended.code == code
    assert f"stopped by {name}" in ended.err
    assert "the same command continues" in ended.err
    assert "Traceback" not in ended.both
    assert json.loads((workspace / "out/stages/02-judge/checkpoints/state.json").read_text())[0] == 4
    assert cli("run", "recipe.yaml", "--output-dir", "out").code == 0
    assert content(workspace / "out") == uninterrupted


def test_signal_in_the_last_step_of_the_last_stage(
    workspace: Path, cli: Any, other_process: Any, uninterrupted: dict[str, Any]
) -> None:
    ended = other_process("run", "recipe.yaml", "--output-dir", "out", action="03-second:4:SIGTERM")
    assert ended.code == 143
    assert cli("run", "recipe.yaml", "--output-dir", "out").code == 0
    assert content(workspace / "out") == uninterrupted


def test_second_signal_stops_at_once(
    workspace: Path, cli: Any, other_process: Any, uninterrupted: dict[str, Any]
) -> None:
    began = time.monotonic()
    ended = other_process("run", "recipe.yaml", "--output-dir", "out", action="02-judge:3:twice")
    assert time.monotonic() - began < 20
    assert ended.code == 130
    assert "Traceback" not in ended.both
    assert cli("run", "recipe.yaml", "--output-dir", "out").code == 0
    assert content(workspace / "out") == uninterrupted


def test_second_process_is_locked_out(workspace: Path, cli: Any, uninterrupted: dict[str, Any]) -> None:
    waiting = workspace / "out" / "waiting"
    first = subprocess.Popen(
        command("run", "recipe.yaml", "--output-dir", "out"),
        env=os.environ | {"FAKE_ACTION": "02-judge:3:wait"},
        stderr=subprocess.DEVNULL,
    )
    try:
        while not waiting.exists():
            assert first.poll() is None
            time.sleep(0.02)
        before = content(workspace / "out")
        second = cli("run", "recipe.yaml", "--output-dir", "out")
        assert second.code == 2
        assert "out: another process is running in this folder" in second.err
        assert content(workspace / "out") == before
        first.send_signal(signal.SIGTERM)
        assert first.wait(timeout=20) == 143
    finally:
        first.kill()
        first.wait()
    assert cli("run", "recipe.yaml", "--output-dir", "out").code == 0  # the lock went with the process
    assert content(workspace / "out") == uninterrupted


def test_full_disk_in_a_stage(
    workspace: Path, cli: Any, uninterrupted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_ACTION", "02-judge:3:full_disk")
    ended = cli("run", "recipe.yaml", "--output-dir", "out")
    assert ended.code == 1
    assert "no space left on the disk" in ended.err
    assert "Traceback" not in ended.both
    monkeypatch.delenv("FAKE_ACTION")
    assert cli("run", "recipe.yaml", "--output-dir", "out").code == 0
    assert content(workspace / "out") == uninterrupted


def test_file_size_limit_counts_as_a_full_disk(workspace: Path, cli: Any) -> None:
    """A real refusal of the operating system: the metrics pass 2 KiB in the middle of a line."""
    arguments = ["run", "recipe.yaml", "stages.first.training.steps=120", "--output-dir"]
    ended = subprocess.run(
        ["bash", "-c", 'ulimit -f 2; exec "$@"', "-", *command(*arguments, "out")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert ended.returncode == 1
    assert "no space left on the disk" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert (workspace / "out/stages/01-first/metrics.jsonl").stat().st_size == 2048
    assert cli(*arguments, "out").code == 0
    assert cli(*arguments, "whole").code == 0
    assert content(workspace / "out") == content(workspace / "whole")


def test_half_a_line_in_the_event_log_is_closed(workspace: Path, cli: Any) -> None:
    (workspace / "out").mkdir()
    (workspace / "out" / "events.jsonl").write_text('{"time": "2')
    assert cli("run", "recipe.yaml", "--output-dir", "out").code == 0
    first, *rest = (workspace / "out" / "events.jsonl").read_text().splitlines()
    assert first == '{"time": "2'
    assert json.loads(rest[0])["event"] == "run_started"
