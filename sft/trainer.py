"""Cross-entropy training on tokenised dialogues: the one place where text is fine-tuned on.

Rides on TRL's `SFTTrainer` with our tokens, masks, packing and collator in place of its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from types import MethodType
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer, TrainingArguments
from trl.trainer.sft_config import SFTConfig as TrlSftConfig
from trl.trainer.sft_trainer import SFTTrainer

from llama2_chat import distributed, interruption
from llama2_chat.errors import UserInputError
from llama2_chat.lora import merged, plain_model, with_adapter
from llama2_chat.models import sampling_dtype
from llama2_chat.packing import IGNORED, LazySequence, PackedRow, collate_rows, pack
from llama2_chat.settings import PackedTraining, RunSettings
from llama2_chat.sft.held_out import HeldOut
from llama2_chat.stage import StageDirectory
from llama2_chat.tokenization import TokenizedDialogue
from llama2_chat.training import (
    EndsAtLastStep,
    keep_to_device,
    placeholder_tokenizer,
    run_trainer,
    trainer_arguments,
)


class EpochOrder(Sampler[int]):
    """The rows of an epoch in random order, a function of seed and epoch.

    Several processes get whole optimiser steps: the last one is filled up with the row after the last, which trains
    nothing. So a step is the same set of rows whatever the number of processes.
    """

    def __init__(self, rows: int, batch_size: int, seed: int, steps_done: Callable[[], int]) -> None:
        """`steps_done`, asked where an epoch begins or is resumed in its midst, tells which epoch it is."""
        self.rows = rows
        self.filling = -rows % batch_size if distributed.process_count() > 1 else 0
        self.seed = seed
        self.steps_done = steps_done
        self.steps_per_epoch = math.ceil(rows / batch_size)

    def __len__(self) -> int:
        return self.rows + self.filling

    def __iter__(self) -> Iterator[int]:
        epoch = self.steps_done() // self.steps_per_epoch
        generator = torch.Generator().manual_seed(self.seed + epoch)
        yield from torch.randperm(self.rows, generator=generator).tolist()
        yield from [self.rows] * self.filling


class PackedSftTrainer(EndsAtLastStep, SFTTrainer):
    """TRL's trainer on rows that are packed already, with logits only where a token is trained.

    The loss is the mean over all trained tokens of an optimiser step's micro-batches, over all processes.
    """

    def __init__(
        self, model: PreTrainedModel, arguments: TrainingArguments, rows: Sequence[PackedRow], padding_id: int
    ) -> None:
        """Rows are made as they are asked for; the one after the last trains nothing (`EpochOrder`)."""
        nothing = PackedRow([padding_id], [IGNORED], [0])
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list([nothing.to_columns()]),
            data_collator=lambda batch: collate_rows(batch, padding_id),
            processing_class=placeholder_tokenizer(padding_id),
        )
        # TRL insists on a `Dataset`, which would hold every row; the loader below it takes what makes them one by one.
        self.rows = len(rows)
        self.train_dataset = LazySequence(
            self.rows + 1, lambda number: (rows[number] if number < self.rows else nothing).to_columns()
        )
        # transformers would copy the placeholder's special tokens into the model's config.
        self.processing_class = None
        self._counts = torch.zeros(2)
        assert self.model is not None
        score_trained_tokens(plain_model(self.model))  # type: ignore[arg-type]

    def create_accelerator_and_postprocess(self) -> None:
        """FSDP as the launcher asks for it, on the CPU too."""
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = distributed.shard(self.accelerator)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        batch_size = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return EpochOrder(
            self.rows,
            batch_size * self.args.world_size,
            self.args.seed,
            lambda: self.state.global_step,
        )

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Summed cross-entropy of this micro-batch over the trained tokens of the whole step."""
        total, correct = model(**inputs)
        trained = (inputs["labels"] != IGNORED).sum()
        in_step = trained if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        self._count(self.accelerator.gather(torch.stack([correct, trained]).unsqueeze(0)).sum(0))
        return total / in_step.clamp(min=1) * self.accelerator.num_processes

    def _count(self, counts: Tensor) -> None:
        """Accuracy over all tokens since the last log: `counts` are those predicted right and all of a micro-batch."""
        logged = self._metrics["train"]["mean_token_accuracy"]
        self._counts = self._counts + counts if logged else counts
        logged[:] = [(self._counts[0] / self._counts[1].clamp(min=1)).item()]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        Trainer._save_checkpoint(self, model, trial)


def trained_token_loss(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy, in float32, of the labels that are not ignored, and how many are predicted right.

    The head is computed at those positions alone: the token before each trained one.
    """
    hidden_BSH = model.base_model(
        input_ids=input_ids, position_ids=position_ids, use_cache=False
    ).last_hidden_state
    targets_BS = labels[:, 1:]
    trained_mask = targets_BS != IGNORED
    targets_N = targets_BS[trained_mask]
    head: torch.nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    logits_NV = head(hidden_BSH[:, :-1][trained_mask]).float()
    total = functional.cross_entropy(logits_NV, targets_N, reduction="sum")
    return total, (logits_NV.argmax(-1) == targets_N).sum()


def score_trained_tokens(model: PreTrainedModel) -> None:
    """Make the model's forward `trained_token_loss`, so that wrappers (DDP, FSDP) see one forward."""

    def forward(
        self: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, labels: Tensor, **_: Any
    ) -> tuple[Tensor, Tensor]:
        return trained_token_loss(self, input_ids, position_ids, labels)

    model.forward = MethodType(forward, model)


def train_sequences(
    model: PreTrainedModel,
    dialogues: Sequence[TokenizedDialogue],
    *,
    training: PackedTraining,
    settings: RunSettings,
    directory: StageDirectory,
    padding_id: int,
    description: str,
    held_out: HeldOut | None = None,
    parts: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Train `model` in place on the tokens that each dialogue's mask selects; an adapter ends up merged.

    Several processes share each batch. Where they share the weights as well, the first ends up with all of them.

    Args:
        dialogues: Each at most `training.sequence_length` tokens long.
        padding_id: Any id of the vocabulary; it stands under a mask and changes nothing.
        description: What the progress display says.
        held_out: What the model is measured on before, in the course of it and after.
        parts: See `pack`.

    Returns:
        Metrics: `sequences`, `tokens`, `trained_tokens`, `rows`, `steps`, `loss_first`, `loss_last`, and
        `held_out` with `before` and `after`.

    Raises:
        UserInputError: nothing is trained in any dialogue.
    """
    lengths, trained = [], 0
    for dialogue in dialogues:  # once: they may be read from a file
        lengths.append(len(dialogue.input_ids))
        trained += sum(dialogue.loss_mask[1:])
    if trained == 0:
        raise UserInputError(
            "no token to train on: the dialogues hold no answer that the loss policy selects"
        )
    rows = pack(dialogues, training.sequence_length, isolate=training.isolate, parts=parts, lengths=lengths)
    arguments = trainer_arguments(training, settings, directory.checkpoints, len(rows))
    cache = model.config.use_cache
    autocast = sampling_dtype(settings)
    trained_model = with_adapter(model, training.lora, settings.seed)
    config = TrlSftConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": True})
    trainer = PackedSftTrainer(trained_model, keep_to_device(config, settings), rows, padding_id)
    watch = Watch(trainer, held_out, autocast) if held_out is not None else None
    found = {} if watch is None else {"before": watch.measure()}
    started = time.perf_counter()
    metrics = run_trainer(
        trainer,
        directory,
        description,
        report_to=settings.report_to,
        measure=watch.after_step if watch is not None else None,
    )
    directory.events.write("training_rate", tokens=sum(lengths), seconds=time.perf_counter() - started)
    if watch is not None:
        found["after"] = watch.finish(metrics["steps"])
        metrics["held_out"] = found
    distributed.gather_weights(trained_model)
    model.__dict__.pop("forward", None)
    if distributed.is_main_process():
        merged(trained_model, directory.adapter)
    model.config.use_cache = cache
    model.train(False)
    return {
        "sequences": len(dialogues),
        "tokens": sum(lengths),
        "trained_tokens": trained,
        "rows": len(rows),
        **metrics,
    }


class Watch:
    """Measures the model in a trainer's hands on held-out dialogues, and lets it answer some of their questions."""

    def __init__(self, trainer: PackedSftTrainer, held_out: HeldOut, autocast: torch.dtype | None) -> None:
        self.trainer = trainer
        self.held_out = held_out
        self.autocast = autocast
        self.latest: tuple[int, dict[str, Any]] | None = None
        """The last step after which it was measured, and what came out."""

    def measure(self) -> dict[str, Any]:
        """See `HeldOut.measure`; the model is left in the mode that it was in."""
        model: Any = self.trainer.model
        training = model.training
        model.train(False)
        found = self.held_out.measure(model, model.device, self.autocast)
        distributed.release(model)
        model.train(training)
        return found

    def after_step(self, step: int) -> dict[str, float]:
        """Every so many steps, `held_out_loss` and `held_out_token_accuracy`; else nothing."""
        if self.held_out.every is None or step % self.held_out.every:
            return {}
        with interruption.deferred():
            found = self.measure()
            self._answer(step)
        self.latest = step, found
        return {"held_out_loss": found["loss"], "held_out_token_accuracy": found["token_accuracy"]}

    def finish(self, step: int) -> dict[str, Any]:
        """The measurement after the last step, with answers; not a second one where that step was measured."""
        if self.latest is not None and self.latest[0] == step:
            return self.latest[1]
        found = self.measure()
        self._answer(step)
        return found

    def _answer(self, step: int) -> None:
        """The first process answers with its own copy of the weights, if it has a whole one."""
        model = plain_model(self.trainer.model)  # type: ignore[arg-type]
        questions = self.held_out.questions
        if questions is None or not distributed.is_main_process() or distributed.is_sharded(model):
            return
        training, scoring = model.training, model.__dict__.pop("forward")
        questions.answer(model, step, self.autocast)
        model.__dict__["forward"] = scoring
        model.train(training)
