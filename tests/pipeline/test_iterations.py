"""`iterations` in a recipe: written out they are the stages that somebody would write by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from llama2_chat.cli.main import run_command
from llama2_chat.errors import RecipeError
from llama2_chat.pipeline.iterations import expand_iterations
from llama2_chat.pipeline.recipe import load_recipe
from llama2_chat.pipeline.schema import recipe_schema
from llama2_chat.pipeline.yaml_files import apply_overrides, parse

HEAD = """\
name: compact
base_model: base
data:
  demonstrations: {testbed: demonstrations, rows: 10}
  pairs: {testbed: preferences, rows: 10}
  harm: {testbed: preferences, rows: 10, options: {domain: safety}}
  held_out: {testbed: preferences, rows: 10, split: held_out}
  questions: {testbed: prompts, rows: 10}
  instructions: {testbed: instructions, rows: 10}
  dialogues: {testbed: instruction_dialogues, rows: 10}
stages:
  sft: {kind: sft, model: base, dialogues: [demonstrations]}
  helpfulness_rm:
    kind: reward
    model: sft
    domain: helpfulness
    preferences: [pairs]
    other_preferences: [harm]
    held_out: [held_out]
    training: {learning_rate: 1e-3, batch_size: 8}
  safety_rm: {kind: reward, model: base, domain: safety, preferences: [harm], margin: large}
"""
COMPACT = f"""{HEAD}
iterations:
  start: sft
  helpfulness: helpfulness_rm
  safety: safety_rm
  count: 3
  preferences:
    annotator: {{testbed: {{noise: 0.2}}}}
    prompts: [questions]
    safety: {{temperatures: [0.5, 1.5]}}
  reward: {{training: {{batch_size: 16}}, safety: {{margin: small}}}}
  rejection_sampling: {{prompts: [questions], sampling: {{temperature: 1.2, max_new_tokens: 9}}}}
  ghost_attention: {{after: 2, dialogues: [dialogues], instructions: [instructions]}}
  ppo: {{from: 3, prompts: [questions], kl_coefficient: 0.02}}
  context_distillation: {{prompts: [questions]}}
  overrides:
    v1: {{preferences: null}}
    v3:
      rejection_sampling: {{start_from: policy, sampling: {{temperature: 1.3}}}}
      ppo: {{kl_coefficient: 0.01}}
      reward: {{helpfulness: {{model: base}}}}
"""
BY_HAND = f"""{HEAD}
  v1_rejection_sampling:
    kind: rejection_sampling
    policy: sft
    helpfulness: helpfulness_rm
    safety: safety_rm
    iteration: 1
    prompts: [questions]
    sampling: {{temperature: 1.2, max_new_tokens: 9}}

  v2_helpfulness_pairs:
    kind: preferences
    policies: [v1_rejection_sampling, sft]
    domain: helpfulness
    iteration: 2
    annotator: {{testbed: {{noise: 0.2}}}}
    prompts: [questions]
  v2_safety_pairs:
    kind: preferences
    policies: [v1_rejection_sampling, sft]
    domain: safety
    iteration: 2
    annotator: {{testbed: {{noise: 0.2}}}}
    prompts: [questions]
    temperatures: [0.5, 1.5]
  v2_helpfulness_rm:
    kind: reward
    model: sft
    domain: helpfulness
    preferences: [pairs, v2_helpfulness_pairs]
    other_preferences: [harm, v2_safety_pairs]
    held_out: [held_out, v2_helpfulness_pairs.held_out]
    training: {{learning_rate: 1e-3, batch_size: 16}}
  v2_safety_rm:
    kind: reward
    model: sft
    domain: safety
    preferences: [harm, v2_safety_pairs]
    held_out: [v2_safety_pairs.held_out]
    margin: small
    training: {{batch_size: 16}}
  v2_rejection_sampling:
    kind: rejection_sampling
    policy: v1_rejection_sampling
    helpfulness: v2_helpfulness_rm
    safety: v2_safety_rm
    iteration: 2
    earlier_samples: [v1_rejection_sampling.samples]
    prompts: [questions]
    sampling: {{temperature: 1.2, max_new_tokens: 9}}
  v2_ghost_attention:
    kind: ghost_attention
    policy: v2_rejection_sampling
    dialogues: [dialogues]
    instructions: [instructions]

  v3_helpfulness_pairs:
    kind: preferences
    policies: [v2_ghost_attention, v2_rejection_sampling]
    domain: helpfulness
    iteration: 3
    annotator: {{testbed: {{noise: 0.2}}}}
    prompts: [questions]
  v3_safety_pairs:
    kind: preferences
    policies: [v2_ghost_attention, v2_rejection_sampling]
    domain: safety
    iteration: 3
    annotator: {{testbed: {{noise: 0.2}}}}
    prompts: [questions]
    temperatures: [0.5, 1.5]
  v3_helpfulness_rm:
    kind: reward
    model: base
    domain: helpfulness
    preferences: [pairs, v2_helpfulness_pairs, v3_helpfulness_pairs]
    other_preferences: [harm, v2_safety_pairs, v3_safety_pairs]
    held_out: [held_out, v2_helpfulness_pairs.held_out, v3_helpfulness_pairs.held_out]
    training: {{learning_rate: 1e-3, batch_size: 16}}
  v3_safety_rm:
    kind: reward
    model: sft
    domain: safety
    preferences: [harm, v2_safety_pairs, v3_safety_pairs]
    held_out: [v2_safety_pairs.held_out, v3_safety_pairs.held_out]
    margin: small
    training: {{batch_size: 16}}
  v3_rejection_sampling:
    kind: rejection_sampling
    policy: v2_ghost_attention
    helpfulness: v3_helpfulness_rm
    safety: v3_safety_rm
    iteration: 3
    earlier_samples: [v1_rejection_sampling.samples, v2_rejection_sampling.samples]
    prompts: [questions]
    sampling: {{temperature: 1.3, max_new_tokens: 9}}
    start_from: policy
  v3_ppo:
    kind: ppo
    policy: v3_rejection_sampling
    helpfulness: v3_helpfulness_rm
    safety: v3_safety_rm
    prompts: [questions]
    kl_coefficient: 0.01

  context_distillation:
    kind: context_distillation
    policy: v3_ppo
    safety: v3_safety_rm
    prompts: [questions]
"""


@pytest.fixture
def compact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`compact.yaml` beside a base model, in the current folder."""
    (tmp_path / "base").mkdir()
    (tmp_path / "compact.yaml").write_text(COMPACT)
    (tmp_path / "by_hand.yaml").write_text(BY_HAND)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "compact.yaml"


def test_written_out_they_are_what_one_would_write_by_hand(compact: Path) -> None:
    expanded, by_hand = expand_iterations(parse(compact.read_text())), parse(BY_HAND)
    assert "iterations" not in expanded
    assert list(expanded["stages"]) == list(by_hand["stages"])
    for name, stage in by_hand["stages"].items():
        assert expanded["stages"][name] == stage, name
    assert {**expanded, "stages": 0} == {**by_hand, "stages": 0}
    ours, theirs = load_recipe("compact.yaml"), load_recipe("by_hand.yaml")
    assert ours.to_mapping() == theirs.to_mapping()


def test_a_recipe_without_them_stays_as_it_is() -> None:
    by_hand = parse(BY_HAND)
    assert expand_iterations(by_hand) == by_hand
    assert expand_iterations({**by_hand, "iterations": None}) == by_hand


def test_nothing_of_the_recipe_is_changed_by_it(compact: Path) -> None:
    recipe = parse(compact.read_text())
    expanded = expand_iterations(recipe)
    expanded["stages"]["v2_safety_rm"]["preferences"].append("x")
    assert recipe == parse(compact.read_text())


def minimal(**changes: Any) -> dict[str, Any]:
    """A recipe with the shortest iterations, and `changes` of these."""
    recipe = parse(HEAD)
    shortest = {
        "start": "sft",
        "helpfulness": "helpfulness_rm",
        "rejection_sampling": {"prompts": ["questions"]},
    }
    return {**recipe, "iterations": shortest | changes}


def names(recipe: dict[str, Any]) -> list[str]:
    return list(expand_iterations(recipe)["stages"])[3:]


def test_the_schedule_is_the_papers_where_nothing_else_is_said() -> None:
    """§3.2.3, §3.3: five versions, Ghost Attention after V3, PPO on top of V5's rejection sampling."""
    assert names(minimal()) == [f"v{number}_rejection_sampling" for number in range(1, 6)]
    with_all = minimal(safety="safety_rm", ghost_attention={}, ppo={}, context_distillation={})
    assert names(with_all) == [
        *("v1_rejection_sampling", "v2_rejection_sampling", "v3_rejection_sampling", "v3_ghost_attention"),
        *("v4_rejection_sampling", "v5_rejection_sampling", "v5_ppo", "context_distillation"),
    ]
    stages = expand_iterations(with_all)["stages"]
    policies = {name: stage["policy"] for name, stage in stages.items() if "policy" in stage}
    assert policies["v4_rejection_sampling"] == "v3_ghost_attention"
    assert policies["v5_ppo"] == "v5_rejection_sampling"
    assert policies["context_distillation"] == "v5_ppo"


def test_ppo_comes_before_the_next_version_samples() -> None:
    stages = expand_iterations(minimal(count=3, ppo={"from": 2}))["stages"]
    assert names(minimal(count=3, ppo={"from": 2}))[1:] == [
        *("v2_rejection_sampling", "v2_ppo", "v3_rejection_sampling", "v3_ppo"),
    ]
    assert stages["v3_rejection_sampling"]["policy"] == "v2_ppo"
    # Samples of rejection sampling alone are what later versions look back on.
    assert stages["v3_rejection_sampling"]["earlier_samples"] == [
        *("v1_rejection_sampling.samples", "v2_rejection_sampling.samples"),
    ]


PAIRS = {"prompts": ["questions"], "annotator": {"testbed": {}}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"preferences": PAIRS}, ["helpfulness_pairs", "helpfulness_rm"]),
        ({"preferences": PAIRS, "reward": None}, ["helpfulness_pairs"]),
        (
            {"preferences": {**PAIRS, "helpfulness": None}, "safety": "safety_rm"},
            ["safety_pairs", "safety_rm"],
        ),
        (
            {"preferences": PAIRS, "reward": {"safety": None}, "safety": "safety_rm"},
            ["helpfulness_pairs", "safety_pairs", "helpfulness_rm"],
        ),
    ],
)
def test_what_can_be_left_out(changes: dict[str, Any], expected: list[str]) -> None:
    made = names(minimal(count=1, **changes))
    assert made == [f"v1_{name}" for name in (*expected, "rejection_sampling")]


def test_as_many_of_the_last_policies_answer_as_are_asked_for() -> None:
    stages = expand_iterations(minimal(count=4, preferences={**PAIRS, "variants": 3}))["stages"]
    assert [stages[f"v{number}_helpfulness_pairs"]["policies"] for number in (1, 2, 4)] == [
        ["sft"],
        ["v1_rejection_sampling", "sft"],
        ["v3_rejection_sampling", "v2_rejection_sampling", "v1_rejection_sampling"],
    ]


def test_custom_rewards_may_judge_them() -> None:
    stages = expand_iterations(
        minimal(helpfulness={"callable": "mine:brevity"}, preferences=PAIRS, reward=None)
    )
    assert stages["stages"]["v5_rejection_sampling"]["helpfulness"]["callable"] == "mine:brevity"


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["iterations.cout=3"], ["iterations.cout: unknown key", 'did you mean "count"']),
        (["iterations.count=0"], ["iterations.count: ", "greater than or equal to 1", "found 0"]),
        (["iterations.count=two"], ["iterations.count: ", "integer"]),
        (
            ["iterations.ppo.from=4"],
            ["iterations.ppo.from: 4, but there are 3 versions; lower it, or set ppo"],
        ),
        (
            ["iterations.ghost_attention.after=4"],
            ["iterations.ghost_attention.after: 4, but there are 3 versions"],
        ),
        (
            ["iterations.start=sfft"],
            ['iterations.start: "sfft" is no stage', 'did you mean "sft"', "base, sft"],
        ),
        (["iterations.start=safety_rm"], ['iterations.start: "safety_rm" is not a policy']),
        (["iterations.safety=sft"], ['iterations.safety: "sft" is not a reward model']),
        (["iterations.safety=null"], ["iterations.context_distillation: needs a safety reward model"]),
        (["iterations={}"], ["iterations.start: required", "iterations.rejection_sampling: required"]),
        (["iterations=5"], ["iterations: a mapping is wanted"]),
        (
            ["iterations.preferences=null"],
            ["iterations.reward: without iterations.preferences", "no new pairs"],
        ),
        (
            ["iterations.ppo.policy=sft"],
            ["iterations.ppo.policy: follows from the schedule and is filled in"],
        ),
        (
            ["iterations.overrides.v3.rejection_sampling.iteration=4"],
            ["iterations.overrides.v3.rejection_sampling.iteration: follows from the schedule"],
        ),
        (["iterations.preferences.safety.domain=safety"], ["iterations.preferences.safety.domain: follows"]),
        (
            ["iterations.overrides.v4.ppo={}"],
            ["iterations.overrides.v4: no such version", "there are v1, v2, v3"],
        ),
        (
            ["iterations.overrides.v2.ppo.kl_coefficient=1"],
            ["iterations.overrides.v2.ppo: version 2 has no PPO; see iterations.ppo.from"],
        ),
        (
            ["iterations.overrides.v3.ghost_attention.history=original"],
            ["iterations.overrides.v3.ghost_attention: it does not come after version 3"],
        ),
        (
            ["iterations.overrides.v3.pp={}"],
            ["iterations.overrides.v3.pp: unknown key", 'did you mean "ppo"'],
        ),
        (
            ["iterations.helpfulness={callable: 'm:f'}"],
            ["iterations.helpfulness: a custom reward cannot be trained on new pairs"],
        ),
        (["data.v2_safety_pairs=x.jsonl"], ["iterations: makes a stage v2_safety_pairs, a name that"]),
        (
            ["stages.v3_ppo.kl_coefficient=1"],
            ["iterations: makes a stage v3_ppo", "set iterations.overrides.v3.ppo"],
        ),
        (
            ["iterations.rejection_sampling.samples_per_promt=3"],
            [
                "iterations.rejection_sampling.samples_per_promt: unknown key",
                'did you mean "samples_per_prompt"',
            ],
        ),
        (
            ["iterations.overrides.v3.rejection_sampling.sampling.temprature=1"],
            ["iterations.overrides.v3.rejection_sampling.sampling.temprature: unknown key"],
        ),
        (
            ["iterations.rejection_sampling.prompts=[question]"],
            ['iterations.rejection_sampling.prompts: no data entry "question"', 'did you mean "questions"'],
        ),
        (
            ["iterations.rejection_sampling={}"],
            ["iterations.rejection_sampling.prompts: required, but missing"],
        ),
        (["iterations.preferences.annotator=null"], ["iterations.preferences.annotator: "]),
        (
            ["iterations.preferences.annotator={testbd: {}}"],
            ["iterations.preferences.annotator.testbd: unknown key", 'did you mean "testbed"'],
        ),
        (
            ["iterations.preferences.annotator={callable: 'mine:judge'}"],
            ['iterations.preferences.annotator.callable: no module "mine"'],
        ),
        (
            ["iterations.preferences.safety.temperatures=[]"],
            ["iterations.preferences.safety.temperatures: ", "at least 1"],
        ),
        (["iterations.reward.safety.margin=huge"], ["iterations.reward.safety.margin: ", "'none', 'small'"]),
        (["iterations.reward.trainin={}"], ["iterations.reward.trainin: unknown key"]),
        (["iterations.ppo.training.iterations=0"], ["iterations.ppo.training.iterations: ", "found 0"]),
    ],
)
def test_a_mistake_has_the_key_that_was_written(
    compact: Path, overrides: list[str], parts: list[str]
) -> None:
    """And is told once, however many versions it is in."""
    with pytest.raises(RecipeError) as caught:
        load_recipe("compact.yaml", overrides)
    told = [problem for problem in caught.value.problems if problem.startswith(parts[0].split(": ")[0])]
    assert len(told) == 1, caught.value.problems
    for part in parts:
        assert part in str(caught.value)


def test_mistakes_of_all_sorts_are_told_at_once(compact: Path) -> None:
    overrides = [
        "seed=x",
        "stages.sft.dialogues=[talks]",
        "iterations.rejection_sampling.samples_per_prompt=0",
        "iterations.reward.lr=1",
    ]
    with pytest.raises(RecipeError) as caught:
        load_recipe("compact.yaml", [*overrides, "evaluation={helpfulness: v9_rm, prompts: [questions]}"])
    keys = [problem.split(":")[0] for problem in caught.value.problems]
    assert sorted(keys) == [
        *(
            "evaluation.helpfulness",
            "iterations.rejection_sampling.samples_per_prompt",
            "iterations.reward.lr",
        ),
        *("seed", "stages.sft.dialogues"),
    ]


def test_broken_iterations_give_no_second_error_where_their_stages_are_used(compact: Path) -> None:
    evaluation = "evaluation={helpfulness: v3_helpfulness_rm, prompts: [questions]}"
    assert load_recipe("compact.yaml", [evaluation]).evaluation is not None
    with pytest.raises(RecipeError) as caught:
        load_recipe("compact.yaml", [evaluation, "iterations.count=0"])
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["iterations.count"]


def test_a_mistake_at_the_start_is_not_told_again_for_every_version(compact: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("compact.yaml", ["stages.helpfulness_rm.training.batch_sise=1"])
    (problem,) = caught.value.problems
    assert problem.startswith("stages.helpfulness_rm.training.batch_sise: unknown key")


def test_stages_cannot_come_after_them(compact: Path) -> None:
    with pytest.raises(RecipeError, match=r'stages.late.model: "v1_rejection_sampling" comes later'):
        load_recipe(
            "compact.yaml",
            ["stages.late={kind: sft, model: v1_rejection_sampling, dialogues: [demonstrations]}"],
        )


def test_a_value_on_the_command_line_reaches_every_version(compact: Path) -> None:
    overrides = ["iterations.count=4", "iterations.rejection_sampling.samples_per_prompt=3"]
    stages = load_recipe("compact.yaml", overrides).stages
    found = {n: s.samples_per_prompt for n, s in stages.items() if n.endswith("_sampling")}  # type: ignore[attr-defined]
    assert found == {f"v{number}_rejection_sampling": 3 for number in range(1, 5)}
    assert "v4_ppo" in stages


def test_show_writes_them_out(compact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["recipes", "show", "compact.yaml", "--expanded"]) == 0
    printed = capsys.readouterr().out
    assert parse(printed) == expand_iterations(parse(compact.read_text()))
    assert "&id" not in printed
    assert run_command(["recipes", "show", "compact.yaml"]) == 0
    assert capsys.readouterr().out == compact.read_text()


def test_the_schema_knows_them() -> None:
    schema = recipe_schema()
    iterations = schema["$defs"]["IterationsConfig"]["properties"]
    assert schema["properties"]["iterations"]["anyOf"][0] == {"$ref": "#/$defs/IterationsConfig"}
    sections = [
        "preferences",
        "reward",
        "rejection_sampling",
        "ghost_attention",
        "ppo",
        "context_distillation",
    ]
    found = {name: schema["$defs"][f"{name}_section"] for name in sections}
    for name in sections:
        assert {"$ref": f"#/$defs/{name}_section"} in iterations[name].get("anyOf", [iterations[name]])
    # A section has its own keys and the kind's, without those that are filled in; none has to be given there.
    assert {"after", "dialogues", "training"} <= set(found["ghost_attention"]["properties"])
    assert {"from", "kl_coefficient"} <= set(found["ppo"]["properties"])
    assert "policy" not in found["ppo"]["properties"]
    assert {"variants", "helpfulness", "annotator"} <= set(found["preferences"]["properties"])
    assert all("required" not in section for section in found.values())
    assert all(section["additionalProperties"] is False for section in found.values())
    json.dumps(schema)


def test_the_plan_shows_every_stage(compact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--output-dir", "out", "--dry-run", "--write-configs", "configs"]
    assert run_command(["run", "compact.yaml", *arguments]) == 0
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if "v2_safety_pairs" in line]
    assert "v1_rejection_sampling" in rows[0]
    assert "stages/06-v2_safety_pairs/dataset.jsonl" in rows[0]
    files = {file.name: yaml.safe_load(file.read_text()) for file in Path("configs").glob("*.yaml")}
    assert len(files) == 17
    assert [Path(p).parts[-2:] for p in files["06-v2_safety_pairs.yaml"]["policies"]] == [
        ("04-v1_rejection_sampling", "model"),
        ("01-sft", "model"),
    ]
    assert files["07-v2_helpfulness_rm.yaml"]["held_out"][1].endswith(
        "05-v2_helpfulness_pairs/held_out.jsonl"
    )


def test_pairs_are_no_model(compact: Path) -> None:
    """A preferences stage may be named where pairs are wanted, and nowhere else."""
    base = apply_overrides(parse(BY_HAND), ["stages.v3_ppo.policy=v2_safety_pairs"])
    Path("by_hand.yaml").write_text(yaml.safe_dump(base, sort_keys=False))
    with pytest.raises(RecipeError, match=r'stages.v3_ppo.policy: "v2_safety_pairs" is not a policy'):
        load_recipe("by_hand.yaml")
    with pytest.raises(RecipeError, match=r'no data entry "v2_safety_pairs"'):
        load_recipe("by_hand.yaml", ["stages.v3_ppo.policy=sft", "stages.v3_ppo.prompts=[v2_safety_pairs]"])
