"""What cross-entropy training does to a model: the loss it minimises, and that batching changes nothing."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from small_sft import loss_from_the_definition, records, train
from transformers import TrainingArguments

from llama2_chat.errors import TrainingError, UserInputError
from llama2_chat.packing import pack
from llama2_chat.settings import BaseModelSource, RunSettings
from llama2_chat.sft.config import SftTraining
from llama2_chat.sft.held_out import HeldOut
from llama2_chat.tokenization import TokenizedDialogue
from llama2_chat.training import count_steps, keep_to_device, warmup_steps


def test_the_loss_is_the_mean_over_answer_tokens(tiny_llama, dialogues, settings, stage_directory) -> None:
    directory = stage_directory()
    expected = loss_from_the_definition(tiny_llama(), dialogues)
    train(tiny_llama(), dialogues, settings, directory, batch_size=64, epochs=1)
    assert records(directory)[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_training_lowers_the_loss_of_answers(tiny_llama, dialogues, settings, stage_directory) -> None:
    model = tiny_llama()
    before = loss_from_the_definition(model, dialogues)
    metrics = train(model, dialogues, settings, stage_directory(), epochs=8, learning_rate=5e-3)
    assert loss_from_the_definition(model, dialogues) < 0.6 * before
    assert metrics["loss_last"] < metrics["loss_first"]
    assert metrics["trained_tokens"] == sum(sum(d.loss_mask) for d in dialogues)


def test_prompts_are_not_learnt(tiny_llama, settings, stage_directory) -> None:
    # Token 30 fills the prompt. Were the prompt trained, it would become the likely successor of BOS.
    dialogue = TokenizedDialogue([1, 30, 30, 30, 5, 2], [False] * 4 + [True] * 2)
    before, model = tiny_llama(), tiny_llama()
    train(model, [dialogue] * 8, settings, stage_directory(), epochs=20)

    def probability(of: int, after: list[int], under) -> float:
        return under(input_ids=torch.tensor([after])).logits[0, -1].softmax(-1)[of].item()

    assert probability(30, [1], model) < probability(30, [1], before)
    assert probability(5, [1, 30, 30, 30], model) > 2 * probability(5, [1, 30, 30, 30], before)
    assert probability(2, [1, 30, 30, 30, 5], model) > 2 * probability(2, [1, 30, 30, 30, 5], before)


def test_equivalence_of_accumulated_and_one_batch(tiny_llama, dialogues, settings, stage_directory) -> None:
    """8 × 1 rows against 1 × 8 rows a step, rows of unequal numbers of trained tokens: losses and weights."""
    whole, parts = tiny_llama(), tiny_llama()
    train(whole, dialogues, settings, stage_directory("whole"), batch_size=8)
    train(parts, dialogues, settings, stage_directory("parts"), batch_size=8, micro_batch_size=1)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(records(stage_directory("whole")), records(stage_directory("parts")), strict=True):
        # Loss, gradient norm and accuracy; transformers counts an epoch's parts in micro-batches.
        assert {**a, "epoch": 0} == pytest.approx({**b, "epoch": 0}, rel=1e-4)


def test_packing_equivalence_to_one_dialogue_a_row(tiny_llama, dialogues, settings, stage_directory) -> None:
    """All dialogues in one step, packed into rows of 64 tokens against a row for each: loss, gradient norm, weights."""
    packed, separate = tiny_llama(), tiny_llama()
    train(packed, dialogues, settings, stage_directory("packed"), batch_size=64, sequence_length=64)
    longest = max(len(d.input_ids) for d in dialogues)
    train(separate, dialogues, settings, stage_directory("separate"), batch_size=64, sequence_length=longest)
    for line, other in zip(*(records(stage_directory(name)) for name in ("packed", "separate")), strict=True):
        assert line == pytest.approx(other, rel=1e-4)  # loss and norm of the gradient among them
    for a, b in zip(packed.parameters(), separate.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def weights(model) -> dict[str, bytes]:
    return {name: p.detach().numpy().tobytes() for name, p in model.named_parameters()}


@pytest.mark.parametrize("stop_after", [1, 3, 7])
def test_interrupted_and_resumed_equals_uninterrupted_to_the_byte(
    tiny_llama, dialogues, settings, stage_directory, interrupted_after, stop_after: int
) -> None:
    """A run stopped by a signal and continued against one that ran through: weights and metrics."""
    whole, directory = tiny_llama(), stage_directory("whole")
    train(whole, dialogues, settings, directory)

    interrupted = stage_directory("interrupted")
    with interrupted_after(stop_after):
        train(tiny_llama(), dialogues, settings, interrupted)
    assert len(records(interrupted)) == stop_after
    resumed = tiny_llama()
    train(resumed, dialogues, settings, interrupted)
    assert weights(resumed) == weights(whole)
    assert interrupted.metrics_file.read_bytes() == directory.metrics_file.read_bytes()


def test_a_half_written_checkpoint_is_not_resumed_from(
    tiny_llama, dialogues, settings, stage_directory
) -> None:
    """A folder with a half-written checkpoint against an empty one: weights and metrics."""
    whole, directory = tiny_llama(), stage_directory("whole")
    train(whole, dialogues, settings, directory)
    broken = stage_directory("broken")
    (broken.checkpoints / "checkpoint-3").mkdir(parents=True)
    (broken.checkpoints / "checkpoint-3" / "model.safetensors").write_bytes(b"half")
    broken.metrics_file.write_text('{"step": 1, "loss"')
    model = tiny_llama()
    train(model, dialogues, settings, broken)
    assert weights(model) == weights(whole)
    assert broken.metrics_file.read_bytes() == directory.metrics_file.read_bytes()


def test_a_checkpoint_of_another_launch_is_not_resumed_from(
    tiny_llama, dialogues, settings, stage_directory, interrupted_after
) -> None:
    """One process against a checkpoint that says two wrote it; the checkpoint stays."""
    directory = stage_directory()
    with interrupted_after(3):
        train(tiny_llama(), dialogues, settings, directory)
    marker = directory.checkpoints / "checkpoint-3" / "complete"
    assert marker.read_text() == "1 process"
    marker.write_text("2 processes with shared weights")
    with pytest.raises(
        UserInputError, match="checkpoint-3 was written by 2 processes with shared weights, this is 1"
    ):
        train(tiny_llama(), dialogues, settings, directory)
    marker.write_text("")  # as earlier versions left it
    train(tiny_llama(), dialogues, settings, directory)


def test_two_checkpoints_stay_without_optimiser_state(
    tiny_llama, dialogues, settings, stage_directory
) -> None:
    """What a stage goes on from stays until the stage is done: a kill while its model is written costs no training."""
    directory = stage_directory()
    train(tiny_llama(), dialogues, settings, directory)
    kept = sorted(directory.checkpoints.glob("checkpoint-*"))
    assert len(kept) == len(list(directory.checkpoints.rglob("optimizer.pt"))) == 2
    directory.drop_progress()
    assert sorted(directory.checkpoints.glob("checkpoint-*")) == kept
    names = {file.name for folder in kept for file in folder.iterdir()}
    assert names == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "trainer_state.json",
        "complete",
    }


@pytest.mark.parametrize("limit", [{"max_steps": 5}, {"epochs": 1.5}])
def test_resume_from_the_last_step_trains_nothing(
    tiny_llama, dialogues, settings, stage_directory, limit: dict[str, float]
) -> None:
    """A run that ended within an epoch and runs again, as after a kill while its model was written, against itself."""
    directory, model, again = stage_directory(), tiny_llama(), tiny_llama()
    first = train(model, dialogues, settings, directory, checkpoint_steps=1, **limit)
    metrics = directory.metrics_file.read_bytes()
    assert train(again, dialogues, settings, directory, checkpoint_steps=1, **limit) == first
    assert weights(again) == weights(model)
    assert directory.metrics_file.read_bytes() == metrics


def test_a_loss_that_is_not_finite_ends_training(tiny_llama, dialogues, settings, stage_directory) -> None:
    with pytest.raises(TrainingError, match=r"became (nan|inf) at step \d+; lower training.learning_rate"):
        train(tiny_llama(), dialogues, settings, stage_directory(), learning_rate=1e30, max_grad_norm=1e30)


def test_nothing_to_train_on_is_the_users_mistake(tiny_llama, settings, stage_directory) -> None:
    with pytest.raises(UserInputError, match="no token to train on"):
        train(tiny_llama(), [TokenizedDialogue([1, 5], [False, False])], settings, stage_directory())


def test_micro_batches_must_fill_the_batch(tiny_llama, dialogues, settings, stage_directory) -> None:
    with pytest.raises(UserInputError, match="micro_batch_size: 3 does not divide"):
        train(tiny_llama(), dialogues, settings, stage_directory(), micro_batch_size=3)


def test_steps_and_warmup() -> None:
    training = SftTraining(batch_size=64, epochs=2)
    assert count_steps(27_540, training) == 2 * 431  # 27,540 / 64 = 430.3
    assert count_steps(27_540, SftTraining(batch_size=64, epochs=2, max_steps=10)) == 10
    paper = SftTraining(warmup_ratio=0.03, min_warmup_steps=5)
    assert warmup_steps(1000, paper) == 30
    assert warmup_steps(100, paper) == 5
    assert warmup_steps(3, paper) == 2


def test_metrics_hold_no_times(tiny_llama, dialogues, settings, stage_directory) -> None:
    directory = stage_directory()
    train(tiny_llama(), dialogues, settings, directory)
    assert len(records(directory)) > 5
    assert not any("runtime" in key or "per_second" in key for row in records(directory) for key in row)
    assert Path(os.path.commonpath([directory.path, directory.checkpoints])) == directory.path


def test_tensorboard_gets_the_losses_that_metrics_hold(
    tiny_llama, dialogues, settings, stage_directory
) -> None:
    """Scalars read back with tensorboard's own reader, against metrics.jsonl."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory = stage_directory()
    train(tiny_llama(), dialogues, settings.model_copy(update={"report_to": ["tensorboard"]}), directory)
    events = EventAccumulator(str(directory.tracking))
    events.Reload()
    for tag in ("loss", "learning_rate", "grad_norm"):
        found = {event.step: event.value for event in events.Scalars(f"train/{tag}")}
        assert found == pytest.approx({line["step"]: line[tag] for line in records(directory)}, rel=1e-5)
    assert len(found) > 5


def test_tensorboard_gets_what_is_measured_and_each_step_once(
    tiny_llama, dialogues, settings, stage_directory, interrupted_after
) -> None:
    """Held-out losses of a run that was stopped and resumed, against metrics.jsonl."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = settings.model_copy(update={"report_to": ["tensorboard"]})
    directory, held_out = stage_directory(), HeldOut(pack(dialogues[:8], 32), 0, every=1)
    with interrupted_after(4):
        train(tiny_llama(), dialogues, settings, directory, held_out)
    train(tiny_llama(), dialogues, settings, directory, held_out)
    events = EventAccumulator(str(directory.tracking))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/held_out_loss")]
    expected = {line["step"]: line["held_out_loss"] for line in records(directory)}
    assert dict(found) == pytest.approx(expected, rel=1e-5)
    assert len(found) == len(expected) == 8


def test_a_tracker_that_is_not_installed(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="wandb is not installed; pip install wandb"):
        RunSettings(base_model=BaseModelSource(path="base"), report_to=["wandb"])


def test_weights_decay_and_norms_do_not(
    tiny_llama, dialogues, settings, stage_directory, monkeypatch
) -> None:
    """With every gradient zero AdamW only decays: matrices by (1 - rate · 0.5) at each step, norms not at all."""
    model, start = tiny_llama(), tiny_llama().state_dict()
    monkeypatch.setattr(
        "llama2_chat.sft.trainer.PackedSftTrainer.training_step",
        lambda self, model, inputs, num_items_in_batch=None: (
            sum(p.sum() for p in model.parameters()).mul(0).backward() or torch.zeros(())
        ),
    )
    directory = stage_directory()
    train(model, dialogues, settings, directory, weight_decay=0.5)
    left = math.prod(1 - 0.5 * line["learning_rate"] for line in records(directory))
    assert left < 0.999
    matrices = 0
    for name, weight in model.state_dict().items():
        factor = 1.0 if name.endswith("norm.weight") else left
        torch.testing.assert_close(weight, start[name] * factor, rtol=1e-5, atol=1e-7, msg=name)
        matrices += factor != 1.0
    assert matrices == 2 * 7 + 2  # seven in each layer, embeddings and head


@pytest.mark.parametrize(("device", "index"), [("cuda", 0), ("cuda:1", 1)])
def test_one_process_keeps_to_its_gpu(settings, monkeypatch, tmp_path, device: str, index: int) -> None:
    """On a machine with four GPUs transformers' arguments name the recipe's one, as the only one."""
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    arguments._n_gpu = 4
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    keep_to_device(arguments, settings.model_copy(update={"device": device}))
    assert (arguments.device, arguments.n_gpu) == (torch.device("cuda", index), 1)
    assert current == [arguments.device]
