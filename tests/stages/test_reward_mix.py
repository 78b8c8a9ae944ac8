"""The reward stage with pairs of other domains: from a recipe's text to what was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from llama2_chat.cli.main import run_command
from llama2_chat.pipeline.plan import make_plan
from llama2_chat.pipeline.recipe import load_recipe
from llama2_chat.pipeline.run import Selection
from llama2_chat.reward.config import RewardConfig
from llama2_chat.reward.train import run_stage

TRAINING = {"learning_rate": 1e-3, "batch_size": 64, "epochs": 1, "sequence_length": 128}


@pytest.fixture(scope="module")
def reward_config(world: Path):
    def make(**changes) -> RewardConfig:
        values = {
            "model": str(world / "base"),
            "preferences": [str(world / "safety_pairs.jsonl")],
            "other_preferences": [str(world / "helpful_pairs.jsonl"), str(world / "held_out.jsonl")],
            "domain": "safety",
            "training": TRAINING,
            **changes,
        }
        return RewardConfig(**values)

    return make


def warnings(directory) -> list[str]:
    events = [json.loads(line) for line in directory.events.path.read_text().splitlines()]
    return [event["message"] for event in events if event["event"] == "warning"]


def test_a_tenth_of_the_training_set_of_a_safety_model_is_drawn(reward_config, settings, stage_at) -> None:
    directory = stage_at("mixed-rm")
    metrics = run_stage(reward_config(), settings, directory)
    own, *others = metrics["pairs_by_file"]
    assert (own["file"], own["kept"], own["drawn"]) == ("safety_pairs.jsonl", 300, 300)
    assert [row["kept"] for row in others] == [300, 200]
    drawn = sum(row["drawn"] for row in others)
    assert drawn == 33  # 300 / 9
    assert metrics["pairs"]["kept"] == 800
    assert metrics["pairs"]["drawn"] == 333
    assert metrics["other_share"] == {"asked": 0.1, "drawn": pytest.approx(33 / 333, rel=1e-12)}
    assert sum(row["share"] for row in metrics["pairs_by_file"]) == pytest.approx(1, rel=1e-12)
    assert metrics["steps"] == 6  # 333 pairs, 64 a step
    assert warnings(directory) == []
    again = run_stage(reward_config(), settings, stage_at("mixed-rm-again"))
    assert again == metrics
    other = run_stage(
        reward_config(), settings.model_copy(update={"seed": 2}), stage_at("mixed-rm-other-seed")
    )
    assert other["loss_first"] != metrics["loss_first"]


def test_the_draw_is_made_from_usable_pairs(reward_config, settings, stage_at) -> None:
    """At 24 tokens most pairs do not fit: what is drawn is a share of what is left."""
    training = TRAINING | {"sequence_length": 24, "max_steps": 1}
    metrics = run_stage(reward_config(other_share=0.25, training=training), settings, stage_at("short-mix"))
    own, *others = metrics["pairs_by_file"]
    assert 0 < own["drawn"] == own["kept"] < 300
    assert [row["kept"] + sum(row["dropped"].values()) for row in metrics["pairs_by_file"]] == [300, 300, 200]
    assert sum(row["drawn"] for row in others) == round(own["kept"] / 3)
    assert all(row["drawn"] <= row["kept"] for row in others)


def test_too_few_others_are_warned_of(reward_config, settings, stage_at) -> None:
    directory = stage_at("poor-mix")
    config = reward_config(other_share=0.9, training=TRAINING | {"max_steps": 1})
    metrics = run_stage(config, settings, directory)
    assert metrics["other_share"] == {"asked": 0.9, "drawn": 500 / 800}
    (message,) = warnings(directory)
    assert "hold 500 usable pairs, fewer than the 2,700 that a share of 0.9 takes" in message
    assert "0.625 of the training set" in message


@pytest.fixture
def recipe_file(world: Path, tmp_path: Path) -> Path:
    recipe = {
        "name": "mixed",
        "base_model": str(world / "base"),
        "device": "cpu",
        "data": {name: str(world / f"{name}.jsonl") for name in ("helpful_pairs", "safety_pairs")},
        "stages": {
            "rm": {
                "kind": "reward",
                "model": "base",
                "domain": "safety",
                "preferences": ["safety_pairs"],
                "other_preferences": ["helpful_pairs"],
                "training": TRAINING | {"max_steps": 1},
            }
        },
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def test_other_preferences_are_references(recipe_file: Path, world: Path, tmp_path: Path, capsys) -> None:
    """Checked by `validate`, planned by `--dry-run`, written as paths, and a stage alone equals the run's."""
    assert run_command(["run", str(recipe_file), "stages.rm.other_preferences=[helpfull_pairs]"]) == 2
    told = capsys.readouterr().err
    assert (
        'stages.rm.other_preferences: no data entry "helpfull_pairs" (did you mean "helpful_pairs"?)' in told
    )
    assert run_command(["validate", str(recipe_file), "stages.rm.other_share=1.5"]) == 2
    assert "stages.rm.other_share: " in capsys.readouterr().err

    run, configs = tmp_path / "run", tmp_path / "configs"
    arguments = ["run", str(recipe_file), "--output-dir", str(run)]
    assert run_command([*arguments, "--dry-run", "--write-configs", str(configs)]) == 0
    assert "base, safety_pairs, helpful_pairs" in " ".join(capsys.readouterr().out.split())
    written = yaml.safe_load((configs / "01-rm.yaml").read_text())
    assert written["other_preferences"] == [str(world / "helpful_pairs.jsonl")]

    alone = tmp_path / "alone"
    assert run_command(["reward", str(configs / "01-rm.yaml"), "--output-dir", str(alone)]) == 0
    assert run_command(arguments) == 0
    found = [json.loads((folder / "done.json").read_text()) for folder in (alone, run / "stages" / "01-rm")]
    assert found[0]["metrics"] == found[1]["metrics"]
    assert found[0]["metrics"]["pairs"]["drawn"] == 333
    page = (run / "report.html").read_text()
    assert "267 not drawn" in page
    assert "usable, but more than the share that the mix takes" in page


def test_the_plan_counts_what_is_drawn(recipe_file: Path, tmp_path: Path) -> None:
    """Times of three plans: own pairs alone, with a ninth of their number more, and with all others."""
    from llama2_chat.pipeline.plan import _data_size

    def size(*overrides: str) -> tuple[float, float]:
        recipe = load_recipe(str(recipe_file), overrides)
        assert make_plan(recipe, tmp_path / "out", Selection()).rows[0]["state"] == "to run"
        return _data_size(recipe, recipe.stages["rm"])

    alone, mixed, whole = (
        size("stages.rm.other_preferences=[]"),
        size(),
        size("stages.rm.other_share=0.9"),
    )
    assert [rows for _, rows in (alone, mixed, whole)] == [300, 333, 600]
    assert (mixed[0] - alone[0]) / (whole[0] - alone[0]) == pytest.approx(33 / 300, rel=1e-12)


def test_changed_other_preferences_run_the_stage_again(recipe_file: Path, tmp_path: Path, capsys) -> None:
    arguments = ["run", str(recipe_file), "--output-dir", str(tmp_path / "run")]
    assert run_command(arguments) == 0
    states = []
    for override in ("seed=0", "stages.rm.other_share=0.2", "stages.rm.other_preferences=[]"):
        capsys.readouterr()
        assert run_command([*arguments, override, "--dry-run"]) == 0
        states.append("done in" in " ".join(capsys.readouterr().out.split()))
    assert states == [True, False, False]
