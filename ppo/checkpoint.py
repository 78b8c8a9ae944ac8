"""Checkpoints of PPO: trained weights of policy and value model, their optimisers, and the iteration in the name.

Nothing else is needed to go on with the same bytes: prompts, samples and mini-batches are functions of
seed and iteration.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from llama2_chat.files import atomic_path, remove
from llama2_chat.lora import load_trained_weights, save_trained_weights
from llama2_chat.training import COMPLETE_MARKER, last_complete_checkpoint

_KEPT = 2


Trained = Mapping[str, tuple[nn.Module, Optimizer]]
"""Each model that is trained, by name, with its optimiser."""


def save_checkpoint(checkpoints: Path, iteration: int, trained: Trained) -> None:
    """Write `checkpoint-<iteration>` whole or not at all; the two newest are kept."""
    folder = checkpoints / f"checkpoint-{iteration}"
    if (folder / COMPLETE_MARKER).exists():
        return
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for name, (model, _) in trained.items():
            save_trained_weights(model, temporary / f"{name}.safetensors")
        states = {name: optimiser.state_dict() for name, (_, optimiser) in trained.items()}
        torch.save(states, temporary / "optimizer.pt")
        (temporary / COMPLETE_MARKER).touch()
    older = sorted(checkpoints.glob("checkpoint-*"), key=_iteration)[:-_KEPT]
    for old in older:
        remove(old)


def restore_checkpoint(checkpoints: Path, trained: Trained) -> int:
    """Load the newest whole checkpoint, if there is one; returns the iterations that are done."""
    folder = last_complete_checkpoint(checkpoints)
    if folder is None:
        return 0
    # weights_only: tensors and plain containers, never code from a pickle.
    states = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    for name, (model, optimiser) in trained.items():
        load_trained_weights(model, folder / f"{name}.safetensors")
        optimiser.load_state_dict(states[name])
    return _iteration(folder)


def _iteration(folder: Path) -> int:
    return int(folder.name.rsplit("-", 1)[1])
