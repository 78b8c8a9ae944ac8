"""Low-rank adapters (LoRA) through peft: trained in place of the weights, merged into them at the end.

Hu et al. 2021, arXiv 2106.09685. A training run wraps its model, trains what `with_adapter` returns and ends
with `merged`. Model folders are plain ones, or (`save: adapter_only`) hold what `with_saved_adapter` reads.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
from torch import nn
from transformers import PreTrainedModel

from llama2_chat.errors import UserInputError
from llama2_chat.files import atomic_path
from llama2_chat.models import seed_everything
from llama2_chat.settings import LoraConfig

_NO_CONCERN = (
    # Said at every checkpoint where the base is no plain folder; nothing here changes a vocabulary.
    ".*vocabulary was not modified",
    # peft 0.21 asks transformers 5.23 by the old name.
    ".*`is_gradient_checkpointing` is deprecated",
)
"""Warnings of peft's that no user can do anything about."""


def with_adapter(model: PreTrainedModel, lora: LoraConfig | None, seed: int) -> PreTrainedModel:
    """The model with a fresh adapter, whose weights depend only on the seed; without `lora` the model itself.

    Only the adapter is trained, and the scalar head of a reward model in full. The adapter changes nothing
    until it is trained: B starts at zero.

    Raises:
        UserInputError: the model has no module of a name in `target_modules`.
    """
    if lora is None:
        return model
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    if unknown := sorted(set(lora.target_modules) - names):
        raise UserInputError(
            f"training.lora.target_modules: {', '.join(unknown)} not in this {type(model).__name__}; "
            f"its modules are {', '.join(sorted(n for n in names if n and not n.isdigit()))}"
        )
    scores = hasattr(model, "score")
    config = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS if scores else peft.TaskType.CAUSAL_LM,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        modules_to_save=["score"] if scores else None,
    )
    seed_everything(seed)
    _hush()
    adapted: Any = peft.get_peft_model(model, config)
    return adapted  # type: ignore[no-any-return]


def with_saved_adapter(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """The model with the adapter that `merged` wrote; merged, its weights are to the bit what training ended with.

    At least on the kind of device that it was trained on. Random numbers go on as if nothing had been loaded.
    """
    _hush()
    with torch.random.fork_rng(devices=[]):  # peft draws an adapter at random before it reads one
        adapted: Any = peft.PeftModel.from_pretrained(model, str(folder), torch_device=str(model.device))
    return adapted  # type: ignore[no-any-return]


def _hush() -> None:
    for message in _NO_CONCERN:
        warnings.filterwarnings("ignore", message=message)


def plain_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model inside an adapter's wrapper, its layers adapted; any other model itself."""
    inner: PreTrainedModel = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    return inner


@contextmanager
def merged_meanwhile(model: Any) -> Iterator[None]:
    """The adapter's product stands in the weights, so that sampling computes no adapter; then they are as before.

    To the bit: subtracting it again would not give the same weights. Costs a second copy of the adapted layers.
    """
    layers: list[Any] = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    before = [layer.get_base_layer().weight.data for layer in layers]
    try:
        with torch.no_grad():
            for layer, weight in zip(layers, before, strict=True):
                product = sum(layer.get_delta_weight(name) for name in layer.active_adapters)
                # Adapters are float32 also where the weights are not.
                layer.get_base_layer().weight.data = weight + product.to(weight.dtype)
                layer.merged_adapters = list(layer.active_adapters)
        yield
    finally:
        for layer, weight in zip(layers, before, strict=True):
            layer.get_base_layer().weight.data = weight
            layer.merged_adapters = []


@contextmanager
def adapter_disabled(model: Any) -> Iterator[None]:
    """The model computes what its base does, to the bit, and afterwards what it did before.

    Its adapter's weights stay as they are and count as trained ones; nothing else may be trained meanwhile.
    """
    with model.disable_adapter():
        yield


def share_frozen_weights(model: nn.Module, owner: nn.Module) -> int:
    """Let frozen weights of `model` that `owner` holds frozen too, with equal values, lie in the owner's memory.

    Both go on as before: nobody writes frozen weights. Weights are found by name, adapters left aside.

    Returns:
        How many parameters are no longer held twice.
    """
    theirs = {_plain_name(name): p for name, p in owner.named_parameters() if not p.requires_grad}
    shared = 0
    for name, own in model.named_parameters():
        other = theirs.get(_plain_name(name))
        if own.requires_grad or other is None or own.data_ptr() == other.data_ptr():
            continue
        if own.shape == other.shape and own.dtype == other.dtype and torch.equal(own, other):
            own.data = other.data
            shared += own.numel()
    return shared


def save_trained_weights(model: nn.Module, file: Path) -> None:
    """Write the weights that are trained: with an adapter it and the scalar head, else all of the model."""
    if all(parameter.requires_grad for parameter in model.parameters()):
        safetensors.torch.save_model(model, str(file))
    else:
        safetensors.torch.save_file(
            {name: parameter.detach().contiguous() for name, parameter in _trained(model).items()}, str(file)
        )


def load_trained_weights(model: nn.Module, file: Path) -> None:
    """Read what `save_trained_weights` wrote for a model with the same weights in training.

    Raises:
        UserInputError: the file holds other weights, as those of a run with other settings.
    """
    if all(parameter.requires_grad for parameter in model.parameters()):
        safetensors.torch.load_model(model, str(file))
        return
    found, wanted = safetensors.torch.load_file(str(file)), _trained(model)
    if found.keys() != wanted.keys():
        differing = ", ".join(sorted(found.keys() ^ wanted.keys())[:3])
        raise UserInputError(f"{file}: holds other weights than those in training ({differing}); start anew")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(found[name])


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _plain_name(name: str) -> str:
    """A parameter's name as it is without an adapter around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def merged(model: Any, adapter: Path | None = None) -> PreTrainedModel:
    """The plain model with its adapter's product added to the weights, in place; any other model as it is.

    Args:
        adapter: Folder to write the adapter to before, as `peft.PeftModel.from_pretrained` loads it.
    """
    if not isinstance(model, peft.PeftModel):
        return model  # type: ignore[no-any-return]
    if adapter is not None:
        _save_adapter(model, adapter)
    whole: PreTrainedModel = model.merge_and_unload()
    whole.requires_grad_(True)
    return whole


def _save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter atomically; it names its base by the way there, so that a run can be moved."""
    config = model.active_peft_config
    base = config.base_model_name_or_path
    if base and Path(base).is_dir():
        config.base_model_name_or_path = os.path.relpath(base, folder)
    with atomic_path(folder) as temporary:
        # The embeddings are never adapted, and looking for that would ask the hub about the base.
        model.save_pretrained(temporary, save_embedding_layers=False)
        (temporary / "README.md").unlink(missing_ok=True)  # peft's is an empty form
