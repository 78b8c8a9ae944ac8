"""The stages as the pipeline calls them, from files to model folders."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from llama2_chat.dialogue import Message
from llama2_chat.evaluation.config import EvaluationConfig
from llama2_chat.evaluation.run import PolicyEvaluator, run_evaluation
from llama2_chat.files import sha256_of
from llama2_chat.jsonl import read_dialogues, read_samples, write_rows
from llama2_chat.rejection_sampling import build, sample
from llama2_chat.reward.config import RewardConfig
from llama2_chat.reward.train import run_stage as run_reward
from llama2_chat.sft.config import SftConfig
from llama2_chat.sft.train import run_stage as run_sft
from llama2_chat.testbed.generators import GENERATORS
from llama2_chat.testbed.oracle import grade


def test_sft_lowers_the_loss_and_its_folder_loads_alone(sft) -> None:
    directory, metrics = sft
    assert metrics["loss_last"] < 0.7 * metrics["loss_first"]
    assert metrics["lengths"]["kept"] + metrics["lengths"]["shortened"] == metrics["sequences"]
    model = AutoModelForCausalLM.from_pretrained(directory.model)
    tokenizer = AutoTokenizer.from_pretrained(directory.model)
    assert model.config.eos_token_id == tokenizer.eos_token_id == 2
    assert model.config.bos_token_id == 1
    assert tokenizer.chat_template
    assert {file.suffix for file in directory.model.iterdir()} <= {".json", ".safetensors", ".md", ".jinja"}


def test_sft_lowers_the_loss_on_held_out_dialogues(sft) -> None:
    before, after = (sft[1]["held_out"][when] for when in ("before", "after"))
    assert after["loss"] < 0.8 * before["loss"]
    assert after["token_accuracy"] > before["token_accuracy"]
    assert sum(sft[1]["held_out"]["lengths"].values()) == 60
    (part,) = sft[1]["mix"]
    assert (part["file"], part["used"], part["share"]) == ("demonstrations.jsonl", 300, 1.0)


def test_sft_counts_each_file_of_its_mix_and_of_what_it_holds_out(world, settings, stage_at, capfd) -> None:
    """The rows of the files add up to the totals; safety demonstrations are those that the files tag."""
    safe, helpful = world / "safe.jsonl", world / "helpful.jsonl"
    split = {True: safe, False: helpful}
    dialogues = list(read_dialogues(world / "demonstrations.jsonl"))
    for tag, file in split.items():
        write_rows(file, [dialogue.to_row() for dialogue in dialogues if dialogue.is_safety == tag])
    tagged = sum(dialogue.is_safety for dialogue in dialogues)
    assert 10 < tagged < 200
    config = SftConfig(
        model=str(world / "base"),
        dialogues=[str(helpful), str(safe)],
        counts=[60, 2 * tagged + 3],
        held_out=[str(world / "held_out_demonstrations.jsonl"), str(helpful)],
        training={"batch_size": 8, "epochs": 1, "sequence_length": 40, "max_steps": 1},
    )
    directory = stage_at("sft-mixed")
    metrics = run_sft(config, settings, directory)
    mix, held_out = metrics["mix"], metrics["held_out"]
    assert [(row["file"], row["used"], row["safety"]) for row in mix] == [
        ("helpful.jsonl", 60, 0),
        ("safe.jsonl", 2 * tagged + 3, 2 * tagged + 3),
    ]
    assert sum(row["trained_tokens"] for row in mix) == metrics["trained_tokens"]
    assert sum(row["trained_tokens"] for row in held_out["files"]) == held_out["before"]["trained_tokens"]
    for rows, total in ((mix, metrics["lengths"]), (held_out["files"], held_out["lengths"])):
        assert {key: sum(row["lengths"][key] for row in rows) for key in total} == total
        assert total["shortened"] + total["dropped"] > 0
    said = capfd.readouterr().err.splitlines()
    for row in (*mix, *held_out["files"]):
        start = f"sft-mixed: {row['file']}: of {sum(row['lengths'].values())} dialogues "
        assert [line for line in said if line.startswith(start)], start
    assert [sum(row["lengths"].values()) for row in mix] == [row["used"] for row in mix]


def test_the_chat_template_renders_the_llama2_format(sft) -> None:
    tokenizer = AutoTokenizer.from_pretrained(sft[0].model)
    text = tokenizer.apply_chat_template(
        [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": " Hello "},
            {"role": "assistant", "content": "Hi."},
            {"role": "user", "content": "Bye"},
        ],
        tokenize=False,
    )
    expected = "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\n Hello [/INST] Hi. </s><s>[INST] Bye [/INST]"
    assert text == expected


def test_sft_is_the_same_twice(world, settings, stage_at, sft) -> None:
    training = {"learning_rate": 3e-3, "batch_size": 8, "epochs": 2, "sequence_length": 128}
    config = SftConfig(
        model=str(world / "base"),
        dialogues=[str(world / "demonstrations.jsonl")],
        held_out=[str(world / "held_out_demonstrations.jsonl")],
        training=training,
    )
    again = stage_at("sft-again")
    run_sft(config, settings, again)
    assert sha256_of(again.model) == sha256_of(sft[0].model)
    assert again.metrics_file.read_bytes() == sft[0].metrics_file.read_bytes()


def test_reward_stage_beats_its_controls_and_reports_what_is_attainable(rewards) -> None:
    directory, metrics = rewards["helpfulness"]
    overall = metrics["accuracy"]["overall"]
    assert overall["count"] == metrics["held_out_pairs"]["kept"] == 200
    assert overall["accuracy"] > metrics["controls"]["constant_scorer"]["accuracy"] == 0.5
    assert overall["accuracy"] < metrics["attainable_accuracy"]["overall"]["accuracy"]
    model = AutoModelForSequenceClassification.from_pretrained(directory.model)
    assert model.config.num_labels == 1
    assert model.config.pad_token_id != model.config.eos_token_id


def test_reward_stage_says_which_pairs_it_cannot_take_whole(world, sft, settings, stage_at, capfd) -> None:
    """At 24 tokens: what is said of each file, trained on or held out, against the counts in the metrics."""
    config = RewardConfig(
        model=str(sft[0].model),
        preferences=[str(world / "helpful_pairs.jsonl"), str(world / "safety_pairs.jsonl")],
        held_out=[str(world / "held_out.jsonl")],
        domain="helpfulness",
        training={"batch_size": 16, "epochs": 1, "sequence_length": 24, "max_steps": 1},
    )
    metrics = run_reward(config, settings, stage_at("short-rm"))
    files = [*metrics["pairs_by_file"], *metrics["held_out_pairs_by_file"]]
    assert [row["file"] for row in files] == ["helpful_pairs.jsonl", "safety_pairs.jsonl", "held_out.jsonl"]
    assert [row["kept"] + sum(row["dropped"].values()) for row in files] == [300, 300, 200]
    assert metrics["pairs"]["kept"] == files[0]["kept"] + files[1]["kept"] > 0
    assert metrics["held_out_pairs"].items() <= files[2].items()
    said = [line for line in capfd.readouterr().err.splitlines() if " pairs " in line]
    # The held-out pairs are measured at the model's own length, which all of them fit.
    assert len(said) == 2
    for line, row in zip(said, files[:2], strict=True):
        assert line.startswith(f"short-rm: {row['file']}: of 300 pairs ")
        cut, dropped = row["shortened"], row["dropped"]["longer than 24 tokens"]
        assert (f"{cut} shortened: oldest turns left out to fit into 24 tokens" in line) == (cut > 0)
        assert line.endswith(f"{dropped} dropped: longer than 24 tokens")
    assert files[0]["shortened"] > 0


def test_reward_stage_computes_a_prompt_once_or_says_that_it_cannot(
    world, sft, rewards, settings, stage_at, tmp_path, capfd
) -> None:
    """The same stage from a model whose attention drops weights at random, which no two answers may share."""
    tokens = rewards["helpfulness"][1]["tokens"]
    assert tokens["computed"] < 0.75 * tokens["dialogues"]
    shutil.copytree(sft[0].model, tmp_path / "dropout")
    config = json.loads((tmp_path / "dropout" / "config.json").read_text()) | {"attention_dropout": 0.1}
    (tmp_path / "dropout" / "config.json").write_text(json.dumps(config))
    stage = RewardConfig(
        model=str(tmp_path / "dropout"),
        preferences=[str(world / "helpful_pairs.jsonl")],
        domain="helpfulness",
        training={"batch_size": 16, "max_steps": 1, "sequence_length": 128},
    )
    directory = stage_at("cannot-share")
    again = run_reward(stage, settings, directory)["tokens"]
    assert again == {"dialogues": tokens["dialogues"], "computed": tokens["dialogues"]}
    message = (
        "the attention of LlamaForSequenceClassification cannot share a prompt between its two answers: "
        "every prompt is computed twice"
    )
    assert f"cannot-share: {message}" in capfd.readouterr().err
    assert message in directory.events.path.read_text()


def test_rejection_sampling_keeps_the_best_complete_sample(rejection) -> None:
    directory, metrics = rejection
    rows = [json.loads(line) for line in directory.samples.read_text().splitlines()]
    assert len(rows) == 3 * 300 == len(list(read_samples(directory.samples)))
    best = []
    for start in range(0, len(rows), 3):
        complete = [row for row in rows[start : start + 3] if row["status"] == "complete"]
        if complete:
            best.append(max(complete, key=lambda row: row["scores"]["combined"])["response"])
    assert [d.messages[-1].content for d in read_dialogues(directory.dataset)] == best
    assert len(best) > 50
    selection = metrics["selection"]
    assert selection["kept"] + selection["prompts_without_complete_answer"] == selection["prompts"] == 300
    assert selection["combined_kept"] > selection["combined_mean"]
    assert metrics["sft_share"] == pytest.approx(0.25, abs=2e-3)


def test_sampling_resumes_with_the_same_bytes(
    settings, stage_at, rejection, rejection_config, dies_in_the_second_call
) -> None:
    """Sampling stopped half-way and continued against sampling that ran through."""
    directory = stage_at("rejection-resumed")
    dies_in_the_second_call(sample, "sample_answers")
    config = rejection_config()
    with pytest.raises(KeyboardInterrupt):
        build.run_stage(config, settings, directory)
    partial = directory.samples.with_name("samples.jsonl.partial")
    with partial.open("a") as stream:
        stream.write('{"prompt": [{"role": "us')  # what a kill in the middle of a write leaves
    build.run_stage(config, settings, directory)
    assert directory.samples.read_bytes() == rejection[0].samples.read_bytes()
    assert directory.dataset.read_bytes() == rejection[0].dataset.read_bytes()
    assert sha256_of(directory.model) == sha256_of(rejection[0].model)


def test_random_selection_is_the_control(settings, stage_at, rejection, rejection_config) -> None:
    directory = stage_at("rejection-random")
    metrics = build.run_stage(rejection_config(select="random"), settings, directory)
    best = rejection[1]["selection"]
    assert metrics["selection"]["combined_kept"] < best["combined_kept"]
    assert metrics["selection"]["combined_mean"] == best["combined_mean"]


def _messages(rows) -> list[Message]:
    return [Message(row["role"], row["content"]) for row in rows]


def test_greedy_prompts_may_be_others(world, settings, tmp_path, sft, rewards) -> None:
    write_rows(tmp_path / "greedy.jsonl", GENERATORS["prompts"](rows=41, seed=9, unsafe=0.0))
    config = EvaluationConfig(
        helpfulness=str(rewards["helpfulness"][0].model),
        prompts=[str(world / "prompts.jsonl")],
        greedy_prompts=[str(tmp_path / "greedy.jsonl")],
        samples_per_prompt=1,
        sampling={"max_new_tokens": 4},
    )
    metrics, rows = PolicyEvaluator(config, settings, None).evaluate(sft[0].model)
    assert metrics["intervals"]["correctness_greedy"]["count"] == 41
    by_family = metrics["correctness_greedy_by_family"]
    greedy_rows = [row for row in rows if row["set"] == "greedy"]
    families = [grade(_messages(row["prompt"]), row["response"]).family for row in greedy_rows]
    assert set(by_family) == set(families)
    in_all = sum(by_family[family] for family in families) / 41
    assert in_all == pytest.approx(metrics["correctness_greedy"])
    assert metrics["intervals"]["oracle_helpfulness"]["count"] > 100
    assert [row["prompt"] for row in greedy_rows] == [
        row["prompt"] for row in GENERATORS["prompts"](rows=41, seed=9, unsafe=0.0)
    ]


def test_evaluation_has_the_documented_fields(world, settings, tmp_path, sft, rewards, rejection) -> None:
    config = EvaluationConfig(
        helpfulness=str(rewards["helpfulness"][0].model),
        safety=str(rewards["safety"][0].model),
        prompts=[str(world / "prompts.jsonl")],
        safety_prompts=[str(world / "prompts.jsonl")],
        samples_per_prompt=2,
        sampling={"max_new_tokens": 12},
    )
    policies = {"base": world / "base", "sft": sft[0].model, "rs": rejection[0].model}

    def evaluate():
        return run_evaluation(
            config,
            settings,
            policies=policies,
            fingerprints=dict.fromkeys(policies, "x"),
            sft="sft",
            directory=tmp_path,
            events=sft[0].events,
        )

    results = evaluate()
    assert list(results) == ["base", "sft", "rs"]
    assert results["sft"]["win_rate_vs_sft"] == 0.5
    assert results["sft"]["kl_to_sft_nats"] == 0.0
    assert results["base"]["kl_to_sft_nats"] > results["rs"]["kl_to_sft_nats"] > 0
    for row in results.values():
        for name in (
            "reward_helpfulness_mean",
            "reward_safety_mean",
            "violation_rate",
            "oracle_helpfulness",
            "oracle_violation_rate",
            "correctness_greedy",
            "best_of_2_oracle_helpfulness",
        ):
            assert row["intervals"][name]["low"] <= row[name] <= row["intervals"][name]["high"]
    stamp = (tmp_path / "rs.json").stat().st_mtime_ns
    assert evaluate() == results
    assert (tmp_path / "rs.json").stat().st_mtime_ns == stamp
