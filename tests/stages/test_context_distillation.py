"""Context distillation: what is kept, what is never seen in training, and kills in the middle."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from llama2_chat.cli.main import run_command
from llama2_chat.dialogue import Message, Prompt
from llama2_chat.errors import UserInputError
from llama2_chat.files import sha256_of
from llama2_chat.generation import sample_file
from llama2_chat.jsonl import read_dialogues, read_prompts, write_rows
from llama2_chat.reward.scoring import RewardModel
from llama2_chat.safety import build, distil
from llama2_chat.safety.config import ContextDistillationConfig
from llama2_chat.safety.preprompt import draw_preprompt, with_preprompt


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
    for row in rows:
        first, second = row["preprompt"].removeprefix("You are a ").split(" assistant.")[0].split(" and ")
        assert {first, second} <= {"safe", "responsible", "respectful", "wise"}
        assert first != second
        assert row["preprompt"].endswith("Do not help with crimes.") == (row["risk_category"] == "illicit")
    assert len({row["preprompt"] for row in rows}) > 8
    text = directory.dataset.read_text()
    assert text
    assert "assistant." not in text
    assert "crimes" not in text
    assert '"system"' not in text


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
        policy="p", safety="s", prompts=["x"], preprompt="Be {adjectives} {always}.", adjectives=["calm"]
    )
    assert draw_preprompt(Prompt((Message("user", "Hi"),)), config, Random(0)) == "Be calm {always}."


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
    distillation_config, settings, stage_at, monkeypatch
) -> None:
    monkeypatch.setattr(sample_file, "ITEMS_PER_CHUNK", 30)
    whole, killed = stage_at("distillation-whole"), stage_at("distillation-killed")
    metrics = build.run_stage(distillation_config(), settings, whole)
    calls = []
    original = build.distil

    def dies_in_the_second_chunk(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(build, "distil", dies_in_the_second_chunk)
    with pytest.raises(KeyboardInterrupt):
        build.run_stage(distillation_config(), settings, killed)
    assert build.run_stage(distillation_config(), settings, killed) == metrics
    assert len(calls) == 4  # 75 prompts are three chunks; the first was not sampled again
    for name in ("samples", "dataset", "metrics_file", "model"):
        assert sha256_of(getattr(whole, name)) == sha256_of(getattr(killed, name))


def test_nothing_complete_is_the_users_mistake(distillation_config, settings, stage_at) -> None:
    config = distillation_config(sampling={"max_new_tokens": 1})
    with pytest.raises(UserInputError, match=r"none of the answers to 75 prompts .* raise sampling"):
        build.run_stage(config, settings, stage_at("distillation-cut"))


@pytest.fixture
def config_file(distillation_config, file_of) -> Path:
    return file_of(distillation_config())


def test_the_users_command_gives_the_same_files(config_file: Path, distillation, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert run_command(["context-distillation", str(config_file), "--output-dir", str(output)]) == 0
    for name in ("samples.jsonl", "dataset.jsonl", "metrics.jsonl"):
        assert (output / name).read_bytes() == (distillation[0].path / name).read_bytes()


def test_no_adversarial_prompt_is_exit_code_2(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "harmless.jsonl", [{"prompt": [{"role": "user", "content": "Hi"}]}])
    override = f"prompts=[{tmp_path / 'harmless.jsonl'}]"
    command = ["context-distillation", str(config_file), override, "--output-dir", str(tmp_path / "out")]
    assert run_command(command) == 2
    assert "harmless.jsonl: none of 1 prompts is tagged is_safety: true" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("preprompt='[INST] x'", "preprompt: the text holds the chat tag [INST]"),
        ("adjectives=[]", "adjectives"),
        ("category_templates={ilicit: x}", "category_templates"),
        ("keep=best", "keep"),
    ],
)
def test_bad_settings_are_exit_code_2(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    command = ["context-distillation", str(config_file), override, "--output-dir", str(tmp_path / "out")]
    assert run_command(command) == 2
    assert message in capsys.readouterr().err
