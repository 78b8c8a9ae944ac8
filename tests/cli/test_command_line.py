"""Exit codes, plain messages, and a command line that answers at once."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llama2_chat import interruption
from llama2_chat.pipeline.recipe import packaged_recipes

PROBE = """\
import sys
from llama2_chat.cli.main import run_command
code = run_command(sys.argv[1:])
heavy = {"torch", "transformers", "numpy", "datasets", "tokenizers"} & set(sys.modules)
print(f"code {code} heavy {sorted(heavy)}", file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["validate", "recipe.yaml"],
        ["validate", "--schema"],
        ["recipes", "list"],
        ["data", "--help"],
        ["score", "--help"],
        ["serve", "--help"],
        ["report", "--help"],
        ["chat", "--help"],
    ],
)
def test_light_commands_do_not_import_torch(workspace: Path, arguments: list[str]) -> None:
    (workspace / "dialogues.jsonl").write_text("")
    (workspace / "recipe.yaml").write_text(
        "name: x\nbase_model: base_model\ndata: {d: talks.jsonl, g: {testbed: prompts, rows: 3}}\n"
        "stages: {sft: {kind: sft, model: base, dialogues: [d]}}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.stderr.splitlines()[-1] == "code 0 heavy []"


def test_help_answers_in_half_a_second() -> None:
    script = Path(sys.executable).with_name("llama2-chat")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "llama2_chat.cli.main"]
    times = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=30, check=False)
        times.append(time.perf_counter() - began)
        assert done.returncode == 0
    assert min(times) < 0.5
    for command_name in (
        "run",
        "validate",
        "recipes",
        "sft",
        "reward",
        "rejection-sampling",
        "score",
        "data",
        "report",
        "chat",
    ):
        assert f"  {command_name} " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["run", "tinny"], ["tinny: neither a file nor a packaged recipe", 'did you mean "tiny"']),
        (["run"], ["Missing argument", "RECIPE"]),
        (["run", "recipe.yaml", "--form", "x"], ["No such option", "--from"]),
        (["rum"], ["No such command", "rum"]),
        (["validate"], ["name a recipe, or give --schema"]),
        (["validate", "recipe.yaml", "seed=x"], ["recipe.yaml: 1 problem", "seed: "]),
        (["run", "recipe.yaml", "stages.first.modle=base", "seed=x"], ["2 problems", 'did you mean "model"']),
        (["recipes", "show", "tinny"], ['did you mean "tiny"']),
        (["recipes", "copy", "tiny", "recipe.yaml"], ["recipe.yaml: exists already"]),
        (["recipes", "copy", "tiny", "talks.jsonl/x.yaml"], ["talks.jsonl", "cannot write here"]),
        (["sft", "gone.yaml", "--output-dir", "x"], ["gone.yaml: no such file"]),
        (["sft", "recipe.yaml"], ["Missing option", "--output-dir"]),
        (["score", "gone.jsonl", "--helpfulness", "x", "--output", "y"], ["gone.jsonl: no such file"]),
        (["evaluate", "reward", "x", "gone.jsonl"], ["gone.jsonl: no such file"]),
        (
            ["evaluate", "policy", "x", "--helpfulness", "y", "--prompts", "gone.jsonl"],
            ["gone.jsonl: no such file"],
        ),
        (["data", "check", "gone.jsonl", "--kind", "prompts"], ["gone.jsonl: no such file"]),
        (["data", "check", "talks.jsonl", "--kind", "talk"], ["dialogues", "preferences", "prompts"]),
        (["data", "check", "talks.jsonl", "--kind", "dialogues"], ["talks.jsonl:1: "]),
    ],
)
def test_users_mistakes(workspace: Path, cli: Any, arguments: list[str], parts: list[str]) -> None:
    ended = cli(*arguments)
    assert ended.code == 2
    for part in parts:
        assert part in ended.err
    assert "Traceback" not in ended.both


@pytest.mark.parametrize(
    "arguments",
    [
        ["score", "dialogues.jsonl", "--helpfulness", "gone", "--output", "out.jsonl"],
        ["score", "dialogues.jsonl", "--helpfulness", "base_model", "--output", "out.jsonl"],
        ["score", "question.jsonl", "--helpfulness", "gone", "--output", "out.jsonl"],
        ["evaluate", "reward", "gone", "pairs.jsonl"],
        ["evaluate", "policy", "gone", "--helpfulness", "gone", "--prompts", "question.jsonl"],
        ["data", "show", "dialogues.jsonl", "--tokenizer", "gone"],
        ["data", "show", "dialogues.jsonl", "--tokenizer", "base_model"],
    ],
)
def test_missing_models_are_users_mistakes(workspace: Path, cli: Any, arguments: list[str]) -> None:
    answered = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (workspace / "dialogues.jsonl").write_text(json.dumps({"messages": answered}) + "\n")
    (workspace / "question.jsonl").write_text(json.dumps({"messages": answered[:1]}) + "\n")
    (workspace / "pairs.jsonl").write_text(
        json.dumps({"prompt": answered[:1], "chosen": "a", "rejected": "b"}) + "\n"
    )
    ended = cli(*arguments)
    assert ended.code == 2, ended.err
    assert any(part in ended.err for part in ("gone", "base_model", "question.jsonl"))
    assert "Traceback" not in ended.both


def test_a_bug_gives_exit_code_1_and_says_how_to_see_more(workspace: Path, other_process: Any) -> None:
    ended = other_process("run", "recipe.yaml", action="01-first:1:bug")
    assert ended.code == 1
    assert "unexpected RuntimeError: the fake stage has a bug" in ended.err
    assert "--debug" in ended.err
    assert "Traceback" not in ended.both


@pytest.mark.parametrize(
    ("arguments", "action", "code", "raised"),
    [
        (["run", "recipe.yaml"], "01-first:1:bug", 1, "RuntimeError: the fake stage has a bug"),
        (["run", "recipe.yaml"], "01-first:1:full_disk", 1, "OSError: [Errno 28]"),
        (["run", "tinny"], "::", 2, "MissingFileError: tinny"),
    ],
)
def test_debug_shows_the_traceback(
    workspace: Path, other_process: Any, arguments: list[str], action: str, code: int, raised: str
) -> None:
    ended = other_process("--debug", *arguments, action=action)
    assert ended.code == code
    assert "Traceback (most recent call last)" in ended.err
    assert raised in ended.err


def test_debug_may_stand_anywhere(workspace: Path, cli: Any) -> None:
    for arguments in (["run", "tinny", "--debug"], ["run", "--debug", "tinny"]):
        ended = cli(*arguments)
        assert ended.code == 2
        assert "Traceback (most recent call last)" in ended.err


def test_debug_does_not_outlast_its_command(workspace: Path, cli: Any) -> None:
    assert "Traceback" in cli("--debug", "run", "tinny").err
    assert "Traceback" not in cli("run", "tinny").err


def test_tags_in_messages_stay_whole(workspace: Path, cli: Any) -> None:
    """Square brackets are markup to some printers."""
    name = "no [INST] [/INST] <<SYS>> [red]x[/red] recipe"
    assert name in cli("run", name).err
    assert "[/INST]" in cli("run", "recipe.yaml", "seed='[/INST]'").err
    assert "stages.[INST]" in cli("validate", "recipe.yaml", "stages.[INST].kind=sft").err
    (workspace / "[INST]").mkdir()
    ended = cli("run", "recipe.yaml", "--output-dir", "[INST]/[/INST]")
    assert ended.code == 0
    assert "[INST]/[/INST]: done" in ended.out


def test_valid_recipe(workspace: Path, cli: Any) -> None:
    ended = cli("validate", "recipe.yaml")
    assert (ended.code, ended.out) == (0, "recipe.yaml: valid; stages first, judge, second\n")


def test_recipes_can_be_listed_shown_and_copied(workspace: Path, cli: Any) -> None:
    listed = cli("recipes", "list").out.splitlines()
    assert [line.split(":")[0] for line in listed] == list(packaged_recipes())
    shown = cli("recipes", "show", "tiny")
    assert shown.out == packaged_recipes()["tiny"].read_text()
    assert cli("recipes", "copy", "tiny", "mine/copy.yaml").code == 0
    copied = (workspace / "mine" / "copy.yaml").read_text().splitlines()
    original = shown.out.splitlines()
    changed = [(a, b) for a, b in zip(original, copied, strict=True) if a != b]
    base = (packaged_recipes()["tiny"].parent / "base").resolve()
    assert changed == [("base_model: base", f"base_model: {base}")]
    assert cli("validate", "mine/copy.yaml").code == 0


def test_a_copied_recipe_finds_the_data_that_comes_with_it(workspace: Path, cli: Any) -> None:
    assert cli("recipes", "copy", "smollm2-135m", "mine.yaml").code == 0
    copied = (workspace / "mine.yaml").read_text()
    original = packaged_recipes()["smollm2-135m"]
    file = (original.parent / "instructions.jsonl").resolve()
    assert copied == original.read_text().replace(": instructions.jsonl", f": {file}")
    assert file.is_file()


def test_output_to_a_closed_pipe(workspace: Path) -> None:
    """`llama2-chat validate --schema | head -1` is no error of anybody."""
    command = f"{sys.executable} -m llama2_chat.cli.main validate --schema | head -1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=30, check=False, env=os.environ
    )
    assert done.stdout == "{\n"
    assert "Traceback" not in done.stderr
    assert "error" not in done.stderr


def test_version(cli: Any) -> None:
    ended = cli("--version")
    assert (ended.code, ended.out) == (0, f"llama2-chat {importlib.metadata.version('llama2-chat')}\n")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "error: out of memory; make training.micro_batch_size"),
        (OSError(28, "x"), "error: no space left on the disk; free some"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 0"),
            "error: no space",
        ),
    ],
)
def test_what_the_machine_lacks(
    workspace: Path, cli: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("llama2_chat.pipeline.run.run_stage_file", fail)
    ended = cli("run", "recipe.yaml")
    assert ended.code == 1
    assert message in ended.err
    assert "Traceback" not in ended.both


def test_commands_without_checkpoints_leave_signals_alone(workspace: Path, cli: Any) -> None:
    """Ctrl-C stops them at once; a request that nobody reads would be lost."""
    seen = []

    def handlers(*arguments: object, **options: object) -> None:
        seen.append((signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)))
        raise KeyboardInterrupt

    for command, place in [
        (["validate", "recipe.yaml"], "llama2_chat.pipeline.recipe.load_recipe"),
        (["run", "recipe.yaml", "--dry-run"], "llama2_chat.pipeline.recipe.load_recipe"),
        (["run", "recipe.yaml"], "llama2_chat.pipeline.run.run_recipe"),
    ]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, handlers)
            assert cli(*command).code == 130
    assert seen[:2] == [(signal.default_int_handler, signal.SIG_DFL)] * 2
    assert seen[2] == (interruption._handle, interruption._handle)
