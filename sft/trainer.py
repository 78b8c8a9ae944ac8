"""Cross-entropy training on tokenised dialogues: the one place where text is fine-tuned on.

Rides on TRL's `SFTTrainer` with our tokens, masks, packing and collator in place of its own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, Trainer
from trl.trainer.sft_config import SFTConfig as TrlSftConfig
from trl.trainer.sft_trainer import SFTTrainer

from llama2_chat.errors import UserInputError
from llama2_chat.lora import merged, plain_model, with_adapter
from llama2_chat.packing import IGNORED, LazySequence, PackedRow, collate_rows, pack
from llama2_chat.settings import RunSettings, TrainingConfig
from llama2_chat.stage import StageDirectory
from llama2_chat.tokenization import TokenizedDialogue
from llama2_chat.training import (
    drop_optimiser_state,
    placeholder_tokenizer,
    run_trainer,
    trainer_arguments,
)


class PackedSftTrainer(SFTTrainer):
    """TRL's trainer on rows that are packed already, with logits only where a token is trained.

    The loss is the mean over all trained tokens of an optimiser step's micro-batches, over all processes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # transformers would copy the placeholder's special tokens into the model's config.
        self.processing_class = None
        assert self.model is not None
        score_trained_tokens(plain_model(self.model))  # type: ignore[arg-type]

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
        counts = self.accelerator.gather(torch.stack([correct, trained]).unsqueeze(0)).sum(0)
        accuracy = (counts[0] / counts[1].clamp(min=1)).item()
        self._metrics["train"]["mean_token_accuracy"].append(accuracy)
        return total / in_step.clamp(min=1) * self.accelerator.num_processes

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
    training: TrainingConfig,
    settings: RunSettings,
    directory: StageDirectory,
    padding_id: int,
    description: str,
    parts: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Train `model` in place on the tokens that each dialogue's mask selects; an adapter ends up merged.

    Args:
        dialogues: Each at most `training.sequence_length` tokens long.
        padding_id: Any id of the vocabulary; it stands under a mask and changes nothing.
        description: What the progress display says.
        parts: See `pack`.

    Returns:
        Metrics: `sequences`, `tokens`, `trained_tokens`, `rows`, `steps`, `loss_first`, `loss_last`.

    Raises:
        UserInputError: nothing is trained in any dialogue.
    """
    trained = sum(sum(d.loss_mask) for d in dialogues)
    if trained == 0:
        raise UserInputError(
            "no token to train on: the dialogues hold no answer that the loss policy selects"
        )
    rows = pack(dialogues, training.sequence_length, parts=parts)
    arguments = trainer_arguments(training, settings, directory.checkpoints, len(rows))
    cache = model.config.use_cache
    trained_model = with_adapter(model, training.lora, settings.seed)
    trainer = PackedSftTrainer(
        model=trained_model,
        args=TrlSftConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=Dataset.from_list([_columns(rows[0])]),
        data_collator=lambda batch: collate_rows(batch, padding_id),
        processing_class=placeholder_tokenizer(padding_id),
    )
    # TRL insists on a `Dataset`, which would hold every row; the loader below it takes what makes them one by one.
    trainer.train_dataset = LazySequence(len(rows), lambda number: _columns(rows[number]))
    started = time.perf_counter()
    metrics = run_trainer(trainer, directory, description)
    tokens = sum(len(dialogue.input_ids) for dialogue in dialogues)
    model.__dict__.pop("forward", None)
    merged(trained_model, directory.adapter)
    directory.events.write("training_rate", tokens=tokens, seconds=time.perf_counter() - started)
    drop_optimiser_state(directory.checkpoints)
    model.config.use_cache = cache
    model.train(False)
    return {
        "sequences": len(dialogues),
        "tokens": tokens,
        "trained_tokens": trained,
        "rows": len(rows),
        **metrics,
    }


def _columns(row: PackedRow) -> dict[str, list[int]]:
    return {"input_ids": row.input_ids, "labels": row.labels, "position_ids": row.position_ids}
