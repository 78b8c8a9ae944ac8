"""For several test folders: a workspace with a recipe of fake stages, the command line in this process and another."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fake_stages
import pytest
import yaml

from llama2_chat import interruption
from llama2_chat.stage import STAGE_KINDS

_HERE = Path(__file__).resolve().parent

RECIPE = """\
name: small
seed: 3
base_model: base_model
data:
  talks: talks.jsonl
  pairs: {path: pairs.jsonl}
stages:
  first:
    kind: fake_policy
    model: base
    dialogues: [talks]
  judge:
    kind: fake_reward
    model: first
    preferences: [pairs]
  second:
    kind: fake_policy
    model: first
    helpfulness: judge
    dialogues: [talks]
    training: {learning_rate: 1e-5, steps: 5}
"""


@pytest.fixture(autouse=True)
def _fake_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind in fake_stages.KINDS.items():
        monkeypatch.setitem(STAGE_KINDS, name, kind)
    monkeypatch.delenv("FAKE_ACTION", raising=False)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a test: recipe.yaml, a base model and two data files."""
    (tmp_path / "base_model").mkdir()
    (tmp_path / "base_model" / "weights.txt").write_text("base\n")
    (tmp_path / "talks.jsonl").write_text('{"messages": []}\n')
    (tmp_path / "pairs.jsonl").write_text('{"prompt": []}\n')
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


Change = Callable[[str, object], Path]


@pytest.fixture
def change(workspace: Path) -> Change:
    """Set a dotted key of the workspace's recipe file (None removes it); returns the file."""

    def set_key(key: str, value: object) -> Path:
        file = workspace / "recipe.yaml"
        mapping = yaml.safe_load(file.read_text())
        *parents, last = key.split(".")
        place = mapping
        for parent in parents:
            place = place[parent]
        if value is None:
            del place[last]
        else:
            place[last] = value
        file.write_text(yaml.safe_dump(mapping, sort_keys=False))
        return file

    return set_key


class Ended:
    """What a command line left: exit code and the two outputs."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        self.both = out + err


Command = Callable[..., Ended]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Command:
    """Run a command line in this process."""
    from llama2_chat.cli.main import run_command

    def run(*arguments: str | Path) -> Ended:
        capfd.readouterr()
        try:
            code = run_command([str(argument) for argument in arguments])
        finally:
            interruption.reset()
        captured = capfd.readouterr()
        return Ended(code, captured.out, captured.err)

    return run


@pytest.fixture
def other_process(workspace: Path) -> Command:
    """Run a command line, with the fake kinds, in another process; `action` is FAKE_ACTION."""

    def run(*arguments: str | Path, action: str = "::") -> Ended:
        done = subprocess.run(
            fake_command(*arguments),
            capture_output=True,
            text=True,
            timeout=60,
            cwd=workspace,
            env=os.environ | {"FAKE_ACTION": action},
            check=False,
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    return run


def fake_command(*arguments: str | Path) -> list[str]:
    """The command that is `llama2-chat ARGUMENTS` with the fake kinds."""
    return [sys.executable, str(_HERE / "fake_stages.py"), *map(str, arguments)]
