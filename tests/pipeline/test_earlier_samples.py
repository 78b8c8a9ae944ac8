"""Recipes in which an iteration names the samples of those before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from llama2_chat.errors import RecipeError
from llama2_chat.pipeline.plan import make_plan, write_configs
from llama2_chat.pipeline.recipe import load_recipe
from llama2_chat.pipeline.run import Selection

BASE = Path(__file__).resolve().parents[2] / "recipes" / "tiny" / "base"
VERSION = {"kind": "rejection_sampling", "policy": "sft", "helpfulness": "rm", "prompts": ["prompts"]}


@pytest.fixture
def recipe(tmp_path: Path):
    """A function that writes a recipe of SFT, a reward model, V1 and V2, with changes to V2."""

    def write(**changes: Any) -> str:
        stages = {
            "sft": {"kind": "sft", "model": "base", "dialogues": ["talks"]},
            "rm": {"kind": "reward", "model": "sft", "domain": "helpfulness", "preferences": ["pairs"]},
            "v1": VERSION,
            "v2": {**VERSION, "policy": "v1", "iteration": 2, "earlier_samples": ["v1.samples"], **changes},
        }
        data = {
            "talks": {"testbed": "demonstrations", "rows": 30},
            "pairs": {"testbed": "preferences", "rows": 30, "options": {"domain": "helpfulness"}},
            "prompts": {"testbed": "prompts", "rows": 30},
            "held_out": {"testbed": "prompts", "rows": 30, "split": "held_out"},
        }
        file = tmp_path / "recipe.yaml"
        head = {"name": "two", "base_model": str(BASE), "device": "cpu"}
        file.write_text(yaml.safe_dump({**head, "data": data, "stages": stages}, sort_keys=False))
        return str(file)

    return write


def test_the_plan_and_the_configurations_know_the_samples(recipe, tmp_path: Path) -> None:
    loaded = load_recipe(recipe(temperatures=[0.5, 1.0], temperature_prompts=["held_out"]))
    rows = {row["stage"]: row for row in make_plan(loaded, tmp_path / "run", Selection()).rows}
    assert "v1.samples" in rows["v2"]["inputs"]
    assert rows["v2"]["time"] == rows["v1"]["time"]  # a lower bound: neither search nor scoring again counts
    write_configs(loaded, tmp_path / "run", tmp_path / "configs")
    config = yaml.safe_load((tmp_path / "configs" / "04-v2.yaml").read_text())
    (samples,) = config["earlier_samples"]
    assert (tmp_path / "configs" / samples).resolve() == tmp_path / "run/stages/03-v1/samples.jsonl"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"earlier_samples": ["v1"]},
            'stages.v2.earlier_samples: no data entry "v1"; there are talks, pairs, prompts, held_out, v1.samples',
        ),
        ({"earlier_samples": ["v2.samples"]}, 'no data entry "v2.samples"'),
        ({"pool": "best"}, "stages.v2.pool: "),
        ({"temperatures": [1.0, 1.0]}, "stages.v2.temperatures: 1 stands there more than once"),
        ({"temperatures": [-1.0]}, "stages.v2.temperatures.0: "),
        ({"temperatures": [1.0]}, "stages.v2: temperatures without temperature_prompts"),
        ({"temperature_prompts": ["held"]}, "stages.v2.temperature_prompts: no data entry"),
        ({"when_all_unsafe": "maybe"}, "stages.v2.when_all_unsafe: "),
    ],
)
def test_what_is_wrong_is_told_with_its_key(recipe, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe(**changes))
    assert problem in str(caught.value)
