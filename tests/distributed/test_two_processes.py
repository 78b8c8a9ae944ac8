"""Two processes do what one does: the same losses, gradients and weights; and the first alone writes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_world import make_world

from llama2_chat import distributed
from llama2_chat.cli.main import run_command
from llama2_chat.errors import UserInputError

HERE = Path(__file__).parent
LAUNCHED = str(HERE / "launched.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2"]
ACCELERATE += [
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
    "--main_process_port",
    "0",
]


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
PRETRAIN = """
device: cpu
seed: 1
text: [web, books]
data:
  web: {testbed: pretraining_text, rows: 1200}
  books: {testbed: pretraining_text, rows: 300}
proportions: [0.6, 0.4]
vocabulary_size: 500
architecture: {hidden_size: 32, layers: 2, attention_heads: 4, key_value_heads: 2, context_length: 64}
training: {learning_rate: 3e-3, batch_size: 8, sequence_length: 64, min_warmup_steps: 2, max_steps: 8}
"""


def launch(command: list[str], **variables: str) -> None:
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def lines(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def assert_equal_runs(one: Path, two: Path) -> None:
    """Every figure of every step, the stage's metrics and every weight, to 1e-4."""
    assert len(lines(one)) == len(lines(two)) > 6
    for expected, found in zip(lines(one), lines(two), strict=True):
        # transformers counts an epoch's parts in micro-batches.
        assert {**found, "epoch": 0} == pytest.approx({**expected, "epoch": 0}, rel=1e-4)
    expected, found = (json.loads((run / "done.json").read_text())["metrics"] for run in (one, two))
    for moment in ("before", "after") if "held_out" in expected else ():
        assert found["held_out"][moment] == pytest.approx(expected["held_out"][moment], rel=1e-4)
    weights, others = (load_file(run / "model" / "model.safetensors") for run in (one, two))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=1e-4, atol=1e-4, msg=name)


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(file.with_suffix(f".{number}").read_text()) for number in range(2)]


def one_process(kind: str, config: Path, output: Path, *overrides: str) -> Path:
    assert run_command([kind, str(config), *overrides, "--output-dir", str(output)]) == 0
    return output


def assert_only_the_first_wrote(first: dict[str, Any], second: dict[str, Any]) -> None:
    """The other makes a checkpoint's folder if it comes first, and writes its random state there."""
    assert {"metrics.jsonl", "events.jsonl"} <= set(first["written"])
    assert any(name.endswith("model.safetensors") for name in first["written"])
    own = re.compile(r"\.|checkpoints(/checkpoint-\d+(/rng_state_1\.pth)?)?")
    assert [name for name in second["written"] if not own.fullmatch(name)] == []
    assert any("rng_state_1" in name for name in second["written"])  # what is looked for would be seen


def assert_resumed(output: Path) -> None:
    events = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
    started = [event for event in events if event["event"] == "training_started"]
    assert [event["resumed_from"] for event in started] == [None, "checkpoint-5"]
    assert [event["processes"] for event in started] == [2, 2]


def test_ddp_equivalence_and_resume_under_accelerate_launch(tmp_path: Path) -> None:
    """accelerate launch, 2 × 2 × 2 rows a step, stopped by a signal to one process and resumed, against 1 × 8 rows.

    The last step of an epoch is short. Questions are answered alike, and the first process alone writes.
    """
    config = make_world(tmp_path)
    one = one_process("sft", config, tmp_path / "one")
    two, record = tmp_path / "two", tmp_path / "record"
    command = ["sft", str(config), "training.micro_batch_size=2", "--output-dir", str(two)]
    # On a machine without GPUs --multi_gpu only says that there is more than one process.
    launch([*ACCELERATE, "--multi_gpu", LAUNCHED, str(record), "--stop-at", "5", "--", *command])
    assert json.loads((one / "done.json").read_text())["metrics"]["rows"] % 8 != 0
    assert_equal_runs(one, two)
    assert (one / "answers.jsonl").read_bytes() == (two / "answers.jsonl").read_bytes()
    first, second = records(record)
    assert first["codes"] == second["codes"] == [143, 0]
    assert first["sharded"] == second["sharded"] == [False]
    assert_only_the_first_wrote(first, second)
    assert_resumed(two)


@pytest.mark.parametrize(
    ("tied", "overrides"),
    [(False, []), (True, ["training.lora.rank=4", "training.gradient_checkpointing=true"])],
)
def test_fsdp_equivalence_and_resume_under_torchrun(tmp_path: Path, tied: bool, overrides: list[str]) -> None:
    """torchrun with FSDP2, stopped by a signal to one process and resumed, against 1 process that ran through.

    Every parameter is a DTensor at every micro-batch and after every measurement.
    """
    config = make_world(tmp_path, tied=tied)
    one = one_process("sft", config, tmp_path / "one", *overrides)
    two, record = tmp_path / "two", tmp_path / "record"
    command = ["sft", str(config), *overrides, "--output-dir", str(two)]
    launch([*TORCHRUN, LAUNCHED, str(record), "--stop-at", "5", "--", *command], **FSDP)
    assert_equal_runs(one, two)
    for process in records(record):
        assert process["sharded"] == [True]
        assert process["codes"] == [143, 0]
    assert_resumed(two)
    assert not (two / "answers.jsonl").exists()  # no process has a whole model to answer with


def test_pretraining_equivalence_under_torchrun(tmp_path: Path) -> None:
    """pretrain with FSDP2 in 2 processes, the first of which reads the text, against 1 process."""
    config = tmp_path / "pretrain.yaml"
    config.write_text(PRETRAIN)
    one = one_process("pretrain", config, tmp_path / "one")
    two, record = tmp_path / "two", tmp_path / "record"
    launch(
        [*TORCHRUN, LAUNCHED, str(record), "--", "pretrain", str(config), "--output-dir", str(two)], **FSDP
    )
    assert_equal_runs(one, two)
    first, second = records(record)
    assert first["sharded"] == second["sharded"] == [True]
    assert any(name.startswith("checkpoints/.text") for name in first["written"])
    assert not any("text" in name for name in second["written"])


def test_a_batch_that_processes_cannot_share(tmp_path: Path, monkeypatch, capsys) -> None:
    config = make_world(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(distributed, "connect", lambda device: None)
    monkeypatch.setattr(distributed, "wait_for_everyone", lambda: None)
    monkeypatch.setattr(distributed, "total", lambda values: values)
    code = run_command(["sft", str(config), "--output-dir", str(tmp_path / "out")])
    assert code == 2
    assert "training.batch_size: 8 is not a multiple of the 3 processes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed: not known here"),
        ({"ACCELERATE_USE_FSDP": "true"}, "only version 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "only version 2"),
    ],
)
def test_ways_to_share_that_are_not_known(monkeypatch, variables: dict[str, str], message: str) -> None:
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "0", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserInputError, match=message):
        distributed.connect("cpu")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["reward", "config.yaml", "--output-dir", "out"],
            "reward: launched as 2 processes, but runs in one",
        ),
        (
            ["run", "tiny", "--output-dir", "out"],
            "run: launched as 2 processes, but a whole recipe runs in one",
        ),
    ],
)
def test_what_one_process_must_run(
    tmp_path: Path, monkeypatch, capsys, command: list[str], message: str
) -> None:
    """The first process says so, the others end without a word; nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    for number, shown in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", number)
        assert run_command(command) == 2
        assert (message in capsys.readouterr().err) is shown
    assert list(tmp_path.iterdir()) == []
