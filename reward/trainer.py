"""Reward training on TRL's `RewardTrainer`, with our tokens, margins, safety labels, pooling and loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from trl.trainer.reward_config import RewardConfig as TrlRewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from llama2_chat.reward.config import RewardTraining
from llama2_chat.reward.data import UNLABELLED
from llama2_chat.reward.loss import centering_loss, preference_loss, safety_loss
from llama2_chat.settings import RunSettings
from llama2_chat.training import EndsAtLastStep, trainer_arguments


def reward_arguments(
    training: RewardTraining, settings: RunSettings, checkpoints: Path, pairs: int
) -> TrlRewardConfig:
    """Arguments of the trainer; AdamW in one pass over the weights, which is a tenth of a step faster on a CPU."""
    arguments = trainer_arguments(training, settings, checkpoints, pairs)
    return TrlRewardConfig(**arguments | {"optim": "adamw_torch_fused"})


class MarginRewardTrainer(EndsAtLastStep, RewardTrainer):
    """Means are taken over all pairs, and all labelled responses, of an optimiser step's micro-batches."""

    def __init__(self, *args: Any, safety_weight: float, centering: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # transformers would copy the placeholder's special tokens into the model's config.
        self.processing_class = None
        self.safety_weight = safety_weight
        self.centering = centering
        self.loss_is_scaled_for_ga = True
        self.labelled_in_step: int | Tensor = 0

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset  # tokenised already; TRL would drop long pairs without a word

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """Pairs in the whole optimiser step, over all processes."""
        pairs = sum(len(batch["margin"]) for batch in batch_samples)
        labelled = sum(int((batch["safe"] != UNLABELLED).sum()) for batch in batch_samples)
        counts = self.accelerator.reduce(torch.tensor([pairs, labelled], device=device), "sum")
        self.labelled_in_step = counts[1]
        return counts[0]  # type: ignore[no-any-return]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """-log σ(chosen - rejected - margin), plus the weighted centring and safety classification losses."""
        scores = model(**{name: inputs[name] for name in ("input_ids", "position_ids", "rows", "ends")})
        chosen, rejected = scores.chunk(2)
        pairs_in_step = len(chosen) if num_items_in_batch is None else num_items_in_batch
        loss = preference_loss(chosen, rejected, margins=inputs["margin"])
        if self.centering > 0:
            loss = loss + self.centering * centering_loss(chosen, rejected)
        loss = loss * (len(chosen) / pairs_in_step)
        labelled = inputs["safe"] != UNLABELLED
        if self.safety_weight > 0:
            safety = safety_loss(scores[labelled], inputs["safe"][labelled].bool())
            loss = loss + self.safety_weight * safety * (
                labelled.sum() / torch.as_tensor(self.labelled_in_step).clamp(min=1)
            )
        self._metrics["train"]["accuracy"].append((chosen > rejected).float().mean().item())
        return loss * self.accelerator.num_processes

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        Trainer._save_checkpoint(self, model, trial)
