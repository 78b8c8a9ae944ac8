"""The examples in the documentation are valid and name what exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from llama2_chat.cli.main import app, run_command
from llama2_chat.pipeline.data import prepare_data
from llama2_chat.pipeline.recipe import Recipe, load_recipe, packaged_recipes
from llama2_chat.pipeline.stage_config import load_stage_config
from llama2_chat.pipeline.sweep import load_runs
from llama2_chat.pipeline.yaml_files import read_mapping
from llama2_chat.ppo.config import PpoConfig
from llama2_chat.settings import ServedSamplingConfig, VllmConfig
from llama2_chat.stage import EventLog
from llama2_chat.testbed.wording import ANSWER_TEMPLATES

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        *(ROOT / "README.md", ROOT / "CONTRIBUTING.md"),
        *(*ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("recipes/*/README.md")),
    ]
)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_the_example_of_a_server_that_samples_is_valid() -> None:
    (example,) = blocks(ROOT / "docs" / "sampling.md", "yaml")
    given = yaml.safe_load(example)["sampling"]
    sampling = ServedSamplingConfig.model_validate(given, strict=True)
    assert sampling.backend == "vllm"
    assert set(given["vllm"]) == set(VllmConfig.model_fields)


def test_the_example_recipe_is_valid(tmp_path: Path) -> None:
    example, iterations = blocks(ROOT / "docs" / "pipeline.md", "yaml")
    (tmp_path / "base").mkdir()
    file = tmp_path / "example.yaml"
    file.write_text(example)
    recipe = load_recipe(str(file))
    stages = ["sft", "helpfulness_rm", "rejection_sampling"]
    assert list(recipe.stages) == stages
    assert yaml.safe_load(example)["name"] == recipe.head.name == "example"
    file.write_text(example + iterations)
    later = [
        stage
        for number in range(2, 6)
        for stage in (
            f"v{number}_helpfulness_pairs",
            f"v{number}_helpfulness_rm",
            f"v{number}_rejection_sampling",
        )
    ]
    assert list(load_recipe(str(file)).stages) == [*stages, "v1_rejection_sampling", *later, "v5_ppo"]


def test_iterations_of_the_test_world_are_the_papers_schedule() -> None:
    """recipes/tiny/iterations.yaml: as many stages as it says, and no version is optimised against the third model."""
    file = ROOT / "recipes" / "tiny" / "iterations.yaml"
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


SFT_EXAMPLE = "counts: [100, 60] "


def test_the_example_of_several_data_sets_runs(tmp_path: Path) -> None:
    """sft/README.md: what its comments say of the mix is what comes out, with counts and with weights."""
    (example,) = blocks(ROOT / "sft" / "README.md", "yaml")
    assert SFT_EXAMPLE in example
    (tmp_path / "base").symlink_to(ROOT / "recipes" / "tiny" / "base")
    (tmp_path / "counts.yaml").write_text(example)
    by_weight = example.replace(SFT_EXAMPLE, "# counts ").replace("# weights: [", "weights: [")
    (tmp_path / "weights.yaml").write_text(by_weight)
    found = {}
    for name in ("counts", "weights"):
        arguments = ["sft", str(tmp_path / f"{name}.yaml"), "training.max_steps=1"]
        assert run_command([*arguments, "--output-dir", str(tmp_path / name)]) == 0
        found[name] = json.loads((tmp_path / name / "done.json").read_text())["metrics"]
    used = {name: [row["used"] for row in metrics["mix"]] for name, metrics in found.items()}
    assert used == {"counts": [100, 60], "weights": [60, 80]}
    assert [row["safety"] for row in found["counts"]["mix"]] == [0, 60]
    assert [row["file"] for row in found["counts"]["mix"]] == ["helpful.jsonl", "safety.jsonl"]
    text = (ROOT / "sft" / "README.md").read_text(encoding="utf-8")
    assert [key for key in found["counts"]["mix"][0] if f"`{key}`" not in text] == ["file"]
    assert {"before", "after", "files", "lengths"} <= set(found["counts"]["held_out"])


@pytest.fixture
def inputs_there(data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data that recipes name, and in place of the model that `make smollm2-135m` fetches an empty file."""
    monkeypatch.setenv("LLAMA2_CHAT_DATA", str(data_folder))
    monkeypatch.setenv("LLAMA2_CHAT_MODELS", str(tmp_path))
    (tmp_path / "smollm2-135m").mkdir()
    (tmp_path / "smollm2-135m" / "SmolLM2-135M-Instruct.Q4_1.gguf").touch()


@pytest.mark.parametrize("name", ["smollm2-135m", "stories260k"])
def test_single_stage_configurations_are_valid(name: str, inputs_there: None, tmp_path: Path) -> None:
    """recipes/*/sft.yaml: loaded as the command loads them, with rows for training and rows held out apart."""
    file = ROOT / "recipes" / name / "sft.yaml"
    config, settings = load_stage_config(file, "sft", made_data=tmp_path / "data")
    assert config.dialogues == [str(tmp_path / "data" / "demonstrations.jsonl")]  # type: ignore[attr-defined]
    assert config.held_out == [str(tmp_path / "data" / "held_out_dialogues.jsonl")]  # type: ignore[attr-defined]
    assert Path(settings.base_model.path).is_dir()
    data = read_mapping(file)["data"]
    assert data["demonstrations"]["limit"] <= data["held_out_dialogues"]["offset"]


def test_ppo_alone_is_valid(inputs_there: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """recipes/smollm2-135m/ppo.yaml: loaded as the command loads it, with the reward models of a run of reward.yaml."""
    reward_recipe = load_recipe(str(ROOT / "recipes" / "smollm2-135m" / "reward.yaml"))
    run = tmp_path / "run"
    for number, stage in enumerate(reward_recipe.stages, start=1):
        (run / "stages" / f"{number:02}-{stage}" / "model").mkdir(parents=True)
    monkeypatch.setenv("LLAMA2_CHAT_REWARD_RUN", str(run))
    file = ROOT / "recipes" / "smollm2-135m" / "ppo.yaml"
    config, settings = load_stage_config(file, "ppo", made_data=tmp_path / "data")
    assert isinstance(config, PpoConfig)
    assert config.policy == settings.base_model.path
    assert config.helpfulness == str(run / "stages" / "01-helpfulness_rm" / "model")
    assert config.safety == str(run / "stages" / "02-safety_rm" / "model")
    assert config.training.lora is not None
    names = ("prompts", "adversarial_prompts")
    assert config.prompts == [str(tmp_path / "data" / f"{name}.jsonl") for name in names]


def test_clean_sft_is_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """recipes/tiny/clean_sft.yaml: its plan has the two policies and the judge, and the two differ in data alone."""
    file = ROOT / "recipes" / "tiny" / "clean_sft.yaml"
    assert run_command(["run", str(file), "--dry-run", "--output-dir", str(tmp_path / "out")]) == 0
    plan = capsys.readouterr().out
    assert all(f"{stage} " in plan for stage in ("noisy", "clean", "helpfulness_rm"))
    recipe = load_recipe(str(file))
    noisy, clean = (recipe.stages[name].model_dump() for name in ("noisy", "clean"))
    assert {key for key in noisy if noisy[key] != clean[key]} == {"dialogues"}
    many, few = recipe.data["many_noisy"], recipe.data["few_clean"]
    assert few.rows * 6 == many.rows  # type: ignore[union-attr]
    assert not (tmp_path / "out").exists()


def different(recipe: Recipe, one: str, other: str) -> set[str]:
    """The keys in which two stages differ."""
    ours, theirs = (recipe.stages[name].model_dump() for name in (one, other))
    return {key for key in ours if ours[key] != theirs[key]}


def test_reward_models_differ_in_what_is_compared_alone() -> None:
    """recipes/tiny/reward_models.yaml: margins, safety loss; three seeds."""
    runs = load_runs(str(ROOT / "recipes" / "tiny" / "reward_models.yaml"), [])
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
    runs = load_runs(str(ROOT / "recipes" / "tiny" / "reward_scaling.yaml"), [])
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
    text = yaml.safe_load((ROOT / "recipes" / "tiny" / "pretrain.yaml").read_text())
    made, known = recipe.stages["small_base"].model_dump(), text["stages"]["tiny-base"]
    assert recipe.data["text"].rows == text["data"]["text"]["rows"]  # type: ignore[union-attr]
    assert made["training"].items() >= {key: float(value) for key, value in known["training"].items()}.items()
    fixed = known["architecture"].keys() - {"hidden_size", "layers"}
    assert all(made["architecture"][key] == known["architecture"][key] for key in fixed)


def test_the_example_of_several_sources_runs(tmp_path: Path) -> None:
    (example,) = blocks(ROOT / "pretrain" / "README.md", "yaml")
    file = tmp_path / "two-sources.yaml"
    file.write_text(example)
    assert run_command(["run", str(file), "--output-dir", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    web, books = summary["stages"]["small-base"]["sources"]
    assert (web["documents"], books["documents"]) == (1500, 300)
    assert (web["share"], books["share"]) == pytest.approx((0.6, 0.4), abs=2e-3)
    assert web["epochs"] < 1 < 2 < books["epochs"]


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
    recipe = load_recipe(str(ROOT / "recipes" / name / "reward.yaml"))
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


def test_the_example_of_a_custom_reward_runs(tmp_path: Path) -> None:
    """reward/README.md: the kept answers are the shortest of their prompts' complete ones."""
    page = ROOT / "reward" / "README.md"
    (module,), (recipe,) = blocks(page, "python"), blocks(page, "yaml")
    (tmp_path / "base").symlink_to(ROOT / "recipes" / "tiny" / "base")
    (tmp_path / "my_rewards.py").write_text(module)
    file = tmp_path / "brief.yaml"
    file.write_text(recipe)
    assert run_command(["run", str(file), "--output-dir", str(tmp_path / "run")]) == 0
    stage = tmp_path / "run" / "stages" / "02-rejection_sampling"
    samples = [json.loads(line) for line in (stage / "samples.jsonl").read_text().splitlines()]
    complete: dict[str, list[int]] = {}
    for row in samples:
        length = len(row["response"])
        assert row["scores"]["helpfulness"] == pytest.approx(1 - length / 100, abs=1e-6)
        if row["status"] == "complete":
            complete.setdefault(json.dumps(row["prompt"]), []).append(length)
    kept = [json.loads(line)["messages"] for line in (stage / "dataset.jsonl").read_text().splitlines()]
    assert len(kept) == len(complete) >= 10
    for messages in kept:
        assert len(messages[-1]["content"]) == min(complete[json.dumps(messages[:-1])])
    assert any(len(set(lengths)) > 1 for lengths in complete.values())


def test_python_examples_compile() -> None:
    found = [block for page in PAGES for block in blocks(page, "python")]
    for block in found:
        compile(block, "example", "exec")
    assert len(found) >= 1


def test_links_lead_somewhere() -> None:
    checked = 0
    for page in PAGES:
        prose = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#:]+)\)", prose):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
            checked += 1
    assert checked > 15


def test_rejection_sampling_on_real_prompts_is_valid(
    inputs_there: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """recipes/smollm2-135m/rejection_sampling.yaml: its reward models are those of a run of reward.yaml."""
    folder = ROOT / "recipes" / "smollm2-135m"
    stages = list(load_recipe(str(folder / "reward.yaml")).stages)
    monkeypatch.setenv("LLAMA2_CHAT_REWARD_RUN", str(tmp_path / "run"))
    for number, name in enumerate(stages, start=1):
        (tmp_path / "run" / "stages" / f"{number:02}-{name}" / "model").mkdir(parents=True)
    recipe = load_recipe(str(folder / "rejection_sampling.yaml"))
    assert sorted(recipe.head.models) == sorted(stages)
    limits = [recipe.data[name].limit for name in ("helpful_prompts", "harmful_prompts")]  # type: ignore[union-attr]
    assert sum(limits) == 64


def test_sampling_yaml_is_valid() -> None:
    """recipes/tiny/sampling.yaml: the two second versions differ in what is selected from alone."""
    recipe = load_recipe(str(ROOT / "recipes" / "tiny" / "sampling.yaml"))
    last, pool = (recipe.stages[name].model_dump() for name in ("v2_last", "v2_pool"))
    assert {key for key in last if last[key] != pool[key]} == {"pool"}


def test_the_arms_of_context_distillation_differ_in_the_filters_alone() -> None:
    """recipes/tiny/context_distillation.yaml: templates, reward model's filter, prompts; RLHF in its prompts."""
    recipe = load_recipe(str(ROOT / "recipes" / "tiny" / "context_distillation.yaml"))
    stages = {name: stage.model_dump() for name, stage in recipe.stages.items()}

    def changed(ours: str, other: str) -> set[str]:
        return {key for key in stages[ours] if stages[ours][key] != stages[other][key]}

    assert changed("without_templates", "targeted") == {"category_templates", "compare_preprompts"}
    assert changed("without_reward_model", "without_templates") == {"keep"}
    assert changed("all_prompts", "without_templates") == {"only_adversarial"}
    assert changed("untargeted", "without_templates") == {"keep", "only_adversarial"}
    assert changed("rlhf_with_adversarial", "rlhf_without_adversarial") == {"prompts"}
    assert stages["targeted"]["category_templates"] == ANSWER_TEMPLATES
    assert len(load_runs(str(ROOT / "recipes" / "tiny" / "context_distillation.yaml"), [])) == 3


def test_safety_scaling_differs_in_the_share_of_safety_data_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """recipes/tiny/safety_scaling.yaml: the paper's six shares on three seeds, judged by the other recipe's models."""
    judges = list(load_recipe(str(ROOT / "recipes" / "tiny" / "context_distillation.yaml")).stages)[1:3]
    monkeypatch.setenv("LLAMA2_CHAT_JUDGES", str(tmp_path))
    for number, name in enumerate(judges, start=2):
        (tmp_path / "stages" / f"{number:02}-{name}" / "model").mkdir(parents=True)
    runs = load_runs(str(ROOT / "recipes" / "tiny" / "safety_scaling.yaml"), [])
    found = [(recipe.head.seed, recipe.stages["sft"].model_dump()["weights"]) for _, recipe in runs]
    shares = (0, 0.01, 0.1, 0.25, 0.5, 1)
    assert found == [(seed, [1, share]) for seed in (0, 1, 2) for share in shares]
    assert sorted(runs[0][1].head.models) == sorted(judges)


def test_commands_that_are_named_exist() -> None:
    import typer

    known = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    named = set()
    for page in PAGES:
        named |= set(re.findall(r"llama2-chat ([a-z][a-z-]+)\b", page.read_text(encoding="utf-8")))
    assert len(named & known) >= 8
    assert not {name for name in named - known if name not in {"is", "has", "with"}}


@pytest.mark.parametrize("name", ["smollm2-135m", "stories260k", "tiny"])
def test_packaged_recipes_are_valid(name: str, inputs_there: None) -> None:
    assert name in packaged_recipes()
    assert "rejection_sampling" in load_recipe(name).stages
