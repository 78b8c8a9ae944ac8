"""Policies evaluated in a second process: the same results, and nothing lost where it fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama2_chat import interruption
from llama2_chat.evaluation.background import BackgroundEvaluation
from llama2_chat.evaluation.config import EvaluationConfig
from llama2_chat.evaluation.run import run_evaluation, stored_metrics
from llama2_chat.stage import EventLog


@pytest.fixture
def config(world, rewards) -> EvaluationConfig:
    return EvaluationConfig(
        helpfulness=str(rewards["helpfulness"][0].model),
        safety=str(rewards["safety"][0].model),
        prompts=[str(world / "prompts.jsonl")],
        samples_per_prompt=2,
        sampling={"max_new_tokens": 12},
    )


@pytest.fixture
def background(config, settings, sft, tmp_path: Path):
    process = BackgroundEvaluation(
        config,
        settings,
        sft=str(sft[0].model),
        directory=tmp_path / "beside",
        events=tmp_path / "events.jsonl",
    )
    yield process
    process.close()


def test_results_are_those_of_this_process(
    background, config, settings, sft, rejection, tmp_path: Path
) -> None:
    policies = {"sft": str(sft[0].model), "rs": str(rejection[0].model)}
    for name, path in policies.items():
        background.submit(name, path, f"of {name}")
    background.wait()
    assert background._process.poll() is None  # it waits for more
    run_evaluation(
        config,
        settings,
        policies=policies,
        fingerprints={name: f"of {name}" for name in policies},
        sft="sft",
        directory=tmp_path / "here",
        events=EventLog(tmp_path / "here.jsonl"),
    )
    names = sorted(file.name for file in (tmp_path / "here").iterdir())
    assert names == ["rs.json", "rs.samples.jsonl", "sft.json", "sft.samples.jsonl"]
    for name in names:
        assert (tmp_path / "beside" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    assert (tmp_path / "events.jsonl").read_text().count("policy_evaluated") == 2


def test_waiting_ends_when_the_process_fails(background, sft, tmp_path: Path) -> None:
    background.submit("gone", "no/such/model", "x")
    background.submit("sft", str(sft[0].model), "x")
    background.wait()
    assert background._process.poll() not in (None, 0)
    assert stored_metrics(tmp_path / "beside", "sft", "x") is None
    background.submit("late", str(sft[0].model), "x")  # nobody listens; the run's end makes up for it


def test_a_signal_ends_the_waiting_and_the_process(background, sft, monkeypatch: pytest.MonkeyPatch) -> None:
    background.submit("sft", str(sft[0].model), "x")
    monkeypatch.setattr(interruption, "_requested", signal.SIGTERM)
    with pytest.raises(interruption.Interrupted):
        background.wait()
    background.close()
    assert background._process.poll() == -signal.SIGKILL


def test_it_does_not_outlive_a_run_that_is_killed(config, settings, sft, tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from llama2_chat.evaluation.background import BackgroundEvaluation\n"
        "from llama2_chat.evaluation.config import EvaluationConfig\n"
        "from llama2_chat.settings import RunSettings\n"
        "config, settings = EvaluationConfig.model_validate_json(sys.argv[1]), "
        "RunSettings.model_validate_json(sys.argv[2])\n"
        "started = BackgroundEvaluation(config, settings, sft=None, directory=Path('d'), events=Path('e'))\n"
        "print(started._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", program, config.model_dump_json(), settings.model_dump_json()],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert run.stdout is not None
    pid = int(run.stdout.readline())
    assert is_alive(pid)
    run.kill()
    run.wait()
    deadline = time.monotonic() + 30
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_alive(pid)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] != "Z"
