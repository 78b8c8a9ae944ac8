"""docs/serving.md: its examples run against a real server, its limits are the command's."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import typer
from small_server import Running, Start

from llama2_chat import RewardScorer
from llama2_chat.cli.main import app
from llama2_chat.serving.limits import Limits

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"
DIALOGUE = [{"role": "user", "content": "What is 2 plus 2?"}, {"role": "assistant", "content": "It is 4."}]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def server(start: Start) -> Running:
    return start()


def test_the_curl_example(server: Running, offline: RewardScorer) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    (example,) = [block for block in blocks("sh") if "curl" in block]
    assert ADDRESS in example
    done = subprocess.run(
        ["sh", "-c", example.replace(ADDRESS, server.url)], capture_output=True, text=True, check=True
    )
    (shown,) = blocks("text")
    answer, described = json.loads(done.stdout), json.loads(shown)
    assert list(answer) == list(described)
    assert list(answer["scores"][0]) == list(described["scores"][0])
    assert answer["scores"][0]["combined"] == pytest.approx(offline.score([DIALOGUE])[0].combined, abs=1e-5)


def test_the_python_example(server: Running, offline: RewardScorer, capsys) -> None:
    (example,) = blocks("python")
    assert ADDRESS in example
    exec(compile(example.replace(ADDRESS, server.url), "example", "exec"), {})
    combined, branch = capsys.readouterr().out.split()
    (expected,) = offline.score([DIALOGUE])
    assert float(combined) == pytest.approx(expected.combined, abs=1e-5)
    assert branch == expected.branch


def test_the_options_that_are_named_exist_with_their_defaults() -> None:
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    options = {name: option for option in command.params for name in option.opts}
    table = re.findall(r"^\| `(--[a-z-]+)` \| ([\d.]*) ?\|", PAGE, re.MULTILINE)
    assert len(table) == 8
    for name, default in table:
        assert str("" if options[name].default is None else options[name].default) == default, name
    named = set(re.findall(r"(--[a-z][a-z-]+)", PAGE)) - {"--output", "--remote"}
    assert named <= set(options)
    limits = Limits()
    assert [options[f"--{name}"].default for name in ("max-body-bytes", "body-timeout", "queue-tokens")] == [
        limits.body_bytes, limits.body_seconds, limits.queue_tokens
    ]  # fmt: skip
    assert f"hold {limits.buffered_bytes // 2**20} MiB together" in PAGE
