"""Cross-entropy training on tokenised dialogues: the one place where text is fine-tuned on.

Rides on TRL's `SFTTrainer` with our tokens, masks, packing and collator in place of its own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, Trainer
from trl.trainer.sft_config import SFTConfig as TrlSftConfig
from trl.trainer.sft_trainer import SFTTrainer

from llama2_chat.errors import UserInputError
from llama2_chat.packing import collate_rows, pack
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
    """TRL's trainer on rows that are packed already; its checkpoints carry no generated model card."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # transformers would copy the placeholder's special tokens into the model's config.
        self.processing_class = None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        Trainer._save_checkpoint(self, model, trial)


def train_sequences(
    model: PreTrainedModel,
    dialogues: Sequence[TokenizedDialogue],
    *,
    training: TrainingConfig,
    settings: RunSettings,
    directory: StageDirectory,
    padding_id: int,
    description: str,
) -> dict[str, Any]:
    """Train `model` in place on the tokens that each dialogue's mask selects.

    Args:
        dialogues: Each at most `training.sequence_length` tokens long.
        padding_id: Any id of the vocabulary; it stands under a mask and changes nothing.
        description: What the progress display says.

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
    rows = pack(dialogues, training.sequence_length)
    dataset = Dataset.from_dict(
        {
            "input_ids": [row.input_ids for row in rows],
            "labels": [row.labels for row in rows],
            "position_ids": [row.position_ids for row in rows],
        }
    )
    arguments = trainer_arguments(training, settings, directory.checkpoints, len(rows))
    cache = model.config.use_cache
    trainer = PackedSftTrainer(
        model=model,
        args=TrlSftConfig(**arguments, dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=dataset,
        data_collator=lambda batch: collate_rows(batch, padding_id),
        processing_class=placeholder_tokenizer(padding_id),
    )
    started = time.perf_counter()
    metrics = run_trainer(trainer, directory, description)
    tokens = sum(len(row.input_ids) for row in rows)
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
