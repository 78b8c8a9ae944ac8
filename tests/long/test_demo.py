"""The demo's claims on three seeds, each beside a control that must fail it."""

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

from llama2_chat.dialogue import RATINGS
from llama2_chat.jsonl import read_preferences, write_rows

pytestmark = pytest.mark.long
SEEDS = (0, 1, 2)
COMMAND = [str(Path(sys.executable).with_name("llama2-chat"))]


def run_tiny(folder: Path, *overrides: str) -> None:
    subprocess.run([*COMMAND, "run", "tiny", *overrides, "--output-dir", str(folder)], check=True)


@pytest.fixture(scope="session", params=SEEDS)
def demo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny recipe."""
    kept = os.environ.get("LLAMA2_CHAT_DEMO_RUNS")
    folder = Path(kept) / f"seed-{request.param}" if kept else tmp_path_factory.mktemp("demo")
    run_tiny(folder, f"seed={request.param}")
    return folder


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_sft_is_above_base(demo: Path) -> None:
    evaluation = summary(demo)["evaluation"]
    base, sft = evaluation["base"]["intervals"], evaluation["sft"]["intervals"]
    assert sft["oracle_helpfulness"]["low"] > base["oracle_helpfulness"]["high"]
    assert sft["correctness_greedy"]["low"] > base["correctness_greedy"]["high"]


def test_sft_is_neither_too_good_nor_too_bad(demo: Path) -> None:
    sft = summary(demo)["evaluation"]["sft"]
    assert 0.6 <= sft["correctness_greedy"] <= 0.9
    assert sft["oracle_helpfulness"] < 0.6


@pytest.mark.parametrize(("stage", "wanted"), [("helpfulness_rm", 0.74), ("safety_rm", 0.80)])
def test_reward_models_follow_the_annotator(demo: Path, stage: str, wanted: float) -> None:
    metrics = summary(demo)["stages"][stage]
    accuracy = metrics["accuracy"]
    assert accuracy["overall"]["accuracy"] >= wanted
    by_rating = [accuracy["by_rating"][rating]["accuracy"] for rating in reversed(RATINGS)]
    assert by_rating == sorted(by_rating)
    if stage == "safety_rm":
        assert accuracy["by_rating"]["significantly_better"]["accuracy"] >= 0.90
    assert accuracy["overall"]["accuracy"] < metrics["attainable_accuracy"]["overall"]["accuracy"]
    for control in metrics["controls"].values():
        assert control["accuracy"] < wanted


def test_a_reward_model_of_shuffled_preferences_fails(demo: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = []
    for pair in read_preferences(demo / "data" / "helpfulness_pairs.jsonl"):
        row = pair.to_row()
        if rng.random() < 0.5:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
        rows.append(row)
    write_rows(tmp_path / "shuffled.jsonl", rows)
    config = demo / "stages" / "02-helpfulness_rm" / "config.yaml"
    override = f"preferences=[{tmp_path / 'shuffled.jsonl'}]"
    output = tmp_path / "rm"
    subprocess.run([*COMMAND, "reward", str(config), override, "--output-dir", str(output)], check=True)
    accuracy = json.loads((output / "done.json").read_text())["metrics"]["accuracy"]["overall"]
    assert accuracy["accuracy"] < 0.74


def test_best_of_eight_gains_and_a_random_pick_does_not(demo: Path) -> None:
    sft = summary(demo)["evaluation"]["sft"]
    assert sft["best_of_8_oracle_helpfulness"] >= sft["oracle_helpfulness"] + 0.20
    assert sft["random_of_8_oracle_helpfulness"] < sft["oracle_helpfulness"] + 0.20


def test_rejection_sampling_is_more_helpful_and_safer_than_sft(demo: Path) -> None:
    evaluation = summary(demo)["evaluation"]
    sft, ours = evaluation["sft"]["intervals"], evaluation["rejection_sampling"]["intervals"]
    assert ours["oracle_helpfulness"]["low"] > sft["oracle_helpfulness"]["high"]
    assert ours["oracle_violation_rate"]["high"] < sft["oracle_violation_rate"]["low"]


def test_fine_tuning_on_random_picks_is_the_control(demo: Path, tmp_path: Path) -> None:
    """The same stage that keeps any sample instead of the best gains less, on both counts.

    It may gain something: its samples are drawn at a temperature below 1, at which the policy is better.
    """
    config = demo / "stages" / "05-rejection_sampling" / "config.yaml"
    stage = tmp_path / "random"
    subprocess.run(
        [*COMMAND, "rejection-sampling", str(config), "select=random", "--output-dir", str(stage)], check=True
    )
    data = demo / "data"
    subprocess.run(
        [
            *COMMAND, "evaluate", "policy", str(stage / "model"),
            "--helpfulness", str(demo / "stages" / "02-helpfulness_rm" / "model"),
            "--safety", str(demo / "stages" / "03-safety_rm" / "model"),
            "--prompts", str(data / "held_out_prompts.jsonl"),
            "--safety-prompts", str(data / "held_out_safety_prompts.jsonl"),
            "--max-new-tokens", "40", "--output-dir", str(tmp_path / "evaluation"),
        ],
        check=True,
    )  # fmt: skip
    control = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["intervals"]
    ours = summary(demo)["evaluation"]["rejection_sampling"]["intervals"]
    assert ours["oracle_helpfulness"]["low"] > control["oracle_helpfulness"]["high"]
    assert ours["oracle_violation_rate"]["high"] < control["oracle_violation_rate"]["low"]


def test_ppo_is_more_helpful_than_sft_and_safe(demo: Path) -> None:
    evaluation = summary(demo)["evaluation"]
    sft, sampled, ppo = (evaluation[name] for name in ("sft", "rejection_sampling", "ppo"))
    assert ppo["oracle_helpfulness"] >= sft["oracle_helpfulness"] + 0.20
    assert ppo["oracle_helpfulness"] >= sampled["oracle_helpfulness"]
    assert ppo["oracle_violation_rate"] <= 0.05
    assert ppo["correctness_greedy"] >= sft["correctness_greedy"] - 0.03
    assert 0 < ppo["kl_to_sft_nats"] < 10
    assert ppo["independent_reward_mean"] > sft["independent_reward_mean"]


def test_ghost_attention_keeps_what_was_stated(demo: Path) -> None:
    evaluation = summary(demo)["evaluation"]
    before, after = evaluation["rejection_sampling"], evaluation["ghost_attention"]
    assert all(after["attribute_recall"][turn] >= 0.9 for turn in ("2", "4", "6"))
    assert after["attribute_recall"]["20"] >= 0.8
    assert all(before["attribute_recall"][turn] <= 0.3 for turn in ("6", "10", "20"))
    assert after["oracle_helpfulness"] >= before["oracle_helpfulness"] - 0.03


def test_the_control_of_ghost_attention_differs_in_the_loss_alone(demo: Path, tmp_path: Path) -> None:
    """Loss on all turns of the same dialogues: what it recalls is printed, whatever it is."""
    ours = demo / "stages" / "06-ghost_attention"
    control = tmp_path / "control"
    subprocess.run(
        [
            *(*COMMAND, "ghost-attention", str(ours / "config.yaml"), "loss_policy=all_answers"),
            *("--output-dir", str(control)),
        ],
        check=True,
    )
    assert (control / "dataset.jsonl").read_bytes() == (ours / "dataset.jsonl").read_bytes()
    one, other = (json.loads((stage / "done.json").read_text())["metrics"] for stage in (ours, control))
    assert one["steps"] == other["steps"]
    assert one["trained_tokens"] < other["trained_tokens"]
    data = demo / "data"
    subprocess.run(
        [
            *(*COMMAND, "evaluate", "policy", str(control / "model")),
            *("--helpfulness", str(demo / "stages" / "02-helpfulness_rm" / "model")),
            *("--prompts", str(data / "held_out_prompts.jsonl")),
            *("--attribute-dialogues", str(data / "held_out_attribute_dialogues.jsonl")),
            *("--max-new-tokens", "40", "--output-dir", str(tmp_path / "evaluation")),
        ],
        check=True,
    )
    found = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    print("control:", found["attribute_recall"], found["oracle_helpfulness"])


def test_distillation_lowers_violations(demo: Path) -> None:
    evaluation = summary(demo)["evaluation"]
    sft, before, after = (evaluation[name] for name in ("sft", "ppo", "context_distillation"))
    assert after["oracle_violation_rate"] < before["oracle_violation_rate"]
    assert after["false_refusal_rate"]["borderline"] < sft["false_refusal_rate"]["borderline"]


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
