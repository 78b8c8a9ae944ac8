"""Watching a policy on held-out dialogues: before, in the course of and after training."""

from __future__ import annotations

import json
import math
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from small_sft import loss_from_the_definition, records, train

from llama2_chat import interruption
from llama2_chat.chat_format import Segment
from llama2_chat.dialogue import Dialogue, Message
from llama2_chat.errors import UserInputError
from llama2_chat.packing import pack
from llama2_chat.sft.config import SftConfig
from llama2_chat.sft.held_out import HeldOut, Questions, questions_of
from llama2_chat.sft.trainer import Watch, trained_token_loss
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
    """The line of a step holds the loss of the weights after that step: those of the checkpoint of that step."""
    seen, unseen = dialogues[:32], dialogues[32:]
    directory, model = stage_directory(), tiny_llama()
    before = loss_from_the_definition(model, unseen)
    watched = HeldOut(pack(unseen, 32), 0, every=4)
    found = train(model, seen, settings, directory, watched, epochs=3, checkpoint_steps=4)["held_out"]
    assert found["before"]["loss"] == pytest.approx(before, rel=1e-5)
    assert found["after"]["loss"] == pytest.approx(loss_from_the_definition(model, unseen), rel=1e-5)
    lines = {line["step"]: line for line in records(directory)}
    assert [step for step, line in lines.items() if "held_out_loss" in line] == [4, 8]
    weights = type(model).from_pretrained(directory.checkpoints / "checkpoint-8")
    assert lines[8]["held_out_loss"] == pytest.approx(loss_from_the_definition(weights, unseen), rel=1e-5)
    assert lines[4]["held_out_loss"] > lines[8]["held_out_loss"] > found["after"]["loss"]


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
    """Text is numbers with spaces, each a token, after a 1; 2 ends an answer."""

    stop_id = 2

    def prompt_ids(self, messages) -> list[int]:
        return [1, *(int(word) for message in messages for word in message.content.split())]

    def segments(self, messages) -> list[Segment]:
        return [Segment(self.prompt_ids(messages), trained=False)]

    def decode_response(self, ids) -> str:
        return " ".join(str(token) for token in ids)


def ask(file: Path) -> Questions:
    return Questions([(Message("user", "5 6"),), (Message("user", "7"),)], _Format(), 0, file)


def asked_every_second_step(tiny_llama, dialogues, settings, directory, *, checkpoint_steps: int) -> None:
    held_out = HeldOut(pack(dialogues[:8], 32), 0, every=2, questions=ask(directory.answers))
    train(tiny_llama(), dialogues, settings, directory, held_out, epochs=3, checkpoint_steps=checkpoint_steps)


def test_answers_in_the_course_of_training(
    tiny_llama, dialogues, settings, stage_directory, interrupted_after, capsys
) -> None:
    """Interrupted and resumed leaves the same answers and metrics as uninterrupted, to the byte."""
    run = partial(asked_every_second_step, tiny_llama, dialogues, settings, checkpoint_steps=3)

    whole, broken = stage_directory("whole"), stage_directory("broken")
    run(whole)
    printed = capsys.readouterr().err
    rows = [json.loads(line) for line in whole.answers.read_text().splitlines()]
    steps = [line["step"] for line in records(whole) if "held_out_loss" in line]
    assert len(steps) >= 3
    steps = sorted({*steps, records(whole)[-1]["step"]})  # and after the last step
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
    held_out = HeldOut(pack([dialogue], 32), 0, every=1, questions=ask(directory.answers))
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
    answers = [json.loads(line)["response"] for line in directory.answers.read_text().splitlines()][::2]
    assert answers[0] != answers[-1] == "9 8 2"


def test_a_signal_before_a_measurement_waits_for_the_checkpoint(
    tiny_llama, dialogues, settings, stage_directory, monkeypatch
) -> None:
    """SIGTERM as step 4 ends, before it is measured and questions are answered, against a run without a signal."""
    run = partial(asked_every_second_step, tiny_llama, dialogues, settings, checkpoint_steps=100)

    whole, broken = stage_directory("whole"), stage_directory("broken")
    run(whole)
    after_step = Watch.after_step

    def signalled(self: Watch, step: int) -> dict[str, float]:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return after_step(self, step)

    interruption.install_handlers()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Watch, "after_step", signalled)
            with pytest.raises(interruption.Interrupted):
                run(broken)
    finally:
        interruption.reset()
    assert [folder.name for folder in broken.checkpoints.iterdir()] == ["checkpoint-4"]
    assert "held_out_loss" in records(broken)[-1]
    run(broken)
    assert broken.answers.read_bytes() == whole.answers.read_bytes()
    assert broken.metrics_file.read_bytes() == whole.metrics_file.read_bytes()


def test_questions_end_where_the_last_answer_begins() -> None:
    """A dialogue that is too long loses its oldest turn; one whose last question is too long is passed over."""
    system, user, answer = Message("system", "9"), Message("user", "5 6"), Message("assistant", "7")
    long = Message("user", "5 6 7 8 9 10")
    dialogues = [
        Dialogue((system, user, answer, user, answer)),
        Dialogue((long, answer)),
        Dialogue((user, answer)),
        Dialogue((user, answer, user, answer, user, answer)),
        Dialogue((user, answer)),
    ]
    found = questions_of(dialogues, 3, _Format(), 6)
    assert found == [(system, user), (user,), (user, answer, user)]


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
