"""A reduced demo that is killed and goes on: the same bytes as an uninterrupted one, on the user's own data too."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.long
COMMAND = [str(Path(sys.executable).with_name("llama2-chat"))]


def run_tiny(folder: Path, *overrides: str) -> None:
    subprocess.run([*COMMAND, "run", "tiny", *overrides, "--output-dir", str(folder)], check=True)


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


SMALL = (
    "data.demonstrations.rows=800",
    "data.helpfulness_pairs.rows=400",
    "data.safety_pairs.rows=400",
    "data.prompts.rows=300",
    "data.held_out_prompts.rows=60",
    "data.held_out_greedy_prompts.rows=60",
    "data.held_out_safety_prompts.rows=60",
    "data.independent_helpfulness_pairs.rows=100",
    "data.independent_safety_pairs.rows=100",
    "data.instruction_dialogues.rows=300",
    "data.adversarial_prompts.rows=300",
    "data.held_out_borderline_prompts.rows=30",
    "data.held_out_attribute_dialogues.rows=10",
    "stages.sft.training.checkpoint_steps=10",
    "stages.ghost_attention.training.checkpoint_steps=10",
    "stages.context_distillation.training.checkpoint_steps=5",
    "stages.ppo.training.iterations=8",
    "stages.ppo.training.batch_size=64",
    "stages.ppo.training.mini_batch_size=32",
    "stages.ppo.training.checkpoint_iterations=2",
)


NOT_COMPARED = {"events.jsonl", "done.json", "summary.json", "environment.json", "report.html"}
"""They hold times."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the reduced recipe."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    run_tiny(folder, *SMALL)
    return folder


def assert_same(one: Path, other: Path) -> None:
    """Weights, metrics, samples, datasets and evaluation byte for byte; done.json and summary.json but for times."""
    compared = 0
    for file in sorted(one.rglob("*")):
        relative = file.relative_to(one)
        if not file.is_file() or file.name in NOT_COMPARED or "checkpoints" in relative.parts:
            continue
        assert (other / relative).read_bytes() == file.read_bytes(), relative
        compared += 1
    assert compared > 80
    done = sorted(file.relative_to(one) for file in one.glob("stages/*/done.json"))
    assert len(done) == 8
    for file in done:
        metrics = [json.loads((run / file).read_text())["metrics"] for run in (one, other)]
        assert metrics[0] == metrics[1]
    assert summary(one)["evaluation"] == summary(other)["evaluation"]


def test_killed_five_times_ends_with_the_same_bytes(uninterrupted: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    seconds = summary(uninterrupted)["wall_seconds"]
    rng = random.Random(1)
    kills = 0
    for _ in range(5):
        process = subprocess.Popen([*COMMAND, "run", "tiny", *SMALL, "--output-dir", str(killed)])
        try:
            process.wait(timeout=rng.uniform(0.1, 0.25) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    run_tiny(killed, *SMALL)
    assert kills == 5
    assert_same(uninterrupted, killed)


def starts_of(folder: Path, stage: str) -> int:
    """How often a stage has been started or continued so far."""
    events = folder / "events.jsonl"
    lines = events.read_text().splitlines() if events.exists() else []
    return sum(f'"stage_started", "stage": "{stage}"' in line for line in lines)


def kill_within(folder: Path, stage: str, seconds: float) -> None:
    """Run until `stage` has been at work for `seconds`, then kill."""
    before = starts_of(folder, stage)
    process = subprocess.Popen([*COMMAND, "run", "tiny", *SMALL, "--output-dir", str(folder)])
    while starts_of(folder, stage) == before:
        assert process.poll() is None, "the run ended before the stage began"
        time.sleep(0.05)
    time.sleep(seconds)
    assert process.poll() is None, "the run ended before it was killed"
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_killed_within_the_last_stages_ends_with_the_same_bytes(uninterrupted: Path, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    rng = random.Random(2)
    stages = ("ghost_attention", "ghost_attention", "ppo", "ppo", "context_distillation")
    for stage in stages:
        took = summary(uninterrupted)["stages"][stage]["wall_seconds"]
        # A stage that continues, or has more of the machine than it had before, takes less than it took.
        kill_within(killed, stage, rng.uniform(0.1, 0.3) * took)
    # A stage that was killed twice was started a third time on the way to the next one.
    assert [starts_of(killed, stage) for stage in dict.fromkeys(stages)] == [3, 3, 1]
    run_tiny(killed, *SMALL)
    assert_same(uninterrupted, killed)


def test_real_data_run_ends(data_folder: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "LLAMA2_CHAT_DATA": str(data_folder)}
    started = time.monotonic()
    subprocess.run(
        [*COMMAND, "run", "stories260k", "--output-dir", str(tmp_path / "run")], check=True, env=environment
    )
    assert time.monotonic() - started < 15 * 60
    result = summary(tmp_path / "run")
    assert result["stages"]["sft"]["loss_last"] < result["stages"]["sft"]["loss_first"]
    assert result["evaluation"]["sft"]["reward_helpfulness_mean"] is not None
