"""PPO watched: held-out evaluations, early stopping, the policy that is kept, guards, tables of samples."""

from __future__ import annotations

import json
import math
import signal
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llama2_chat import interruption
from llama2_chat.errors import RecipeError, TrainingError
from llama2_chat.files import sha256_of
from llama2_chat.jsonl import write_rows
from llama2_chat.pipeline.references import references
from llama2_chat.pipeline.stage_config import load_stage_config
from llama2_chat.ppo import batch_measures, held_out, learners, loop
from llama2_chat.ppo.config import PpoConfig
from llama2_chat.ppo.train import run_stage
from llama2_chat.reward.scoring import RewardScorer, Score
from llama2_chat.stage import StageDirectory
from llama2_chat.testbed.generators import GENERATORS

HELD_OUT = 6
TRAINING = {
    "iterations": 4, "batch_size": 8, "mini_batch_size": 4, "learning_rate": 1e-3, "checkpoint_iterations": 2,
}  # fmt: skip


@pytest.fixture(scope="session")
def watched_config(world, sft, rewards):
    """A function that makes the stage's configuration, with changes; guards are quiet unless they are asked for."""
    write_rows(world / "unseen_prompts.jsonl", GENERATORS["prompts"](rows=HELD_OUT, seed=0, split="held_out"))

    def make(**changes) -> PpoConfig:
        training = {**TRAINING, **changes.pop("training", {})}
        quiet = {"complete": {"action": "off"}, "length": {"action": "off"}, "entropy": {"action": "off"}}
        values = {
            "policy": str(sft[0].model),
            "helpfulness": str(rewards["helpfulness"][0].model),
            "safety": str(rewards["safety"][0].model),
            "independent": str(rewards["safety"][0].model),
            "prompts": [str(world / "prompts.jsonl")],
            "held_out": [str(world / "unseen_prompts.jsonl")],
            "evaluation_iterations": 1,
            "sampling": {"max_new_tokens": 8},
            "training": training,
            "guards": {**quiet, **changes.pop("guards", {})},
            **changes,
        }
        return PpoConfig(**values)

    return make


@pytest.fixture(scope="session")
def watched(settings, stage_at, watched_config):
    """Four iterations, evaluated after 0, 1, 2, 3 and 4 of them."""
    directory = stage_at("watched")
    return directory, run_stage(watched_config(), settings, directory)


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def events(directory: StageDirectory, name: str) -> list[dict]:
    return [event for event in rows_of(directory.events.path) if event["event"] == name]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(left: Path, right: Path) -> bool:
    first, second = weights(left), weights(right)
    return all(torch.equal(first[name], second[name]) for name in first)


def test_an_evaluation_is_what_its_samples_say(watched, watched_config) -> None:
    """Means and standard errors against the rows of samples.jsonl, the independent model's against its own scoring."""
    directory, _ = watched
    found, samples = rows_of(directory.held_out), rows_of(directory.samples)
    assert [row["step"] for row in found] == [0, 1, 2, 3, 4]
    other = RewardScorer.from_pretrained(watched_config().independent)
    for row in found:
        mine = [sample for sample in samples if sample["iteration"] == row["step"]]
        assert len(mine) == HELD_OUT
        raw = [math.log(s["scores"]["combined"] / (1 - s["scores"]["combined"])) for s in mine]
        assert row["score_mean"] == pytest.approx(statistics.fmean(raw), rel=1e-4, abs=1e-5)
        error = statistics.stdev(raw) / math.sqrt(HELD_OUT)
        assert row["score_se"] == pytest.approx(error, rel=1e-4)
        dialogues = [[*s["prompt"], {"role": "assistant", "content": s["response"]}] for s in mine]
        said = [score.helpfulness for score in other.score(dialogues)]
        assert [s["scores"]["independent"] for s in mine] == pytest.approx(said, abs=1e-5)
        assert row["independent_mean"] == pytest.approx(statistics.fmean(said), abs=1e-5)
        assert sum(row[f"{status}_share"] for status in batch_measures.STATUSES) == pytest.approx(1.0)
        complete = statistics.fmean(sample["status"] == "complete" for sample in mine)
        assert row["complete_share"] == pytest.approx(complete)
    # The policy starts as its own reference.
    assert found[0]["kl_nats"] == 0.0
    assert found[-1]["kl_nats"] != 0.0


def test_an_iteration_s_line_holds_the_evaluation_of_the_policy_that_sampled_it(watched) -> None:
    directory, metrics = watched
    found = {row["step"]: row for row in rows_of(directory.held_out)}
    for row in rows_of(directory.metrics_file):
        assert row["held_out_score_mean"] == found[row["step"] - 1]["score_mean"]
        assert row["held_out_independent_mean"] == found[row["step"] - 1]["independent_mean"]
    assert metrics["held_out_prompts"] == HELD_OUT
    assert metrics["held_out_score_mean_first"] == found[0]["score_mean"]
    best = max(found.values(), key=lambda row: row["score_mean"])
    assert metrics["held_out_score_mean_kept"] == best["score_mean"]
    assert metrics["kept_iteration"] == best["step"]
    assert metrics["stopped_by"] is None


def test_each_evaluation_draws_the_same_random_numbers(settings, stage_at, watched_config) -> None:
    """A policy that stands still, as in the warm-up, says the same each time."""
    directory = stage_at("watched-still")
    config = watched_config(training={"iterations": 2, "warmup_iterations": 2})
    run_stage(config, settings, directory)
    first, *others = (
        [(row["prompt"], row["response"]) for row in rows_of(directory.samples) if row["iteration"] == step]
        for step in range(3)
    )
    assert len(first) == HELD_OUT
    assert others == [first, first]


def test_samples_of_training_prompts_where_none_are_held_out(
    settings, stage_at, watched_config, world
) -> None:
    directory = stage_at("watched-nothing-held-out")
    config = watched_config(held_out=[], independent=None, evaluation_iterations=3)
    metrics = run_stage(config, settings, directory)
    samples = rows_of(directory.samples)
    prompts = [row["prompt"] for row in rows_of(world / "prompts.jsonl")[:8]]
    assert [sample["iteration"] for sample in samples] == [0] * 8 + [3] * 8 + [4] * 8
    assert [sample["prompt"] for sample in samples] == prompts * 3
    assert all(sample["status"] in batch_measures.STATUSES for sample in samples)
    assert not directory.held_out.exists()
    assert "held_out_prompts" not in metrics
    assert metrics["kept_iteration"] == 4


def assert_same_bytes(directory: StageDirectory, other: StageDirectory) -> None:
    for name in ("metrics_file", "held_out", "model"):
        assert sha256_of(getattr(directory, name)) == sha256_of(getattr(other, name)), name
    # The policy that samples is called by its stage's name.
    own, others = (d.samples.read_text().replace(d.path.name, "NAME") for d in (directory, other))
    assert own == others


@pytest.mark.parametrize("where", ["in the evaluation", "after it", "between checkpoints"])
def test_interrupted_and_resumed_equals_uninterrupted_to_the_byte(
    where: str, settings, stage_at, watched, watched_config, monkeypatch
) -> None:
    directory = stage_at(f"watched-stopped {where}")
    numbers = iter(range(100))
    if where == "between checkpoints":
        dying_in_the_fourth_iteration(monkeypatch)
    else:
        original_judge = held_out.Judge.judge

        def asked_to_end(self, prompts):
            number = next(numbers)
            if number == 3 and where == "in the evaluation":
                monkeypatch.setattr(interruption, "_requested", signal.SIGTERM)
            judged = original_judge(self, prompts)
            if number == 3:
                monkeypatch.setattr(interruption, "_requested", signal.SIGTERM)
            return judged

        monkeypatch.setattr(held_out.Judge, "judge", asked_to_end)
    with pytest.raises((interruption.Interrupted, KeyboardInterrupt)):
        run_stage(watched_config(), settings, directory)
    monkeypatch.undo()
    newest = max(folder.name for folder in directory.checkpoints.glob("checkpoint-*"))
    assert newest == ("checkpoint-2" if where == "between checkpoints" else "checkpoint-3")
    assert run_stage(watched_config(), settings, directory) == watched[1]
    assert_same_bytes(directory, watched[0])


def scripted(monkeypatch, values: list[float]) -> None:
    """Let the held-out evaluations find these rewards, one after the other."""
    script: Iterator[float] = iter(values)

    def scored(scorer, prompts, answers):
        value = next(script)
        return [Score(value, None, 0.5, None, "helpfulness", 0.5) for _ in answers]

    monkeypatch.setattr(held_out, "score_answers", scored)


@pytest.fixture(scope="session")
def one_iteration(settings, stage_at, watched_config):
    """The policy after the first iteration."""
    directory = stage_at("watched-one-iteration")
    run_stage(watched_config(keep="last", training={"iterations": 1}), settings, directory)
    return directory


def test_early_stopping_and_the_best_policy(
    settings, stage_at, watched_config, one_iteration, monkeypatch, capsys
) -> None:
    scripted(monkeypatch, [0.0, 2.0, 1.0, 2.0])
    directory = stage_at("watched-early")
    config = watched_config(independent=None, early_stopping={"patience": 2}, training={"iterations": 9})
    metrics = run_stage(config, settings, directory)
    assert (metrics["iterations"], metrics["kept_iteration"]) == (3, 1)
    reason = "for 2 evaluations the held-out reward has not risen above 2, which it had after 1 iterations"
    assert metrics["stopped_by"] == {"name": "early_stopping", "iteration": 3, "reason": reason}
    assert f"watched-early: stopped after iteration 3: {reason}" in capsys.readouterr().err
    assert [event["name"] for event in events(directory, "stopped_early")] == ["early_stopping"]
    assert events(directory, "guard") == []
    assert same(directory.model, one_iteration.model)


def dying_in_the_fourth_iteration(monkeypatch) -> None:
    """A kill at the value model's last step of the fourth iteration."""
    original = learners.ValueLearner.step
    steps = iter(range(100))

    def dies(self, mini_batch, experience):
        if next(steps) == 7:
            raise KeyboardInterrupt
        return original(self, mini_batch, experience)

    monkeypatch.setattr(learners.ValueLearner, "step", dies)


def test_the_best_weights_outlive_a_kill_that_comes_after_better_ones(
    settings, stage_at, watched_config, one_iteration, monkeypatch
) -> None:
    """Best after 1, better after 3, killed, resumed from the checkpoint after 2; this time 3 is not as good."""
    directory = stage_at("watched-best-again")
    config = watched_config(independent=None)
    scripted(monkeypatch, [0.0, 2.0, 1.0, 3.0])
    dying_in_the_fourth_iteration(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run_stage(config, settings, directory)
    assert sorted(folder.name for folder in directory.checkpoints.glob("best-*")) == ["best-1", "best-3"]
    monkeypatch.undo()
    scripted(monkeypatch, [1.5, 0.0])
    metrics = run_stage(config, settings, directory)
    assert (metrics["kept_iteration"], metrics["iterations"]) == (1, 4)
    assert same(directory.model, one_iteration.model)
    assert [folder.name for folder in directory.checkpoints.glob("best-*")] == ["best-1"]
    directory.drop_progress()  # as the pipeline does when the stage is done
    assert not list(directory.checkpoints.glob("best-*"))


def test_keep_last(settings, stage_at, watched_config, watched, monkeypatch) -> None:
    scripted(monkeypatch, [5.0, 4.0, 3.0, 2.0, 1.0])
    directory = stage_at("watched-last")
    config = watched_config(independent=None, keep="last", early_stopping="off")
    metrics = run_stage(config, settings, directory)
    assert (metrics["kept_iteration"], metrics["stopped_by"]) == (4, None)
    assert not list(directory.checkpoints.glob("best-*"))
    policy, saved = (
        weights(directory.model),
        load_file(directory.checkpoints / "checkpoint-4/policy.safetensors"),
    )
    assert all(torch.equal(policy[name], saved[name]) for name in saved)


def test_a_guard_that_stops(settings, stage_at, watched_config, monkeypatch, capsys) -> None:
    """KL is above 0 from the second batch on, and three batches are what a guard looks at."""
    directory = stage_at("watched-guard")
    config = watched_config(held_out=[], independent=None, guards={"kl": {"action": "stop", "bound": 1e-9}})
    metrics = run_stage(config, settings, directory)
    assert metrics["iterations"] == 3
    (found,) = metrics["guards"]
    assert (found["guard"], found["action"], found["iteration"]) == ("kl", "stop", 3)
    assert metrics["stopped_by"] == {"name": "kl", "iteration": 3, "reason": found["reason"]}
    assert f"watched-guard: stopped after iteration 3: {found['reason']}" in capsys.readouterr().err
    (event,) = events(directory, "guard")
    assert event["reason"] == found["reason"]
    assert {row["iteration"] for row in rows_of(directory.samples)} == {0, 1, 2, 3}
    assert weights(directory.model)


def nan_from(step: int, monkeypatch) -> None:
    """The value loss is NaN from this gradient step on; an iteration has two."""
    original = learners.value_loss
    calls = iter(range(100))

    def broken(values, *rest, **more):
        return values.sum() * math.nan if next(calls) >= step else original(values, *rest, **more)

    monkeypatch.setattr(learners, "value_loss", broken)


def test_a_loss_that_is_not_finite_ends_the_stage_with_the_best_policy(
    settings, stage_at, watched_config, one_iteration, monkeypatch
) -> None:
    scripted(monkeypatch, [0.0, 2.0, 1.0])
    nan_from(4, monkeypatch)  # in the third iteration
    directory = stage_at("watched-nan")
    metrics = run_stage(watched_config(independent=None), settings, directory)
    assert (metrics["iterations"], metrics["kept_iteration"]) == (2, 1)
    assert metrics["stopped_by"]["name"] == "not_finite"
    assert "value loss became nan" in metrics["stopped_by"]["reason"]
    assert [finding["guard"] for finding in metrics["guards"]] == ["not_finite"]
    assert same(directory.model, one_iteration.model)


@pytest.mark.parametrize(
    ("first", "changes"),
    [
        (4, {"guards": {"not_finite": {"action": "error"}}}),
        (0, {}),  # nothing was learned yet
        (4, {"training": {"warmup_iterations": 2}}),  # nor here by the policy
    ],
)
def test_a_loss_that_is_not_finite_is_an_error_where_there_is_nothing_to_keep(
    first: int, changes: dict, settings, stage_at, watched_config, monkeypatch
) -> None:
    nan_from(first, monkeypatch)
    config = watched_config(held_out=[], independent=None, **changes)
    directory = stage_at(f"watched-nan-error-{first}-{len(changes.get('guards', ''))}")
    with pytest.raises(TrainingError, match="value loss became nan"):
        run_stage(config, settings, directory)
    assert not directory.model.exists()


@pytest.mark.parametrize("action", ["stop", "error"])
def test_a_metric_that_is_not_finite(action: str, settings, stage_at, watched_config, monkeypatch) -> None:
    original = loop.batch_measures
    calls = iter(range(100))

    def measured(*given):
        return original(*given) | ({"kl_k3_nats": math.inf} if next(calls) == 1 else {})

    monkeypatch.setattr(loop, "batch_measures", measured)
    directory = stage_at(f"watched-inf-{action}")
    config = watched_config(held_out=[], independent=None, guards={"not_finite": {"action": action}})
    if action == "error":
        with pytest.raises(TrainingError, match="kl_k3_nats became NaN or infinite"):
            run_stage(config, settings, directory)
        return
    metrics = run_stage(config, settings, directory)
    assert (metrics["iterations"], metrics["stopped_by"]["name"]) == (2, "not_finite")
    last = rows_of(directory.metrics_file)[-1]
    assert (last["kl_k3_nats"], last["not_finite"]) == (None, ["kl_k3_nats"])


def test_sampler_and_trainer_agree_and_a_difference_is_told(
    settings, stage_at, watched, watched_config, monkeypatch
) -> None:
    for row in rows_of(watched[0].metrics_file):
        assert 0 < row["sampler_logprob_difference"] < 1e-5
        assert row["sampler_logprob_difference"] <= row["sampler_logprob_difference_max"] < 1e-4
    assert watched[1]["guards"] == []
    original = batch_measures.sampled_logprobs
    monkeypatch.setattr(batch_measures, "sampled_logprobs", lambda *given: original(*given) + 0.02)
    directory = stage_at("watched-sampler")
    run_stage(watched_config(training={"iterations": 1}), settings, directory)
    (found,) = events(directory, "guard")
    assert "sampler and trainer differ by 0.02 nats a token, above 0.01" in found["reason"]
    directory = stage_at("watched-sampler-bound")
    run_stage(watched_config(training={"iterations": 1}, max_sampler_difference=0.03), settings, directory)
    assert events(directory, "guard") == []


def test_ratios_over_the_micro_batches_of_all_steps(settings, stage_at, watched_config, monkeypatch) -> None:
    """Against the ratios that the loss was given: two steps, of two micro-batches each."""
    seen: list[torch.Tensor] = []
    original = learners.policy_loss

    def watched_loss(logprobs, old_logprobs, advantages, *, response_mask, clip_range):
        seen.append((logprobs - old_logprobs).detach().double()[response_mask].exp())
        return original(
            logprobs, old_logprobs, advantages, response_mask=response_mask, clip_range=clip_range
        )

    monkeypatch.setattr(learners, "policy_loss", watched_loss)
    directory = stage_at("watched-ratios")
    training = {"iterations": 1, "micro_batch_size": 2}
    run_stage(watched_config(held_out=[], independent=None, training=training), settings, directory)
    (row,) = rows_of(directory.metrics_file)
    steps = [torch.cat(seen[:2]), torch.cat(seen[2:])]
    assert bool((steps[0] == 1).all())
    largest = steps[1].max().item()
    assert largest > 1.0001
    assert row["ratio_max"] == pytest.approx(largest, rel=1e-6)
    assert row["ratio_mean"] == pytest.approx((1 + steps[1].mean().item()) / 2, rel=1e-6)
    kl = (steps[1] - 1 - steps[1].log()).mean().item() / 2
    assert row["update_kl_nats"] == pytest.approx(kl, rel=1e-5)


def test_held_out_prompts_that_are_trained_on_are_told(
    settings, stage_at, watched_config, world, tmp_path
) -> None:
    seen, unseen = (rows_of(world / f"{name}.jsonl")[:3] for name in ("prompts", "unseen_prompts"))
    write_rows(tmp_path / "mixed.jsonl", [*seen, *unseen])
    directory = stage_at("watched-overlap")
    config = watched_config(held_out=[str(tmp_path / "mixed.jsonl")], training={"iterations": 1})
    run_stage(config, settings, directory)
    (warning,) = events(directory, "warning")
    assert "held_out: 3 of 6 prompts are among those that are trained on" in warning["message"]


def test_the_time_of_each_phase_of_each_iteration(watched) -> None:
    found = events(watched[0], "ppo_iteration")
    assert [event["iteration"] for event in found] == [1, 2, 3, 4]
    (total,) = events(watched[0], "ppo_finished")
    for phase in ("sampling", "scoring", "logprobs", "update"):
        parts = [event[f"{phase}_seconds"] for event in found]
        assert all(part > 0 for part in parts)
        assert sum(parts) == pytest.approx(total[f"{phase}_seconds"], abs=2e-3)
    assert total["evaluation_seconds"] > 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"guards": {"kl_nats": {"bound": 3}}},
            "guards.kl_nats: unknown key; allowed: complete, entropy, kl, length, not_finite, reward_hacking",
        ),
        ({"guards": {"lenght": {}}}, 'guards.lenght: unknown key (did you mean "length"?); allowed'),
        ({"guards": {"kl": {"limit": 3}}}, "guards.kl.limit: unknown key; allowed: action, bound"),
        ({"guards": {"kl": {"action": "halt"}}}, "guards.kl.action: Input should be 'warn', 'stop' or 'off'"),
        (
            {"guards": {"not_finite": {"action": "warn"}}},
            "guards.not_finite.action: Input should be 'stop' or",
        ),
        ({"guards": {"length": {"bound": 1.0}}}, "guards.length.bound: Input should be greater than 1"),
        (
            {"held_out": [], "independent": None, "early_stopping": {"patience": 3}},
            "early_stopping needs prompts to",
        ),
        (
            {"held_out": [], "independent": None, "keep": "best"},
            "keep: best needs prompts to judge the policy on",
        ),
        ({"held_out": []}, "independent needs prompts to judge the policy on: name them in held_out"),
        (
            {"early_stopping": {"patience": 0}},
            "early_stopping.patience: Input should be greater than or equal to 1",
        ),
    ],
)
def test_mistakes_in_the_configuration(change: dict, said: str, watched_config, file_of) -> None:
    file = file_of(watched_config())
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | change))
    with pytest.raises(RecipeError) as error:
        load_stage_config(file, "ppo", [])
    assert said in str(error.value)
    assert len(error.value.problems) == 1


def test_what_a_recipe_may_name_there(watched_config) -> None:
    """Data and reward models, which recipes check and hash, in every field that names some."""
    kinds = {referring.field: referring.kind for referring in references(watched_config())}
    assert (kinds["held_out"], kinds["independent"]) == ("data", "reward_model")


def test_one_file_is_not_trained_on_and_held_out(watched_config, world) -> None:
    with pytest.raises(ValueError, match=r"prompts\.jsonl is in prompts and in held_out"):
        watched_config(held_out=[str(world / "prompts.jsonl")])


def test_off_as_yaml_reads_it_and_defaults(watched_config, file_of) -> None:
    file = file_of(watched_config())
    text = file.read_text().replace("early_stopping: null", "early_stopping: off")
    assert "early_stopping: off" in text
    file.write_text(text.replace("action: warn", "action: off"))
    config, _ = load_stage_config(file, "ppo", [])
    assert isinstance(config, PpoConfig)
    assert config.stopping is None
    assert config.guards.kl.action == "off"
    assert config.keeps_best
    config = watched_config()
    assert config.stopping is not None
    assert config.stopping.patience == 5
    config = watched_config(held_out=[], independent=None)
    assert (config.stopping, config.keeps_best) == (None, False)
    assert not watched_config(keep="last").keeps_best
    assert [config.sampler_bound(precision) for precision in ("float32", "bfloat16")] == [0.01, 0.1]
