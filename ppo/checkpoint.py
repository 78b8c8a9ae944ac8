"""Checkpoints of PPO: what is trained of policy and value model, optimisers, running state; the iteration in the name.

Nothing else is needed to go on with the same bytes: prompts, samples and mini-batches are functions of
seed and iteration. Weights that several processes share are written whole, by the first process.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llama2_chat import distributed
from llama2_chat.files import atomic_path, read_json, remove, write_json, write_text
from llama2_chat.lora import load_trained_weights, save_trained_weights
from llama2_chat.ppo.running import RunningState
from llama2_chat.training import COMPLETE_MARKER, last_complete_checkpoint

_KEPT = 2
_RUNNING = "state.json"

Trained = Mapping[str, tuple[nn.Module, Optimizer]]
"""Each model that is trained, by name, with its optimiser."""


def save_checkpoint(checkpoints: Path, iteration: int, trained: Trained, running: RunningState) -> None:
    """Write `checkpoint-<iteration>` whole or not at all; the two newest are kept.

    All processes must call it; they return when the first has written it.
    """
    folder = checkpoints / f"checkpoint-{iteration}"
    writes = distributed.is_main_process()
    if distributed.any_process(writes and (folder / COMPLETE_MARKER).exists()):
        return
    # Shared weights come together tensor by tensor, so this is no work for the first process alone.
    states = {name: _whole_state(optimiser.state_dict()) for name, (_, optimiser) in trained.items()}
    weights = {name: whole_weights(model) for name, (model, _) in trained.items()}
    if writes:
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            for name, (model, _) in trained.items():
                write_weights(model, temporary / f"{name}.safetensors", weights[name])
            torch.save(states, temporary / "optimizer.pt")
            write_json(temporary / _RUNNING, running.to_json())
            write_text(temporary / COMPLETE_MARKER, distributed.launch())
        older = sorted(checkpoints.glob("checkpoint-*"), key=_iteration)[:-_KEPT]
        for old in older:
            remove(old)
    distributed.wait_for_everyone()


def restore_checkpoint(
    checkpoints: Path, trained: Trained, running: RunningState
) -> tuple[int, RunningState]:
    """Load the newest whole checkpoint, if there is one, into the models and optimisers.

    Returns:
        The iterations that are done and the running state after them; 0 and `running` where there is none.

    Raises:
        UserInputError: another number of processes wrote it, or ones that held the weights in another way.
    """
    folder = last_complete_checkpoint(checkpoints)
    distributed.wait_for_everyone()  # none writes a new one before all have looked
    if folder is None:
        return 0, running
    # weights_only: tensors and plain containers, never code from a pickle.
    states = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    for name, (model, optimiser) in trained.items():
        read_weights(model, folder / f"{name}.safetensors")
        optimiser.load_state_dict(_own_state(states[name], optimiser))
    return _iteration(folder), RunningState.from_json(read_json(folder / _RUNNING))


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model that processes share, in the first one's main memory; tied ones once."""
    if not distributed.is_sharded(model):
        return {}
    distributed.release(model)
    return {name: distributed.to_first(weight.detach()) for name, weight in model.named_parameters()}


def write_weights(model: nn.Module, file: Path, shared: dict[str, Tensor]) -> None:
    """Write what is trained of a model, by the first process; `shared` is what `whole_weights` said, to all of them."""
    if distributed.is_sharded(model):
        safetensors.torch.save_file(shared, str(file))
    else:
        save_trained_weights(model, file)


def read_weights(model: nn.Module, file: Path) -> None:
    """Read what `write_weights` wrote, each process what it holds of it."""
    if distributed.is_sharded(model):
        _load_own_parts(model, file)
    else:
        load_trained_weights(model, file)


def _load_own_parts(model: nn.Module, file: Path) -> None:
    distributed.release(model)
    with safetensors.safe_open(str(file), framework="pt") as weights, torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(distributed.own_part(weights.get_tensor(name), weight))


def _whole_state(state: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's state dict with whole tensors, in the first process."""
    moments = {
        number: {name: distributed.to_first(value) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": moments}


def _own_state(state: dict[str, Any], optimiser: Optimizer) -> dict[str, Any]:
    """Of a state dict with whole tensors what this process holds: moments lie where their parameter does."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    moments = {
        number: {
            name: distributed.own_part(value, parameters[number])
            if value.shape == parameters[number].shape
            else value
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    return {**state, "state": moments}


def _iteration(folder: Path) -> int:
    return int(folder.name.rsplit("-", 1)[1])
