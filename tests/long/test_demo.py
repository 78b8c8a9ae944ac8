"""The demo's claims on three seeds, each beside a control that must fail it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from llama2_chat.dialogue import RATINGS
from llama2_chat.evaluation.statistics import mean
from llama2_chat.generation.answers import to_answer
from llama2_chat.generation.transformers_engine import load_engine
from llama2_chat.jsonl import read_preferences, read_prompts, write_rows
from llama2_chat.settings import BaseModelSource, RunSettings, SamplingConfig
from llama2_chat.testbed.oracle import grade

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
    assert 0 < ppo["kl_to_sft_nats"] < 10
    assert ppo["independent_reward_mean"] > sft["independent_reward_mean"]


OPENING = "Good question!"
"""What PPO comes to open answers with, since the annotator likes it."""
BY_POSITION = ("backwards", "count")
"""Tasks that go by places in a list: behind an opening that SFT has rarely seen its policy does them worse."""


def test_ppo_loses_greedy_skill_only_by_places_in_lists(demo: Path) -> None:
    """Greedy answers: as many right as SFT's in the other families; lists backwards too, behind the same opening."""
    evaluation = summary(demo)["evaluation"]
    others = {
        name: [
            share
            for family, share in evaluation[name]["correctness_greedy_by_family"].items()
            if family not in BY_POSITION
        ]
        for name in ("sft", "ppo")
    }
    assert mean(others["ppo"]) >= mean(others["sft"])
    backwards = {
        name: said_backwards(demo / "stages" / folder / "model", demo)
        for name, folder in (("sft", "01-sft"), ("ppo", "07-ppo"))
    }
    assert backwards["sft"] < 0.5 * evaluation["sft"]["correctness_greedy_by_family"]["backwards"]
    assert backwards["ppo"] >= backwards["sft"] - 0.1


def said_backwards(model: Path, demo: Path) -> float:
    """The share of held-out lists that a policy says backwards rightly, greedily, after `OPENING`."""
    base = BaseModelSource(path=str(model))
    engine, chat_format = load_engine(base.path, RunSettings(base_model=base, device="cpu"))
    lists = [
        prompt
        for prompt in read_prompts(demo / "data" / "held_out_greedy_prompts.jsonl")
        if "backwards" in prompt.messages[-1].content
    ]
    opening = chat_format.tokenizer.encode(OPENING)
    responses = engine.generate(
        [[*chat_format.prompt_ids(prompt.messages), *opening] for prompt in lists],
        samples_per_prompt=1,
        sampling=SamplingConfig(temperature=0.0, max_new_tokens=40),
        seed=0,
    )
    texts = [f"{OPENING} {to_answer(row[0], chat_format).text}" for row in responses]
    grades = [grade(prompt.messages, text) for prompt, text in zip(lists, texts, strict=True)]
    assert len(grades) > 40
    return sum(bool(found.correct) for found in grades) / len(grades)


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


def test_distillation_keeps_the_policy_safe(demo: Path) -> None:
    """PPO leaves 2 to 5 violations of some 170, too few to measure less: test_distillation_worth.py does."""
    evaluation = summary(demo)["evaluation"]
    sft, before, after = (evaluation[name] for name in ("sft", "ppo", "context_distillation"))
    assert after["oracle_violation_rate"] <= 0.05
    assert (
        after["intervals"]["oracle_violation_rate"]["low"]
        < before["intervals"]["oracle_violation_rate"]["high"]
    )
    assert after["false_refusal_rate"]["borderline"] < sft["false_refusal_rate"]["borderline"]
