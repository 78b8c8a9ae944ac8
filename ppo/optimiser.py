"""AdamW as §3.2.3 sets it, and models whose output is a function of their input."""

from __future__ import annotations

from torch import nn
from torch.optim import AdamW

from llama2_chat.ppo.config import PpoTraining


def build_optimiser(model: nn.Module, training: PpoTraining, learning_rate: float) -> AdamW:
    """AdamW at a constant learning rate; matrices decay, biases and norms' gains do not.

    Source: §3.2.3; what decays is transformers' rule, as in the other stages.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        eps=training.adam_epsilon,
    )


def disable_dropout(model: nn.Module) -> None:
    """A ratio compares two policies, not two dropout masks."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
