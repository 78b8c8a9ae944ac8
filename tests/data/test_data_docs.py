"""docs/data.md: every command in it runs and prints what it says, and its Python runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "data.md"
COMMAND = re.compile(r"^```sh\n(.*?)^```\n\n```text\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture
def environment(data_folder: Path) -> dict[str, str]:
    """The console script on the PATH, and plain output without colours."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}
    return {**kept, "PATH": path, "LLAMA2_CHAT_DATA": str(data_folder.resolve()), "PYTHONIOENCODING": "utf-8"}


def test_the_examples_run(tmp_path: Path, environment: dict[str, str]) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    commands = COMMAND.findall(text)
    assert len(commands) == text.count("```sh\n") == 14
    for command, expected in commands:
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout == expected, done.stderr
        assert done.returncode == 0
    (code,) = PYTHON.findall(text)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "made.jsonl").exists()
