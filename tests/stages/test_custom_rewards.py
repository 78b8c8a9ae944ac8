"""Stages whose reward is a function of the user's own, through the command line."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

import pytest
import yaml
from own_rewards import BREVITY, few_prompts, metrics_of, written
from score_server import scores_of

from llama2_chat.cli.main import run_command
from llama2_chat.jsonl import read_rows
from llama2_chat.pipeline.plan import make_plan
from llama2_chat.pipeline.recipe import load_recipe
from llama2_chat.pipeline.run import Selection


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder with a module of rewards; its name is the test's own, for modules stay imported."""
    (tmp_path / f"{module_of(request)}.py").write_text(BREVITY.format(most=0))
    return tmp_path


def module_of(request: pytest.FixtureRequest) -> str:
    return "".join(c if c.isalnum() else "_" for c in request.node.name)


@pytest.fixture
def module(request: pytest.FixtureRequest) -> str:
    return module_of(request)


@pytest.fixture
def rejection_file(rejection_config, world, folder, module) -> Path:
    config = rejection_config(prompts=few_prompts(world, folder), samples_per_prompt=4)
    training = config.training.model_dump() | {"max_steps": 1}
    return written(
        config,
        folder,
        world,
        helpfulness={"callable": f"{module}:brevity"},
        safety={"callable": f"{module}:carefulness"},
        safety_threshold=0.01,
        sft_dialogues=[],
        training=training,
        sampling={"temperature": 1.0, "max_new_tokens": 24},
    )


def test_rejection_sampling_keeps_what_the_function_prefers(rejection_file, folder, module, capsys) -> None:
    out = folder / "out"
    assert run_command(["rejection-sampling", str(rejection_file), "--output-dir", str(out)]) == 0
    samples = [row for _, row in read_rows(out / "samples.jsonl")]
    assert len(samples) == 24 * 4
    for row in samples:
        assert row["scores"]["helpfulness"] == pytest.approx(-len(row["response"]) / 10, abs=1e-5)
        assert row["scores"]["safety"] == (1.0 if "a" in row["response"] else -1.0)
    kept = {
        json.dumps(row["messages"][:-1]): row["messages"][-1]["content"]
        for _, row in read_rows(out / "dataset.jsonl")
    }
    harmless = 0
    for prompt, group in groupby(samples, key=lambda row: json.dumps(row["prompt"])):
        complete = [row for row in group if row["status"] == "complete"]
        if complete and not complete[0]["is_safety"]:
            harmless += len({len(row["response"]) for row in complete}) > 1
            # -1 is 0.27 as a probability, above the threshold: helpfulness decides.
            assert len(kept[prompt]) == min(len(row["response"]) for row in complete)
    assert harmless > 5
    card = (out / "model" / "README.md").read_text()
    assert f"callable: {module}:brevity" in card
    assert str(folder) not in card


def test_a_changed_function_runs_the_stage_again(rejection_file, folder, module, capsys) -> None:
    arguments = ["rejection-sampling", str(rejection_file), "--output-dir", str(folder / "out")]
    assert run_command(arguments) == 0
    before = metrics_of(folder / "out")
    capsys.readouterr()
    assert run_command(arguments) == 0
    assert "done already" in capsys.readouterr().out
    (folder / f"{module}.py").write_text(BREVITY.format(most=10_000))
    assert run_command(arguments) == 0
    assert "done already" not in capsys.readouterr().out
    after = metrics_of(folder / "out")
    # All answers are as good now, so the kept ones score no more than the mean.
    assert after["selection"]["combined_kept"] == pytest.approx(after["selection"]["combined_mean"], rel=1e-9)
    assert before["selection"]["combined_kept"] > 1.01 * before["selection"]["combined_mean"]


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("broken", "broken: failed on 96 dialogues: ZeroDivisionError: division by zero"),
        ("too_few", "too_few: 95 scores for 96 dialogues; one for each is wanted"),
        ("not_finite", "not_finite: dialogue 2 of 96 (answer "),
        ("nothing", "nothing: must return a list of 96 numbers, one for each dialogue; it returned NoneType"),
        ("words", "words: dialogue 1 of 96 (answer "),
        ("constant", 'has no function "constant"'),
    ],
)
def test_what_a_function_does_wrong_is_one_message(
    rejection_file, folder, module, capsys, function: str, told: str
) -> None:
    out = folder / "out"
    arguments = [str(rejection_file), f"helpfulness.callable={module}:{function}", "--output-dir", str(out)]
    assert run_command(["rejection-sampling", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error
    assert not (out / "samples.jsonl").exists()
    assert not (out / "model").exists()


def test_ppo_earns_more_of_the_functions_reward(sft, world, folder, module, settings) -> None:
    """Answers get shorter; the value model starts from the policy, and that is said."""
    from llama2_chat.ppo.config import PpoConfig

    config = PpoConfig(
        policy=str(sft[0].model),
        helpfulness={"callable": "placeholder:replaced"},
        prompts=[str(world / "prompts.jsonl")],
        sampling={"max_new_tokens": 12},
        incomplete="own",
        kl_coefficient=0.0,
        training={"iterations": 12, "batch_size": 64, "mini_batch_size": 16, "learning_rate": 1e-3},
    )
    file = written(config, folder, world, helpfulness={"callable": f"{module}:brevity"})
    out = folder / "out"
    assert run_command(["ppo", str(file), "--output-dir", str(out)]) == 0
    metrics = metrics_of(out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(row["safety_mean"] is None for row in rows)
    # A reward of -1 is ten characters.
    assert metrics["helpfulness_last"] > metrics["helpfulness_first"] + 1
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    (warning,) = [event["message"] for event in events if event["event"] == "warning"]
    assert "helpfulness is a custom reward, so the value model starts from the policy's trunk" in warning
    assert (out / "model" / "model.safetensors").exists()


def test_ppo_takes_the_value_model_that_is_named(sft, rewards, world, folder, module, monkeypatch) -> None:
    from llama2_chat.ppo import value_model
    from llama2_chat.ppo.config import PpoConfig

    loaded = []
    load = value_model.load_reward_model
    monkeypatch.setattr(
        value_model, "load_reward_model", lambda path, *rest: loaded.append(path) or load(path, *rest)
    )
    config = PpoConfig(
        policy=str(sft[0].model),
        helpfulness={"callable": "placeholder:replaced"},
        value=str(rewards["safety"][0].model),
        prompts=[str(world / "prompts.jsonl")],
        sampling={"max_new_tokens": 4},
        training={"iterations": 1, "batch_size": 8, "mini_batch_size": 8},
    )
    file = written(config, folder, world, helpfulness={"callable": f"{module}:brevity"})
    assert run_command(["ppo", str(file), "--output-dir", str(folder / "out")]) == 0
    assert loaded == [str(rewards["safety"][0].model)]
    assert '"warning"' not in (folder / "out" / "events.jsonl").read_text()


def test_context_distillation_keeps_what_the_function_prefers(
    distillation_config, world, folder, module
) -> None:
    config = distillation_config(training={"batch_size": 8, "max_steps": 1, "sequence_length": 128})
    file = written(config, folder, world, safety={"callable": f"{module}:brevity"})
    out = folder / "out"
    assert run_command(["context-distillation", str(file), "--output-dir", str(out)]) == 0
    rows = [row for _, row in read_rows(out / "samples.jsonl")]
    assert any(row["kept"] for row in rows)
    assert not all(row["kept"] for row in rows)
    for row in rows:
        shorter = len(row["response"]) < len(row["original_response"])
        assert row["kept"] == (row["status"] == "complete" and shorter)


@pytest.fixture
def recipe_file(sft, world, folder, module) -> Path:
    """A recipe whose only reward is a function that lies beside it."""
    few_prompts(world, folder, 4)
    stage = {
        "kind": "rejection_sampling",
        "policy": "base",
        "helpfulness": {"callable": f"{module}:brevity"},
        "prompts": ["few"],
        "samples_per_prompt": 2,
        "sampling": {"max_new_tokens": 24},
        "training": {"batch_size": 4, "max_steps": 1, "sequence_length": 128},
    }
    recipe = {
        "name": "custom",
        "base_model": str(sft[0].model),
        "device": "cpu",
        "data": {"few": "few.jsonl"},
        "stages": {"v1": stage},
        "evaluation": {
            "helpfulness": {"callable": f"{module}:brevity"},
            "safety": {"callable": f"{module}:carefulness"},
            "prompts": ["few"],
            "samples_per_prompt": 2,
            "sampling": {"max_new_tokens": 24},
        },
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def test_a_whole_recipe_with_its_evaluation(
    recipe_file, folder, module, tmp_path_factory, monkeypatch, capsys
) -> None:
    """From another folder: plan, configurations, run, report, the run's own recipe; and a change of the module."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    run, configs = folder / "run", folder / "configs"
    arguments = ["run", str(recipe_file), "--output-dir", str(run)]
    assert run_command([*arguments, "--dry-run", "--write-configs", str(configs)]) == 0
    assert (
        make_plan(load_recipe(str(recipe_file)), run, Selection()).rows[0]["inputs"]
        == f"base, few, {module}:brevity"
    )
    config = yaml.safe_load((configs / "01-v1.yaml").read_text())
    assert config["helpfulness"] == {"callable": f"{module}:brevity", "folder": str(folder)}
    assert run_command(arguments) == 0
    evaluated = json.loads((run / "summary.json").read_text())["evaluation"]["v1"]
    lengths = [
        -len(row["response"]) / 10
        for _, row in read_rows(run / "evaluation" / "v1.samples.jsonl")
        if row["set"] == "helpful"
    ]
    assert evaluated["reward_helpfulness_mean"] == pytest.approx(sum(lengths) / len(lengths), rel=1e-5)
    assert f"{module}:brevity" in (run / "report.html").read_text()
    again = ["run", str(run / "recipe.yaml"), "--output-dir", str(run), "--dry-run"]
    for text, state in ((None, "done in"), (BREVITY.format(most=5), "to run again (changed)")):
        if text is not None:
            (folder / f"{module}.py").write_text(text)
        capsys.readouterr()
        assert run_command(again) == 0
        assert state in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("stages.v1.helpfulness={callable: 'nowhere:f'}", 'stages.v1.helpfulness.callable: no module "nowhere" in '),
        ("stages.v1.helpfulness={callable: '{module}:brevty'}", 'no "brevty" (did you mean "brevity"?)'),
        ("stages.v1.safety={callable: '{module}'}", "stages.v1.safety.callable: module:function is wanted"),
        ("stages.v1.helpfulness={callabel: 'a:b'}", 'helpfulness.callabel: unknown key (did you mean "callable"?)'),
        ("stages.v1.helpfulness={url: 'host:80'}", "stages.v1.helpfulness.url: an address that begins with http"),
        ("stages.v1.helpfulness={url: 'http://k@host'}", "name the variable that holds it in api_key_env"),
        ("stages.v1.helpfulness={url: 'http://host/v1/score'}", "the server's address alone is wanted"),
        ("stages.v1.helpfulness={url: 'http://h', timeout: 1}", 'timeout: unknown key (did you mean "timeout_seco'),
        ("stages.v1.policy={callable: 'a:b'}", "stages.v1.policy: "),
        ("evaluation.helpfulness={callable: 'nowhere:f'}", 'evaluation.helpfulness.callable: no module "nowhere" in '),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_before_anything_runs(
    recipe_file, folder, module, capsys, override: str, told: str
) -> None:
    (folder / f"{module}.py").write_text(BREVITY.format(most=0) + "\nraise SystemExit('was imported')\n")
    assert run_command(["validate", str(recipe_file)]) == 0  # finding a module runs none of it
    assert run_command(["validate", str(recipe_file), override.replace("{module}", module)]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_broken_python_is_told_before_anything_runs(recipe_file, folder, module, capsys) -> None:
    (folder / f"{module}.py").write_text("def brevity(dialogues:\n")
    assert run_command(["validate", str(recipe_file)]) == 2
    assert f"{module}.py is no valid Python" in capsys.readouterr().err


def test_the_schema_offers_all_three() -> None:
    from llama2_chat.pipeline.schema import recipe_schema

    definitions = recipe_schema()["$defs"]
    three = [{"type": "string"}, {"$ref": "#/$defs/CallableSource"}, {"$ref": "#/$defs/UrlSource"}]
    checked = 0
    for name, fields in (
        ("RejectionSamplingConfig", ("helpfulness", "safety")),
        ("PpoConfig", ("helpfulness", "safety")),
        ("ContextDistillationConfig", ("safety",)),
        ("EvaluationConfig", ("helpfulness", "safety")),
    ):
        for field in fields:
            schema = definitions[name]["properties"][field]
            assert (schema["oneOf"] if "oneOf" in schema else schema["anyOf"][0]["oneOf"]) == three
            checked += 1
    assert checked == 7
    assert definitions["CallableSource"]["required"] == ["callable"]
    assert definitions["UrlSource"]["required"] == ["url"]


def test_rejection_sampling_by_a_servers_scores(rejection_file, folder, server) -> None:
    """The server is busy at first; the answers that it scores highest are kept."""
    busy = [(429, {"Retry-After": "0"}, b"")]
    server.answer = lambda rows: busy.pop() if busy else scores_of(rows)
    out = folder / "out"
    source = f"{{url: '{server.url}', batch_size: 16}}"
    arguments = [str(rejection_file), f"helpfulness={source}", f"safety={source}", "--output-dir", str(out)]
    assert run_command(["rejection-sampling", *arguments]) == 0
    samples = [row for _, row in read_rows(out / "samples.jsonl")]
    for row in samples:
        assert row["scores"]["helpfulness"] == pytest.approx(-len(row["response"]) / 10, abs=1e-5)
        assert row["scores"]["safety"] == pytest.approx(len(row["response"]) / 20, abs=1e-5)
    assert server.requests[0][0] == "/v1/score"
    assert all(len(body["dialogues"]) <= 16 for _, _, body in server.requests)
    asked = len(server.requests)
    # How a server is asked is no part of what it says: nothing is run again.
    changed = [a.replace("batch_size: 16", "retries: 9") for a in arguments]
    assert run_command(["rejection-sampling", *changed]) == 0
    assert len(server.requests) == asked
    assert f"url: {server.url}" in (out / "model" / "README.md").read_text()


def test_ppo_by_a_servers_scores(sft, world, folder, server) -> None:
    from llama2_chat.ppo.config import PpoConfig

    config = PpoConfig(
        policy=str(sft[0].model),
        helpfulness={"url": server.url},
        prompts=[str(world / "prompts.jsonl")],
        sampling={"max_new_tokens": 12},
        incomplete="own",
        kl_coefficient=0.0,
        training={"iterations": 12, "batch_size": 64, "mini_batch_size": 16, "learning_rate": 1e-3},
    )
    out = folder / "out"
    assert run_command(["ppo", str(written(config, folder, world)), "--output-dir", str(out)]) == 0
    metrics = metrics_of(out)
    assert metrics["helpfulness_last"] > metrics["helpfulness_first"] + 1
    assert len(server.requests) >= 12


def test_a_server_that_fails_ends_the_stage_with_one_message(rejection_file, folder, server, capsys) -> None:
    server.answer = lambda rows: (200, {}, b'{"scores": [{"helpfulness": NaN}]}')
    out = folder / "out"
    arguments = [str(rejection_file), f"helpfulness={{url: '{server.url}', batch_size: 1}}"]
    assert run_command(["rejection-sampling", *arguments, "--output-dir", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"{server.url}: dialogue 1 of 1 (answer " in error
    assert "a finite raw score (logit) is wanted, found nan" in error
    assert "Traceback" not in error
    assert not (out / "samples.jsonl").exists()
