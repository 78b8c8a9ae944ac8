"""Watching a policy on held-out dialogues: before, in the course of and after training."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from small_sft import loss_from_the_definition, records, train

from llama2_chat.dialogue import Dialogue, Message
from llama2_chat.errors import UserInputError
from llama2_chat.packing import pack
from llama2_chat.sft.config import SftConfig
from llama2_chat.sft.held_out import HeldOut, Questions, questions_of
from llama2_chat.sft.trainer import trained_token_loss
from llama2_chat.tokenization import TokenizedDialogue


def measure(model, held_out: HeldOut) -> dict:
    """With the plain model, no trainer about it."""

    def score(**batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return trained_token_loss(model, **batch)

    return held_out.measure(score, torch.device("cpu"), None)


@pytest.mark.parametrize("length", [32, 128])
def test_held_out_loss_is_the_mean_over_answer_tokens_however_packed(
    tiny_llama, dialogues, length: int
) -> None:
    model = tiny_llama()
    found = measure(model, HeldOut(pack(dialogues, length), 0))
    assert found["loss"] == pytest.approx(loss_from_the_definition(model, dialogues), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    right = 0
    for dialogue in dialogues:
        logits = model(input_ids=torch.tensor([dialogue.input_ids])).logits[0]
        guesses = [None, *logits.argmax(-1).tolist()[:-1]]
        rows = zip(guesses, dialogue.input_ids, dialogue.loss_mask, strict=True)
        right += sum(guess == token for guess, token, trained in rows if trained)
    trained = sum(sum(d.loss_mask) for d in dialogues)
    assert (found["trained_tokens"], found["token_accuracy"]) == (trained, pytest.approx(right / trained))


def test_held_out_dialogues_need_an_answer(tiny_llama) -> None:
    nothing = [TokenizedDialogue([1, 5, 6], [False] * 3)]
    with pytest.raises(UserInputError, match="held_out"):
        measure(tiny_llama(), HeldOut(pack(nothing, 8), 0))


def test_measured_before_during_and_after(tiny_llama, dialogues, settings, stage_directory) -> None:
    """The line of a step holds the loss of the weights after that step, which later steps start from."""
    seen, unseen = dialogues[:32], dialogues[32:]
    held_out = HeldOut(pack(unseen, 32), 0, every=2)
    directory, model = stage_directory(), tiny_llama()
    before = loss_from_the_definition(model, unseen)
    found = train(model, seen, settings, directory, held_out, epochs=3)["held_out"]
    assert found["before"]["loss"] == pytest.approx(before, rel=1e-5)
    assert found["after"]["loss"] == pytest.approx(loss_from_the_definition(model, unseen), rel=1e-5)
    lines = records(directory)
    assert [line["step"] for line in lines if "held_out_loss" in line] == [
        line["step"] for line in lines if line["step"] % 2 == 0
    ]

    half = tiny_llama()
    train(half, seen, settings, stage_directory("half"), epochs=3, max_steps=None, checkpoint_steps=2)
    checkpoint = type(half).from_pretrained(
        stage_directory("half").checkpoints / f"checkpoint-{lines[-1]['step']}"
    )
    assert found["after"]["loss"] == pytest.approx(loss_from_the_definition(checkpoint, unseen), rel=1e-5)


def test_watching_changes_nothing_that_is_trained(tiny_llama, dialogues, settings, stage_directory) -> None:
    """Weights and losses are those of a run without held-out dialogues."""
    alone, watched = tiny_llama(), tiny_llama()
    train(alone, dialogues, settings, stage_directory("alone"))
    train(watched, dialogues, settings, stage_directory("watched"), HeldOut(pack(dialogues, 32), 0, every=1))
    for name, weight in alone.state_dict().items():
        assert torch.equal(weight, watched.state_dict()[name]), name
    losses = [[line["loss"] for line in records(stage_directory(name))] for name in ("alone", "watched")]
    assert losses[0] == losses[1]
    assert watched.training is False


class _Format:
    """Text is numbers with spaces; 2 ends an answer."""

    stop_id = 2

    def prompt_ids(self, messages) -> list[int]:
        return [1, *(int(word) for message in messages for word in message.content.split())]

    def decode_response(self, ids) -> str:
        return " ".join(str(token) for token in ids)


def ask(file: Path) -> Questions:
    return Questions([(Message("user", "5 6"),), (Message("user", "7"),)], _Format(), 0, file)


def test_answers_in_the_course_of_training(
    tiny_llama, dialogues, settings, stage_directory, interrupted_after, capsys
) -> None:
    """Interrupted and resumed leaves the same answers and metrics as uninterrupted, to the byte."""

    def run(directory) -> None:
        held_out = HeldOut(pack(dialogues[:8], 32), 0, every=2, questions=ask(directory.answers))
        train(tiny_llama(), dialogues, settings, directory, held_out, epochs=3, checkpoint_steps=3)

    whole, broken = stage_directory("whole"), stage_directory("broken")
    run(whole)
    printed = capsys.readouterr().err
    rows = [json.loads(line) for line in whole.answers.read_text().splitlines()]
    steps = [line["step"] for line in records(whole) if "held_out_loss" in line]
    assert len(steps) >= 3
    assert [row["step"] for row in rows] == [step for step in steps for _ in range(2)]
    assert rows[0]["prompt"] == [{"role": "user", "content": "5 6"}]
    assert f"step {steps[0]}: '5 6' -> {rows[0]['response']!r}" in printed

    with interrupted_after(5):
        run(broken)
    with broken.answers.open("a") as stream:  # what a kill after a later measurement would leave
        stream.write(json.dumps({"step": 6, "prompt": [], "response": "left over"}) + "\n")
    run(broken)
    assert broken.answers.read_bytes() == whole.answers.read_bytes()
    assert broken.metrics_file.read_bytes() == whole.metrics_file.read_bytes()


def test_answers_are_those_of_the_weights_at_that_step(tiny_llama, settings, stage_directory) -> None:
    """After many steps on one answer the policy gives it; before, it does not."""
    dialogue = TokenizedDialogue([1, 5, 6, 9, 8, 2], [False] * 3 + [True] * 3)
    directory = stage_directory()
    held_out = HeldOut(pack([dialogue], 32), 0, every=30, questions=ask(directory.answers))
    train(
        tiny_llama(),
        [dialogue] * 4,
        settings,
        directory,
        held_out,
        epochs=60,
        learning_rate=1e-2,
        sequence_length=8,
    )
    rows = [json.loads(line) for line in directory.answers.read_text().splitlines()]
    assert rows[-2]["response"] == "9 8 2"


def test_questions_end_where_the_last_answer_begins() -> None:
    system, user, answer = Message("system", "s"), Message("user", "q"), Message("assistant", "a")
    whole = [
        Dialogue((system, user, answer, user, answer)),
        Dialogue((user, answer)),
        Dialogue((user, answer, user, answer)),
    ]
    assert questions_of(whole, 2) == [(system, user, answer, user), (user,)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"evaluation_steps": 5}, "evaluation_steps needs dialogues to measure on"),
        ({"held_out": ["h"], "sample_prompts": 2}, "sample_prompts are answered every evaluation_steps"),
        ({"held_out": ["h"], "evaluation_steps": 0}, "greater than or equal to 1"),
    ],
)
def test_watching_that_cannot_be(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SftConfig(dialogues=["d"], **values)
