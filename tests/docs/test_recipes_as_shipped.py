"""The recipes as they are shipped: valid, and experiments differ in what they compare alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml

from llama2_chat.cli.main import run_command
from llama2_chat.pipeline.data import prepare_data
from llama2_chat.pipeline.data_entries import ImportedData
from llama2_chat.pipeline.recipe import Recipe, load_recipe, packaged_recipes
from llama2_chat.pipeline.stage_config import load_stage_config
from llama2_chat.pipeline.sweep import load_runs
from llama2_chat.pipeline.yaml_files import read_mapping
from llama2_chat.stage import EventLog
from llama2_chat.testbed.wording import ANSWER_TEMPLATES

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.fixture
def inputs_there(data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data that recipes name, and in place of the model that `make smollm2-135m` fetches an empty file."""
    monkeypatch.setenv("LLAMA2_CHAT_DATA", str(data_folder))
    monkeypatch.setenv("LLAMA2_CHAT_MODELS", str(tmp_path))
    (tmp_path / "smollm2-135m").mkdir()
    (tmp_path / "smollm2-135m" / "SmolLM2-135M-Instruct.Q4_1.gguf").touch()


def make_model_folders(run: Path, stages: Iterable[str], first: int = 1) -> None:
    """Model folders of stages, numbered from `first`, as a finished run has them."""
    for number, stage in enumerate(stages, start=first):
        (run / "stages" / f"{number:02}-{stage}" / "model").mkdir(parents=True)


def different(recipe: Recipe, one: str, other: str) -> set[str]:
    """The keys in which two stages differ."""
    ours, theirs = (recipe.stages[name].model_dump() for name in (one, other))
    return {key for key in ours if ours[key] != theirs[key]}


@pytest.mark.parametrize("name", ["smollm2-135m", "stories260k", "tiny"])
def test_packaged_recipes_are_valid(name: str, inputs_there: None) -> None:
    assert name in packaged_recipes()
    assert "rejection_sampling" in load_recipe(name).stages


@pytest.mark.parametrize("name", ["smollm2-135m", "stories260k"])
def test_single_stage_configurations_are_valid(name: str, inputs_there: None, tmp_path: Path) -> None:
    """recipes/*/sft.yaml: loaded as the command loads them, with rows for training and rows held out apart."""
    file = RECIPES / name / "sft.yaml"
    config, settings = load_stage_config(file, "sft", made_data=tmp_path / "data")
    assert config.dialogues == [str(tmp_path / "data" / "demonstrations.jsonl")]  # type: ignore[attr-defined]
    assert config.held_out == [str(tmp_path / "data" / "held_out_dialogues.jsonl")]  # type: ignore[attr-defined]
    assert Path(settings.base_model.path).is_dir()
    data = read_mapping(file)["data"]
    assert data["demonstrations"]["limit"] <= data["held_out_dialogues"]["offset"]


@pytest.mark.parametrize("stage", ["rejection_sampling", "ppo"])
def test_recipes_on_reward_models_of_another_run_are_valid(
    stage: str, inputs_there: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """{rejection_sampling,ppo}.yaml of smollm2-135m: reward models of a run of reward.yaml, new questions to judge."""
    folder = RECIPES / "smollm2-135m"
    reward = load_recipe(str(folder / "reward.yaml"))
    monkeypatch.setenv("LLAMA2_CHAT_REWARD_RUN", str(tmp_path / "run"))
    make_model_folders(tmp_path / "run", reward.stages)
    recipe = load_recipe(str(folder / f"{stage}.yaml"))
    assert sorted(recipe.head.models) == sorted(reward.stages)
    assert [recipe.kind_of(name) for name in recipe.stages] == [stage]
    held_out = recipe.data["held_out_prompts"]
    assert isinstance(held_out, ImportedData)
    shares = {entry.held_out_share for entry in reward.data.values() if isinstance(entry, ImportedData)}
    assert (held_out.split, {held_out.held_out_share}) == ("held_out", shares)


def test_rejection_sampling_on_real_prompts_samples_64(
    inputs_there: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """recipes/smollm2-135m/rejection_sampling.yaml: 48 helpful and 16 harmful prompts."""
    monkeypatch.setenv("LLAMA2_CHAT_REWARD_RUN", str(tmp_path / "run"))
    make_model_folders(tmp_path / "run", ["helpfulness_rm", "safety_rm"])
    recipe = load_recipe(str(RECIPES / "smollm2-135m" / "rejection_sampling.yaml"))
    limits = [recipe.data[name].limit for name in ("helpful_prompts", "harmful_prompts")]  # type: ignore[union-attr]
    assert sum(limits) == 64


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("smollm2-135m", ["helpfulness_rm", "safety_rm"]),
        ("stories260k", ["sft", "helpfulness_rm", "safety_rm"]),
    ],
)
def test_reward_models_of_real_pairs_hold_out_whole_questions(
    name: str, stages: list[str], inputs_there: None, tmp_path: Path
) -> None:
    """recipes/*/reward.yaml: no held-out pair begins with a message that anything is trained on begins with."""
    recipe = load_recipe(str(RECIPES / name / "reward.yaml"))
    assert list(recipe.stages) == stages
    first: dict[str, set[str]] = {}
    for entry in recipe.data:
        file = prepare_data(recipe, entry, tmp_path, EventLog(tmp_path / "events.jsonl"))
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        first[entry] = {(row.get("prompt") or row["messages"])[0]["content"] for row in rows}
    trained, held_out = (
        {
            entry
            for stage in recipe.stages.values()
            for key, names in stage.model_dump().items()
            if key in keys
            for entry in names
        }
        for keys in (("preferences", "dialogues"), ("held_out",))
    )
    assert trained | held_out == set(first)
    assert len(trained) == len(stages)
    assert len(held_out) == 2
    for ours in held_out:
        assert len(first[ours]) > 350
        assert all(not first[ours] & first[theirs] for theirs in trained)


def test_iterations_of_the_test_world_are_the_papers_schedule() -> None:
    """recipes/tiny/iterations.yaml: as many stages as it says, and no version is optimised against the third model."""
    file = RECIPES / "tiny" / "iterations.yaml"
    recipe = load_recipe(str(file))
    assert f"(its {len(recipe.stages)} stages)" in file.read_text(encoding="utf-8")
    policies = [name for name in recipe.stages if "rejection" in name or "ghost" in name or "ppo" in name]
    assert policies == [
        *("v1_rejection_sampling", "v2_rejection_sampling", "v3_rejection_sampling", "v3_ghost_attention"),
        *("v4_rejection_sampling", "v5_rejection_sampling", "v5_ppo"),
    ]
    judges = {recipe.stages[name].model_dump().get("helpfulness") for name in policies}
    assert judges == {None, *(f"v{number}_helpfulness_rm" for number in range(1, 6))}
    assert recipe.evaluation is not None
    assert (recipe.evaluation.helpfulness, recipe.evaluation.independent) == (
        "v5_helpfulness_rm",
        "independent_rm",
    )
    # The command in its head: without new pairs.
    without = [
        "iterations.preferences=null",
        "evaluation.helpfulness=helpfulness_rm",
        "evaluation.safety=safety_rm",
    ]
    assert all(change in file.read_text(encoding="utf-8") for change in without)
    assert not [name for name in load_recipe(str(file), without).stages if "pairs" in name]


def test_clean_sft_is_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """recipes/tiny/clean_sft.yaml: its plan has the two policies and the judge, and the two differ in data alone."""
    file = RECIPES / "tiny" / "clean_sft.yaml"
    assert run_command(["run", str(file), "--dry-run", "--output-dir", str(tmp_path / "out")]) == 0
    plan = capsys.readouterr().out
    assert all(f"{stage} " in plan for stage in ("noisy", "clean", "helpfulness_rm"))
    recipe = load_recipe(str(file))
    assert different(recipe, "noisy", "clean") == {"dialogues"}
    many, few = recipe.data["many_noisy"], recipe.data["few_clean"]
    assert few.rows * 6 == many.rows  # type: ignore[union-attr]
    assert not (tmp_path / "out").exists()


def test_sampling_yaml_is_valid() -> None:
    """recipes/tiny/sampling.yaml: the two second versions differ in what is selected from alone."""
    recipe = load_recipe(str(RECIPES / "tiny" / "sampling.yaml"))
    assert different(recipe, "v2_last", "v2_pool") == {"pool"}


def test_reward_models_differ_in_what_is_compared_alone() -> None:
    """recipes/tiny/reward_models.yaml: margins, safety loss; three seeds."""
    runs = load_runs(str(RECIPES / "tiny" / "reward_models.yaml"), [])
    assert [recipe.head.seed for _, recipe in runs] == [0, 1, 2]
    recipe = runs[0][1]
    margins = ["helpfulness_no_margin", "helpfulness_small_margin", "helpfulness_large_margin"]
    safety = ["safety_without_loss", "safety_with_loss"]
    assert list(recipe.stages) == ["sft", *margins, *safety]
    assert [recipe.stages[name].model_dump()["margin"] for name in margins] == ["none", "small", "large"]
    assert (
        different(recipe, margins[0], margins[1]) == different(recipe, margins[0], margins[2]) == {"margin"}
    )
    assert different(recipe, *safety) == {"safety_loss_weight"}


def test_reward_scaling_varies_size_and_pairs_alone() -> None:
    """recipes/tiny/reward_scaling.yaml: each size with each number of pairs; three seeds."""
    runs = load_runs(str(RECIPES / "tiny" / "reward_scaling.yaml"), [])
    assert [recipe.head.seed for _, recipe in runs] == [0, 1, 2]
    recipe = runs[0][1]
    sizes = {"small": "small_base", "embedded": "base"}
    counts = [625, 1250, 2500, 5000, 10000]
    assert len(recipe.stages) == 1 + len(sizes) * (1 + len(counts))
    for size, base in sizes.items():
        sft = recipe.stages[f"{size}_sft"].model_dump()
        assert sft == recipe.stages["small_sft"].model_dump() | {"model": base}
        for count in counts:
            stage = recipe.stages[f"{size}_{count}"].model_dump()
            own = {"model": f"{size}_sft", "preferences": [f"pairs_{count}"]}
            assert stage == recipe.stages["small_625"].model_dump() | own
            assert recipe.data[f"pairs_{count}"].rows == count  # type: ignore[union-attr]
    text = yaml.safe_load((RECIPES / "tiny" / "pretrain.yaml").read_text())
    made, known = recipe.stages["small_base"].model_dump(), text["stages"]["tiny-base"]
    assert recipe.data["text"].rows == text["data"]["text"]["rows"]  # type: ignore[union-attr]
    assert made["training"].items() >= {key: float(value) for key, value in known["training"].items()}.items()
    fixed = known["architecture"].keys() - {"hidden_size", "layers"}
    assert all(made["architecture"][key] == known["architecture"][key] for key in fixed)


def test_the_arms_of_context_distillation_differ_in_the_filters_alone() -> None:
    """recipes/tiny/context_distillation.yaml: templates, reward model's filter, prompts; RLHF in its prompts."""
    recipe = load_recipe(str(RECIPES / "tiny" / "context_distillation.yaml"))
    assert different(recipe, "without_templates", "targeted") == {"category_templates", "compare_preprompts"}
    assert different(recipe, "without_reward_model", "without_templates") == {"keep"}
    assert different(recipe, "all_prompts", "without_templates") == {"only_adversarial"}
    assert different(recipe, "untargeted", "without_templates") == {"keep", "only_adversarial"}
    assert different(recipe, "rlhf_with_adversarial", "rlhf_without_adversarial") == {"prompts"}
    assert recipe.stages["targeted"].model_dump()["category_templates"] == ANSWER_TEMPLATES
    assert len(load_runs(str(RECIPES / "tiny" / "context_distillation.yaml"), [])) == 3


def test_safety_scaling_differs_in_the_share_of_safety_data_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """recipes/tiny/safety_scaling.yaml: the paper's six shares on three seeds, judged by the other recipe's models."""
    judges = list(load_recipe(str(RECIPES / "tiny" / "context_distillation.yaml")).stages)[1:3]
    monkeypatch.setenv("LLAMA2_CHAT_JUDGES", str(tmp_path))
    make_model_folders(tmp_path, judges, first=2)
    runs = load_runs(str(RECIPES / "tiny" / "safety_scaling.yaml"), [])
    found = [(recipe.head.seed, recipe.stages["sft"].model_dump()["weights"]) for _, recipe in runs]
    shares = (0, 0.01, 0.1, 0.25, 0.5, 1)
    assert found == [(seed, [1, share]) for seed in (0, 1, 2) for share in shares]
    assert sorted(runs[0][1].head.models) == sorted(judges)
