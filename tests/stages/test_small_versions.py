"""recipes/tiny/iterations.yaml at the smallest size: two versions, a step or two in every training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_interrupted_runs import content

from llama2_chat.cli.main import run_command
from llama2_chat.jsonl import read_preferences, read_samples
from llama2_chat.pipeline.run_directory import RunDirectory
from llama2_chat.pipeline.yaml_files import read_mapping
from llama2_chat.stage import StageDirectory

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "tiny" / "iterations.yaml"
ROWS = {
    "demonstrations": 24,
    **{f"prompts_v{version}": 10 for version in range(1, 6)},
    "instruction_dialogues": 3,
    "held_out_helpfulness_pairs": 12,
    "held_out_safety_pairs": 12,
    "held_out_prompts": 3,
    "held_out_safety_prompts": 3,
    "ppo_prompts": 8,
    "adversarial_prompts": 4,
    "helpfulness_pairs": 24,
    "safety_pairs": 24,
    "independent_helpfulness_pairs": 8,
    "independent_safety_pairs": 8,
}
SMALL = [
    *(f"data.{name}.rows={rows}" for name, rows in ROWS.items()),
    *(
        f"stages.{name}.training.max_steps=1"
        for name in ("sft", "helpfulness_rm", "safety_rm", "independent_rm")
    ),
    *("iterations.count=2", "iterations.ghost_attention.after=1", "iterations.ppo.from=2"),
    "iterations.overrides={v2: {rejection_sampling: {prompts: [prompts_v2]}}}",
    "data.instruction_dialogues.options={min_turns: 2, max_turns: 3}",
    "iterations.ghost_attention.sft_dialogues=[v1_rejection_sampling]",
    "iterations.preferences.max_prompts=36",
    "iterations.preferences.held_out=0.4",
    "iterations.rejection_sampling.samples_per_prompt=2",
    *(
        f"iterations.{section}.training.max_steps=1"
        for section in ("rejection_sampling", "ghost_attention", "context_distillation")
    ),
    "iterations.ppo.training={iterations: 1, batch_size: 8, mini_batch_size: 8, learning_rate: 1e-4}",
    "evaluation.helpfulness=v2_helpfulness_rm",
    "evaluation.safety=v2_safety_rm",
    *(f"evaluation.{name}=[]" for name in ("greedy_prompts", "borderline_prompts", "attribute_dialogues")),
    "evaluation.samples_per_prompt=1",
]


def run(folder: Path, *options: str) -> int:
    return run_command(["run", str(RECIPE), *SMALL, "--output-dir", str(folder), *options])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("versions") / "whole"
    assert run(folder) == 0
    return folder


def stage(folder: Path, name: str) -> StageDirectory:
    return RunDirectory(folder, list(read_mapping(folder / "recipe.yaml")["stages"])).stage(name)


def test_every_version_is_built_on_the_one_before(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    assert list(summary["stages"]) == [
        *("sft", "helpfulness_rm", "safety_rm", "independent_rm"),
        *("v1_helpfulness_pairs", "v1_safety_pairs", "v1_helpfulness_rm", "v1_safety_rm"),
        *("v1_rejection_sampling", "v1_ghost_attention"),
        *("v2_helpfulness_pairs", "v2_safety_pairs", "v2_helpfulness_rm", "v2_safety_rm"),
        *("v2_rejection_sampling", "v2_ppo", "context_distillation"),
    ]
    policies = ["sft", "v1_rejection_sampling", "v1_ghost_attention", "v2_rejection_sampling", "v2_ppo"]
    assert list(summary["evaluation"]) == ["base", *policies, "context_distillation"]
    answered = read_samples(stage(whole, "v2_safety_pairs").samples)
    assert {sample.policy for sample in answered} == {"v1_ghost_attention", "v1_rejection_sampling"}


def test_reward_models_are_trained_on_all_batches_and_measured_on_each(whole: Path) -> None:
    stages = json.loads((whole / "summary.json").read_text())["stages"]
    for domain in ("helpfulness", "safety"):
        batches = [stages[f"v{number}_{domain}_pairs"] for number in (1, 2)]
        model = stages[f"v2_{domain}_rm"]
        trained = [file["kept"] for file in model["pairs_by_file"]]
        assert trained == [ROWS[f"{domain}_pairs"], *(batch["training_pairs"] for batch in batches)]
        counts = {source: row["overall"]["count"] for source, row in model["by_source"].items()}
        assert counts == {
            "testbed": ROWS[f"held_out_{domain}_pairs"],
            "preferences:1": batches[0]["held_out_pairs"],
            "preferences:2": batches[1]["held_out_pairs"],
        }
        assert set(stages[f"v1_{domain}_rm"]["by_source"]) == {"testbed", "preferences:1"}


def test_no_batch_holds_out_what_another_trains_on(whole: Path) -> None:
    for domain in ("helpfulness", "safety"):
        parts: dict[str, set[str]] = {"dataset": set(), "held_out": set()}
        for number in (1, 2):
            for part, messages in parts.items():
                pairs = read_preferences(stage(whole, f"v{number}_{domain}_pairs").path / f"{part}.jsonl")
                messages |= {next(m.content for m in pair.prompt if m.role == "user") for pair in pairs}
        assert min(map(len, parts.values())) >= 2
        assert not parts["dataset"] & parts["held_out"]


def test_the_report_has_the_versions(whole: Path) -> None:
    page = (whole / "report.html").read_text()
    assert "RLHF versions" in page
    assert "V2 without PPO" in page
    assert "Safety reward models on each batch" in page


class KilledError(RuntimeError):
    """In the place of a kill."""


def test_a_run_that_is_stopped_again_and_again_ends_with_the_same_bytes(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time when a file was about to take its place; V1 is enough, other tests stop what comes later."""
    moments = [
        "v1_helpfulness_pairs/samples.jsonl",
        "v1_safety_pairs/annotations.jsonl",
        "v1_safety_pairs/dataset.jsonl",
        "v1_helpfulness_rm/done.json",
        "v1_rejection_sampling/model",
    ]
    replace = Path.replace

    def dying(self: Path, target: Any) -> Path:
        if moments and str(target).endswith(moments[0]):
            moments.pop(0)
            raise KilledError
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", dying)
    times = len(moments)
    until = ("--until", "v1_rejection_sampling")
    assert [run(tmp_path / "out", *until) for _ in range(times)] == [1] * times
    assert not moments
    assert run(tmp_path / "out", *until) == 0
    ours, theirs = content(tmp_path / "out" / "stages"), content(whole / "stages")
    assert len([name for name in ours if name.endswith("model/model.safetensors")]) == 7
    first_nine = {name for name in theirs if int(name[:2]) <= 9}
    assert set(ours) == first_nine
    assert [name for name in ours if ours[name] != theirs[name]] == []
