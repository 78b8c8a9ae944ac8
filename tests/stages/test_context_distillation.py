"""Context distillation: what is kept, what is never seen in training, and kills in the middle."""

from __future__ import annotations

import json
import math
from itertools import permutations
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from llama2_chat.cli.main import run_command
from llama2_chat.dialogue import RISK_CATEGORIES, Message, Prompt
from llama2_chat.files import sha256_of
from llama2_chat.generation import sample_file
from llama2_chat.jsonl import read_dialogues, read_prompts
from llama2_chat.reward.scoring import RewardModel
from llama2_chat.safety import build, distil
from llama2_chat.safety.config import ContextDistillationConfig
from llama2_chat.safety.metrics import selection_metrics
from llama2_chat.safety.preprompt import ANSWER_TEMPLATES, PREPROMPTS, draw_preprompt, with_preprompt


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_only_better_answers_are_kept(distillation_config, settings, stage_at, world, monkeypatch) -> None:
    """With a score that can be read off the answer: its number of vowels."""
    scored = []

    def vowels(self, dialogues):
        scored.extend(dialogues)
        return torch.tensor([float(sum(c in "aeiou" for c in d[-1].content)) for d in dialogues])

    monkeypatch.setattr(RewardModel, "score_messages", vowels)
    directory = stage_at("distillation-vowels")
    metrics = build.run_stage(distillation_config(), settings, directory)
    safety_prompts = [p for p in read_prompts(world / "prompts.jsonl") if p.is_safety]
    rows = rows_of(directory.samples)
    assert [row["prompt"] for row in rows] == [[m.to_row() for m in p.messages] for p in safety_prompts]
    expected = []
    for row in rows:
        count, original = (sum(c in "aeiou" for c in row[name]) for name in ("response", "original_response"))
        assert row["scores"] == {"safety": count, "original_safety": original}
        assert row["kept"] == (row["status"] == "complete" and count > original)
        if row["kept"]:
            expected.append(row["response"])
    made = list(read_dialogues(directory.dataset))
    assert [dialogue.messages[-1].content for dialogue in made] == expected
    assert all(dialogue.is_safety for dialogue in made)
    complete = [row for row in rows if row["status"] == "complete"]
    assert 5 < len(expected) < len(complete)
    selection = metrics["selection"]
    assert (selection["prompts"], selection["passed_over"]) == (len(rows), 300 - len(rows))
    assert selection["share"] == len(expected) / len(rows)
    assert selection["safety_selected"] > selection["safety_original"]
    assert sum(c["kept"] for c in selection["by_category"].values()) == len(expected)
    # Both answers were judged as answers to the original prompt.
    assert len(scored) == 2 * len(rows)
    originals = {p.messages for p in safety_prompts}
    assert all(tuple(dialogue[:-1]) in originals for dialogue in scored)


def test_the_preprompt_is_sampled_under_and_never_trained_on(distillation) -> None:
    directory, _ = distillation
    rows = rows_of(directory.samples)
    pairs = [f"{a} and {b}" for a, b in permutations(("safe", "responsible", "respectful", "wise"), 2)]
    sentences = [template.replace("{adjectives}", pair) for template in PREPROMPTS for pair in pairs]
    for row in rows:
        sentence, template = row["preprompt"], " Do not help with crimes."
        assert sentence.endswith(template) == (row["risk_category"] == "illicit")
        assert sentence.removesuffix(template) in sentences
    drawn = {row["preprompt"].removesuffix(template) for row in rows}
    assert len(drawn) > 20
    assert all(
        any(s in drawn for s in sentences[k : k + len(pairs)]) for k in range(0, len(sentences), len(pairs))
    )
    made = [message for dialogue in read_dialogues(directory.dataset) for message in dialogue.messages]
    assert made
    text = " ".join(message.content for message in made)
    assert not any(word in text for word in ("assistant", "respectful", "crimes"))
    assert {message.role for message in made} == {"user", "assistant"}


def test_the_preprompt_changes_what_is_sampled(
    distillation, monkeypatch, distillation_config, settings, stage_at
):
    """The engine is asked for the bare prompts and for the same ones under their preprompts."""
    asked = []
    sample_answers = distil.sample_answers

    def recording(engine, chat_format, prompts, **options):
        asked.append(prompts)
        return sample_answers(engine, chat_format, prompts, **options)

    monkeypatch.setattr(distil, "sample_answers", recording)
    directory = stage_at("distillation-spied")
    build.run_stage(distillation_config(), settings, directory)
    (prompts,) = asked
    rows = rows_of(directory.samples)
    plain, careful = prompts[: len(rows)], prompts[len(rows) :]
    for row, bare, under in zip(rows, plain, careful, strict=True):
        assert [m.to_row() for m in bare] == row["prompt"]
        assert tuple(under) == (Message("system", row["preprompt"]), *bare)
    assert directory.samples.read_bytes() == distillation[0].samples.read_bytes()


def test_a_system_message_comes_after_the_preprompt() -> None:
    user = Message("user", "Hi")
    assert with_preprompt([Message("system", "Be kind."), user], "You are safe.") == (
        Message("system", "You are safe.\nBe kind."),
        user,
    )


def test_a_single_adjective_and_braces_are_legal() -> None:
    config = ContextDistillationConfig(
        policy="p", safety="s", prompts=["x"], preprompts=["Be {adjectives} {always}."], adjectives=["calm"]
    )
    drawn = draw_preprompt(Prompt((Message("user", "Hi"),)), config, Random(0))
    assert (drawn.generic, drawn.template, drawn.text) == ("Be calm {always}.", None, "Be calm {always}.")


def test_each_risk_category_has_its_own_answer_template() -> None:
    """By default; a mapping of one's own takes the place of all of them."""
    values = {"policy": "p", "safety": "s", "prompts": ["x"]}
    mine = {"hateful": "Be kind."}
    for given, expected in (({}, ANSWER_TEMPLATES), ({"category_templates": mine}, mine)):
        config = ContextDistillationConfig(**values, **given)
        for category in (*RISK_CATEGORIES, None):
            prompt = Prompt((Message("user", "Hi"),), is_safety=True, risk_category=category)
            assert draw_preprompt(prompt, config, Random(0)).template == expected.get(category)
    assert set(ANSWER_TEMPLATES) == set(RISK_CATEGORIES)
    assert len(set(ANSWER_TEMPLATES.values())) == 3


def test_a_rise_must_exceed_min_rise(distillation_config, settings, stage_at, distillation) -> None:
    """Same answers and scores; kept are those whose raw score rises by more."""
    before = rows_of(distillation[0].samples)
    rises = [row["scores"]["safety"] - row["scores"]["original_safety"] for row in before]
    positive = sorted(rise for rise, row in zip(rises, before, strict=True) if row["kept"])
    least = positive[len(positive) // 2]  # one of them: itself it does not exceed
    directory = stage_at("distillation-min-rise")
    metrics = build.run_stage(distillation_config(min_rise=least), settings, directory)
    after = rows_of(directory.samples)
    for row, old, rise in zip(after, before, rises, strict=True):
        assert row == {**old, "kept": old["kept"] and rise > least}
    expected = sum(rise > least for rise in positive)
    assert 0 < metrics["selection"]["kept"] == expected < len(positive)


def test_a_generic_answer_is_for_comparison_alone(
    distillation_config, settings, stage_at, distillation
) -> None:
    """One more answer where there is an answer template; nothing else in samples, dataset or model changes."""
    directory = stage_at("distillation-compared")
    metrics = build.run_stage(distillation_config(compare_preprompts=True), settings, directory)
    extra = ("generic_response", "generic_status")
    compared = []
    for row, old in zip(rows_of(directory.samples), rows_of(distillation[0].samples), strict=True):
        assert ("generic_response" in row) == (row["risk_category"] == "illicit")
        if "generic_response" in row:
            compared.append((row["scores"], row["generic_response"], old["response"]))
        scores = {name: value for name, value in row["scores"].items() if name != "generic_safety"}
        assert {name: value for name, value in row.items() if name not in extra} | {"scores": scores} == old
    assert any(generic != distilled for _, generic, distilled in compared)
    for name in ("dataset", "metrics_file"):
        assert getattr(directory, name).read_bytes() == getattr(distillation[0], name).read_bytes()
    found = metrics["selection"]["by_preprompt"]
    assert found["prompts"] == len(compared) > 5
    for name, field in (("none", "original_safety"), ("generic", "generic_safety"), ("category", "safety")):
        column = [scores[field] for scores, _, _ in compared]
        assert found[name]["safety"] == pytest.approx(math.fsum(column) / len(column), rel=1e-12)
        assert found[name]["unsafe"] == sum(score < 0 for score in column) / len(column)
    assert "by_preprompt" not in distillation[1]["selection"]


def test_prompts_that_are_not_adversarial_are_a_control(
    distillation_config, settings, stage_at, world
) -> None:
    directory = stage_at("distillation-everything")
    metrics = build.run_stage(distillation_config(only_adversarial=False, keep="all"), settings, directory)
    prompts = list(read_prompts(world / "prompts.jsonl"))
    rows = rows_of(directory.samples)
    assert [row["prompt"] for row in rows] == [[m.to_row() for m in p.messages] for p in prompts]
    assert [row["is_safety"] for row in rows] == [p.is_safety for p in prompts]
    flags = [dialogue.is_safety for dialogue in read_dialogues(directory.dataset)]
    assert flags == [row["is_safety"] for row in rows if row["kept"]]
    selection = metrics["selection"]
    assert selection["passed_over"] == 0
    harmless = sum(not p.is_safety for p in prompts)
    assert selection["by_category"]["not adversarial"]["prompts"] == harmless > 100


def test_the_metrics_by_hand() -> None:
    rows = [
        {"scores": {"original_safety": o, "safety": s}, "kept": k, "is_safety": f, "risk_category": c}
        for o, s, k, f, c in (
            (-1.0, 2.0, True, True, "hateful"),
            (0.5, -0.5, False, True, None),
            (-3.0, -1.0, True, True, None),
            (4.0, 1.0, False, False, None),
        )
    ]
    found = selection_metrics(rows)
    assert found["by_category"].keys() == {"hateful", "not named", "not adversarial"}
    named = found["by_category"].pop("not named")
    assert (named["prompts"], named["kept"], named["share"]) == (2, 1, 0.5)
    assert found.pop("by_category")["hateful"]["safety_selected"] == 2.0
    assert found == {
        **{"prompts": 4, "kept": 2, "share": 0.5},
        **{"safety_original": 0.125, "safety_preprompted": 0.375, "safety_selected": 1.375},
        **{"unsafe_original": 0.5, "unsafe_preprompted": 0.5, "unsafe_selected": 0.25},
    }


def test_keep_all_is_the_untargeted_control(distillation_config, settings, stage_at, distillation) -> None:
    directory = stage_at("distillation-all")
    metrics = build.run_stage(distillation_config(keep="all"), settings, directory)
    selection = metrics["selection"]
    assert selection["kept"] == selection["status"]["complete"] > distillation[1]["selection"]["kept"]
    assert selection["safety_selected"] < distillation[1]["selection"]["safety_selected"]


def test_a_policy_that_cannot_be_improved_stays_as_it_is(
    distillation_config, settings, stage_at, sft, monkeypatch
) -> None:
    monkeypatch.setattr(RewardModel, "score_messages", lambda self, dialogues: torch.zeros(len(dialogues)))
    directory = stage_at("distillation-nothing")
    metrics = build.run_stage(distillation_config(), settings, directory)
    assert list(metrics) == ["selection"]
    assert metrics["selection"]["kept"] == metrics["selection"]["share"] == 0
    assert directory.dataset.read_bytes() == directory.metrics_file.read_bytes() == b""
    made, before = (load_file(d.model / "model.safetensors") for d in (directory, sft[0]))
    assert made.keys() == before.keys()
    assert all(torch.equal(made[name], before[name]) for name in made)
    tokenizers = [AutoTokenizer.from_pretrained(d.model) for d in (directory, sft[0])]
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    events = [json.loads(line) for line in directory.events.path.read_text().splitlines()]
    assert [e["message"] for e in events if e["event"] == "warning"] == [
        "no answer under the preprompt is safer than the policy's own: the model is unchanged"
    ]


def test_a_killed_stage_ends_with_the_same_bytes(
    distillation_config, settings, stage_at, monkeypatch, dies_in_the_second_call
) -> None:
    monkeypatch.setattr(sample_file, "ITEMS_PER_CHUNK", 30)
    whole, killed = stage_at("distillation-whole"), stage_at("distillation-killed")
    metrics = build.run_stage(distillation_config(), settings, whole)
    calls = dies_in_the_second_call(build, "distil")
    with pytest.raises(KeyboardInterrupt):
        build.run_stage(distillation_config(), settings, killed)
    assert build.run_stage(distillation_config(), settings, killed) == metrics
    assert len(calls) == 4  # 75 prompts are three chunks; the first was not sampled again
    for name in ("samples", "dataset", "metrics_file", "model"):
        assert sha256_of(getattr(whole, name)) == sha256_of(getattr(killed, name))


def test_the_users_command_gives_the_same_files(
    distillation_config, file_of, distillation, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    config_file = file_of(distillation_config())
    assert run_command(["context-distillation", str(config_file), "--output-dir", str(output)]) == 0
    for name in ("samples.jsonl", "dataset.jsonl", "metrics.jsonl"):
        assert (output / name).read_bytes() == (distillation[0].path / name).read_bytes()
