"""What every training run has in common: arguments, metrics, progress, checkpoints and resume.

Supervised fine-tuning and reward training ride on TRL's trainers; this module turns a
`TrainingConfig` into their arguments and runs them so that a kill at any moment loses at most the
work since the last checkpoint and the resumed run ends with the same bytes.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as transformers_logging

from llama2_chat import distributed, interruption
from llama2_chat.cpu_memory import keep_freed_memory
from llama2_chat.errors import TrainingError, UserInputError
from llama2_chat.files import remove, write_text
from llama2_chat.models import select_device
from llama2_chat.progress import track
from llama2_chat.settings import RunSettings, Tracker, TrainingConfig
from llama2_chat.stage import StageDirectory

COMPLETE_MARKER = "complete"
Measure = Callable[[int], dict[str, float]]
"""Called after every optimiser step with its number; what it returns is added to that step's line of metrics."""
_LOGGED = ("loss", "grad_norm", "learning_rate", "mean_token_accuracy", "accuracy", "epoch")


def count_steps(sequences: int, training: TrainingConfig) -> int:
    """Optimiser steps of a run over `sequences` training sequences; the last batch of an epoch may be short."""
    steps = math.ceil(training.epochs * math.ceil(sequences / training.batch_size))
    return min(steps, training.max_steps) if training.max_steps is not None else steps


def warmup_steps(steps: int, training: TrainingConfig) -> int:
    """Steps with a rising learning rate: the configured share, at least the configured minimum, never all."""
    return min(max(training.min_warmup_steps, math.ceil(training.warmup_ratio * steps)), max(steps - 1, 0))


def trainer_arguments(
    training: TrainingConfig, settings: RunSettings, checkpoints: Path, sequences: int
) -> dict[str, Any]:
    """Keyword arguments for TRL's `SFTConfig` and `RewardConfig`.

    Raises:
        UserInputError: no sequences, or a batch that micro-batches and processes do not fill evenly.
    """
    if sequences == 0:
        raise UserInputError("no training sequence is left; see the counts of what was dropped")
    processes = distributed.process_count()
    if training.batch_size % processes:
        raise UserInputError(
            f"training.batch_size: {training.batch_size} is not a multiple of the {processes} processes"
        )
    share = training.batch_size // processes
    micro = training.micro_batch_size or share
    if share % micro:
        of_each = f", of which each of {processes} processes takes {share}" if processes > 1 else ""
        raise UserInputError(
            f"training.micro_batch_size: {micro} does not divide training.batch_size {training.batch_size}{of_each}"
        )
    steps = count_steps(sequences, training)
    return {
        "output_dir": str(checkpoints),
        "max_steps": steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": share // micro,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": training.min_learning_rate_ratio},
        "warmup_steps": warmup_steps(steps, training),
        "weight_decay": training.weight_decay,
        "adam_beta1": training.adam_beta1,
        "adam_beta2": training.adam_beta2,
        "adam_epsilon": training.adam_epsilon,
        "max_grad_norm": training.max_grad_norm,
        "optim": "adamw_torch",
        "seed": settings.seed,
        "data_seed": settings.seed,
        "bf16": settings.precision == "bfloat16",
        "use_cpu": select_device(settings.device).type == "cpu",
        "activation_checkpointing": training.gradient_checkpointing,
        "max_length": None,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": training.checkpoint_steps,
        "save_total_limit": 2,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
        "logging_nan_inf_filter": False,  # it would log 0 for a loss that is not finite
    }


def keep_to_device(arguments: TrainingArguments, settings: RunSettings) -> TrainingArguments:
    """The same arguments, with one process on the one GPU that the recipe names.

    Left alone, transformers takes `cuda:0`, and where it sees several GPUs copies the model onto all of them.
    """
    device = select_device(settings.device)
    if device.type == "cuda" and distributed.process_count() == 1:
        arguments.__dict__["_setup_devices"] = own = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(own)
        arguments._n_gpu = 1
    return arguments


class EndsAtLastStep(Trainer):
    """A trainer that does no step too many when it resumes from a checkpoint at its last step, within an epoch."""

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.args.max_steps:
            super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]
        else:
            self.control.should_training_stop = True


class StageCallback(TrainerCallback):
    """Writes metrics.jsonl and events, shows progress, marks whole checkpoints, stops on a signal."""

    def __init__(
        self, directory: StageDirectory, description: str, steps: int, measure: Measure | None
    ) -> None:
        self.directory = directory
        self.description = description
        self.steps = steps
        self.measure = measure
        self.measured: dict[str, float] = {}
        self.display = ExitStack()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Metrics and progress go on from the step that training resumes from."""
        if distributed.is_main_process():
            forget_later_steps(self.directory.metrics_file, state.global_step)
        self.bar = self.display.enter_context(
            track(self.description, total=self.steps, unit="steps", done=state.global_step)
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """A requested interruption, of any process, becomes a checkpoint and an orderly stop of all."""
        self.bar.advance(1)
        self.measured = self.measure(state.global_step) if self.measure is not None else {}
        if distributed.any_process(interruption.requested() is not None):
            control.should_save = True
            control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """One line a step: what is the same in every run, resumed or not; clocks and counters stay out."""
        if logs is None or "loss" not in logs:
            return
        record = {"step": state.global_step} | {key: logs[key] for key in _LOGGED if key in logs}
        record |= self.measured
        logs |= self.measured  # for the trackers, whose callbacks come after this one
        for name in ("loss", "grad_norm"):
            if not math.isfinite(record.get(name, 0.0)):
                raise TrainingError(
                    f"{name} became {record[name]} at step {state.global_step}; lower training.learning_rate"
                )
        if distributed.is_main_process():
            with self.directory.metrics_file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Called when all of a checkpoint's files are written, each process its own: only then does it count."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        os.sync()
        distributed.wait_for_everyone()
        if distributed.is_main_process():
            write_text(folder / COMPLETE_MARKER, distributed.launch())

    def close(self) -> None:
        """End the progress display."""
        self.display.close()


def run_trainer(
    trainer: Trainer,
    directory: StageDirectory,
    description: str,
    *,
    report_to: Sequence[Tracker] = (),
    measure: Measure | None = None,
) -> dict[str, Any]:
    """Train to the end, from the last whole checkpoint if there is one.

    Returns:
        `steps`, and `loss_first` and `loss_last`: means over the first and last tenth of the steps.

    Raises:
        Interrupted: a signal arrived; a checkpoint was written before.
        TrainingError: the loss is not finite.
    """
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if trainer.args.device.type == "cpu":
        keep_freed_memory()
    checkpoint = last_complete_checkpoint(directory.checkpoints)
    distributed.wait_for_everyone()  # none writes a new one before all have looked
    trainer.remove_callback(PrinterCallback)
    callback = StageCallback(directory, description, trainer.args.max_steps, measure)
    trainer.add_callback(callback)
    if distributed.is_main_process():
        done = int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0
        for name in report_to:
            trainer.add_callback(tracker_callback(name, directory, done))
    directory.events.write(
        "training_started",
        steps=trainer.args.max_steps,
        resumed_from=checkpoint and checkpoint.name,
        processes=distributed.process_count(),
    )
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        callback.close()
        if "wandb" in report_to and distributed.is_main_process():
            importlib.import_module("wandb").finish()  # or the next stage would write into this one's run
    if trainer.state.global_step < trainer.args.max_steps:
        interruption.raise_if_requested()
        raise interruption.Interrupted(signal.SIGTERM)  # another process was told to stop
    distributed.wait_for_everyone()
    directory.events.write("training_finished", steps=trainer.state.global_step)
    losses = [
        json.loads(line)["loss"] for line in directory.metrics_file.read_text(encoding="utf-8").splitlines()
    ]
    tenth = max(1, len(losses) // 10)
    return {
        "steps": trainer.state.global_step,
        "loss_first": sum(losses[:tenth]) / tenth,
        "loss_last": sum(losses[-tenth:]) / tenth,
    }


def tracker_callback(name: Tracker, directory: StageDirectory, steps_done: int) -> TrainerCallback:
    """transformers' callback for an experiment tracker; tensorboard's files go to `tracking/` in the stage's folder.

    Args:
        steps_done: What came after these steps, of a run that was killed, is dropped.
    """
    from transformers.integrations import integration_utils

    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        return integration_utils.TensorBoardCallback(  # type: ignore[no-untyped-call]
            SummaryWriter(str(directory.tracking), purge_step=steps_done + 1)
        )
    callback: TrainerCallback = integration_utils.INTEGRATION_TO_CALLBACK[name]()
    return callback


def forget_later_steps(file: Path, step: int, *, key: str = "step") -> None:
    """Keep the lines of a JSONL file up to `step`, that of the checkpoint which training resumes from.

    Lines count their steps from 1 under `key`, so that 0 keeps none.
    """
    kept = []
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            record = _parsed(line)
            if record is not None and record[key] <= step:
                kept.append(line + "\n")
    write_text(file, "".join(kept))


def last_complete_checkpoint(checkpoints: Path) -> Path | None:
    """The newest checkpoint that was written whole; half-written ones are removed.

    Raises:
        UserInputError: another number of processes wrote it, or ones that held the weights in another way.
    """
    found: list[tuple[int, Path]] = []
    for folder in checkpoints.glob("checkpoint-*"):
        if (folder / COMPLETE_MARKER).exists() and any(folder.glob("optimizer*")):
            found.append((int(folder.name.rsplit("-", 1)[1]), folder))
        elif distributed.is_main_process():
            remove(folder)
    if not found:
        return None
    newest = max(found)[1]
    written_by = (newest / COMPLETE_MARKER).read_text(encoding="utf-8") or "1 process"
    if written_by != distributed.launch():
        raise UserInputError(
            f"{newest} was written by {written_by}, this is {distributed.launch()}; launch it as before, or remove "
            f"{checkpoints} to begin anew"
        )
    return newest


def _parsed(line: str) -> dict[str, Any] | None:
    """A metrics line, or None if a kill cut it off."""
    try:
        record: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record


def placeholder_tokenizer(model_padding_id: int) -> Any:
    """A tokenizer for TRL's trainers to hold: they insist on one, while all tokens are made here."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": model_padding_id, "<unk>": model_padding_id + 1}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<unk>"
    )
