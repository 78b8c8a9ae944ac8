"""The recipes of Llama 2's own sizes: every number of the paper that they carry, and that they are whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama2_chat.cli.main import run_command
from llama2_chat.dialogue import RATINGS
from llama2_chat.errors import RecipeError
from llama2_chat.pipeline.estimates import named_parameter_count
from llama2_chat.pipeline.recipe import Recipe, find_recipe, load_recipe, packaged_recipes
from llama2_chat.pipeline.yaml_files import read_mapping
from llama2_chat.reward.loss import rating_margins

SIZES = ["llama2-7b", "llama2-13b", "llama2-34b", "llama2-70b"]
STAGES = [
    *("sft", "helpfulness_rm", "safety_rm"),
    *("v1", "v2", "v3", "ghost_attention", "v4", "v5", "ppo", "context_distillation"),
]
OF_THE_70B = {
    **{f"v{number}": f"v{number}_rejection_sampling" for number in range(1, 6)},
    **{"ghost_attention": "v3_ghost_attention", "ppo": "v5_ppo"},
}
"""Its iterations give its stages names of their own."""
BETA = {"llama2-7b": 0.01, "llama2-13b": 0.01, "llama2-34b": 0.005, "llama2-70b": 0.005}
REWARD_RATE = {"llama2-7b": 1e-5, "llama2-13b": 1e-5, "llama2-34b": 1e-5, "llama2-70b": 5e-6}

# §3.2.2: all of the domain's own pairs; as many others, or 10 % helpfulness pairs.
MIXES = {
    "helpfulness": (["helpfulness_pairs"], ["safety_pairs", "harmless_pairs", "open_helpfulness_pairs"], 0.5),
    "safety": (["safety_pairs", "harmless_pairs"], ["helpfulness_pairs", "open_helpfulness_pairs"], 0.1),
}


def make_data(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that a user supplies, where the two variables say that they are."""
    monkeypatch.setenv("LLAMA2_CHAT_DATA", str(folder))
    monkeypatch.setenv("LLAMA2_70B_RUN", str(folder / "run"))
    for entry in read_mapping(find_recipe(name))["data"].values():
        assert Path(entry).is_relative_to(folder)
        Path(entry).parent.mkdir(parents=True, exist_ok=True)
        Path(entry).write_text('{"prompt": "six words in a row here"}\n' * 50)


def stage_of(name: str, stage: str) -> str:
    """What a recipe calls a stage of `STAGES`."""
    return OF_THE_70B.get(stage, stage) if name == "llama2-70b" else stage


@pytest.fixture(params=SIZES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    make_data(name, tmp_path, monkeypatch)
    return load_recipe(name)


def test_the_four_are_packaged() -> None:
    assert [name for name in packaged_recipes() if name.startswith("llama2-")] == sorted(SIZES)


def test_the_whole_line_stands_in_order(recipe: Recipe, name: str) -> None:
    stages = [stage_of(name, stage) for stage in STAGES]
    assert list(recipe.stages) == stages
    assert recipe.head.name == name
    assert (recipe.head.precision, recipe.head.chat_format) == ("bfloat16", "llama2")
    ghost, v4, v5, ppo, distilled = (recipe.stages[stage] for stage in stages[6:])
    assert ghost.policy == stage_of(name, "v3")
    assert (ppo.policy, ppo.reference) == (stage_of(name, "v5"), None)
    assert distilled.policy == stage_of(name, "ppo")
    # Ghost Attention would be lost if the versions after it started from the base.
    if name == "llama2-70b":
        assert (v4.policy, v4.start_from) == ("v3_ghost_attention", "policy")
        assert (v5.policy, v5.start_from) == ("v4_rejection_sampling", "policy")
    else:
        assert (v4.model, v5.model) == ("ghost_attention", "v4")


def test_supervised_fine_tuning(recipe: Recipe, name: str) -> None:
    # §3.1; every fine-tuning on made data is as in SFT (§3.2.3).
    names = [stage for stage in STAGES if stage not in ("helpfulness_rm", "safety_rm", "ppo")]
    assert len(names) == 8
    for stage in names:
        training = recipe.stages[stage_of(name, stage)].training
        assert training.learning_rate == 2e-5
        assert training.batch_size == 64
        assert training.sequence_length == 4096
        assert training.epochs == 2
        assert training.weight_decay == 0.1
        assert_optimiser_of_the_base(training)


def assert_optimiser_of_the_base(training) -> None:
    # §2.2: AdamW 0.9/0.95, eps 1e-5, gradient clipping 1.0.
    assert (training.adam_beta1, training.adam_beta2, training.adam_epsilon) == (0.9, 0.95, 1e-5)
    assert training.max_grad_norm == 1.0
    assert training.weight_decay == 0.1
    assert training.gradient_checkpointing
    assert getattr(training, "lora", None) is None


def test_reward_models(recipe: Recipe, name: str) -> None:
    # §3.2.2 and Table 27.
    for stage, domain, weight in (("helpfulness_rm", "helpfulness", 0.0), ("safety_rm", "safety", 1.0)):
        config = recipe.stages[stage]
        assert (config.model, config.domain, config.safety_weight) == ("sft", domain, weight)
        margins = rating_margins(list(RATINGS), table=config.margin).tolist()
        assert margins == pytest.approx([1, 2 / 3, 1 / 3, 0], abs=1e-6)
        own, others, share = MIXES[domain]
        assert (config.preferences, config.other_preferences) == (own, others)
        assert config.share_of_others == share
        training = config.training
        assert training.learning_rate == REWARD_RATE[name]
        assert training.batch_size == 512
        assert training.epochs == 1
        assert training.min_learning_rate_ratio == 0.1
        assert (training.warmup_ratio, training.min_warmup_steps) == (0.03, 5)
        assert_optimiser_of_the_base(training)


def test_rejection_sampling_of_the_70b(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # §3.2.3: 10 to 100 samples at a temperature in [1.2, 1.3]; the gate at 0.15.
    make_data("llama2-70b", tmp_path, monkeypatch)
    recipe = load_recipe("llama2-70b")
    policies = ["sft", *(stage_of("llama2-70b", stage) for stage in ("v1", "v2", "ghost_attention", "v4"))]
    for number, policy in enumerate(policies, start=1):
        config = recipe.stages[f"v{number}_rejection_sampling"]
        assert (config.kind, config.iteration, config.policy) == ("rejection_sampling", number, policy)
        earlier = [f"v{before}_rejection_sampling.samples" for before in range(1, number)]
        assert config.earlier_samples == earlier
        assert config.start_from == ("base" if number <= 3 else "policy")
        assert 10 <= config.samples_per_prompt <= 100
        assert 1.2 <= config.sampling.temperature <= 1.3
        assert config.safety_threshold == 0.15
        # Up to V3 the version's own samples alone, then the best of all prior versions.
        assert config.uses_earlier == (number >= 4)
        assert config.pool == ("last_iteration" if number in (2, 3) else "best_of_all")


@pytest.mark.parametrize("name", SIZES[:3], indirect=True)
def test_the_others_are_trained_on_what_the_70b_kept(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_data("llama2-70b", tmp_path, monkeypatch)
    large = list(load_recipe("llama2-70b").stages)
    for number in range(1, 6):
        config = recipe.stages[f"v{number}"]
        assert (config.kind, config.dialogues) == ("sft", [f"samples_v{number}", "demonstrations"])
        # The file lies where a run of the 70B's recipe puts it.
        stage = f"v{number}_rejection_sampling"
        folder = f"{large.index(stage) + 1:02d}-{stage}"
        assert recipe.data[f"samples_v{number}"].path.endswith(f"stages/{folder}/dataset.jsonl")


def test_ghost_attention(recipe: Recipe, name: str) -> None:
    # §3.3, A.3.5: only the last answer is trained; half of the instructions are shortened.
    config = recipe.stages[stage_of(name, "ghost_attention")]
    assert config.loss_policy == "last_answer"
    assert config.short_fraction == 0.5


def test_ppo(recipe: Recipe, name: str) -> None:
    # §3.2.3.
    config = recipe.stages[stage_of(name, "ppo")]
    assert config.kl_coefficient == BETA[name]
    assert (config.clip_range, config.safety_threshold) == (0.2, 0.15)
    assert config.whiten_scores == "batch"
    training = config.training
    assert training.learning_rate == 1e-6
    assert (training.batch_size, training.mini_batch_size, training.epochs_per_batch) == (512, 64, 1)
    assert 200 <= training.iterations <= 400
    # Early stopping on prompts that nothing else is measured on.
    assert config.stopping is not None
    assert not {*config.held_out} & {*recipe.evaluation.prompts, *recipe.evaluation.safety_prompts}
    assert_optimiser_of_the_base(training)


def test_context_distillation(recipe: Recipe) -> None:
    # §4.2.4: adversarial prompts alone, kept where the safety model prefers the answer.
    config = recipe.stages["context_distillation"]
    assert (config.prompts, config.keep) == (["adversarial_prompts"], "better")


def test_what_the_user_must_supply_is_named(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("LLAMA2_CHAT_DATA", str(tmp_path))
    monkeypatch.delenv("LLAMA2_70B_RUN", raising=False)
    with pytest.raises(RecipeError) as raised:
        load_recipe(name)
    lines = str(raised.value).splitlines()[1:]
    assert len(lines) == (14 if name == "llama2-70b" else 19)
    assert all("no such file: " in line for line in lines)
    assert f"data.demonstrations.path: no such file: {tmp_path}/demonstrations.jsonl" in str(raised.value)


def test_the_plan_estimates_every_stage_from_the_name_of_the_base(
    recipe: Recipe, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = named_parameter_count(recipe.head.base_model.path)
    assert size == int(name.removeprefix("llama2-").removesuffix("b")) * 10**9
    assert run_command(["run", name, "--dry-run", "--output-dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "unknown" not in printed
    assert "warning" not in printed
    assert f"taken for a model of {size / 1e6:,.0f} million parameters" in printed


@pytest.mark.parametrize(
    ("name", "override", "advice"),
    [
        ("llama2-7b", "stages.ppo.kl_coefficient=0.005", "set 0.01"),
        ("llama2-13b", "stages.ppo.kl_coefficient=0.005", "set 0.01"),
        ("llama2-34b", "stages.ppo.kl_coefficient=0.01", "set 0.005"),
        ("llama2-70b", "iterations.ppo.kl_coefficient=0.01", "set 0.005"),
        ("llama2-34b", "stages.safety_rm.training.learning_rate=5e-6", "set 1e-05"),
        ("llama2-70b", "stages.safety_rm.training.learning_rate=1e-5", "set 5e-06"),
    ],
)
def test_a_value_of_another_size_is_warned_of(
    name: str, override: str, advice: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    make_data(name, tmp_path, monkeypatch)
    assert run_command(["run", name, override, "--dry-run", "--output-dir", str(tmp_path / "out")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("warning:") == 1
    key = override.partition("=")[0].replace("iterations.ppo", "stages.v5_ppo")
    assert f"warning: {key}" in printed
    assert advice in printed


def test_a_value_of_ones_own_is_not(tmp_path: Path, monkeypatch, capsys) -> None:
    make_data("llama2-70b", tmp_path, monkeypatch)
    override = "iterations.ppo.kl_coefficient=0.02"
    arguments = ["run", "llama2-70b", override, "--dry-run", "--output-dir", str(tmp_path / "out")]
    assert run_command(arguments) == 0
    assert "warning" not in capsys.readouterr().out
