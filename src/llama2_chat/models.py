"""Loading and saving models as plain Hugging Face folders; safetensors only, never remote code.

A folder with an adapter alone (`adapter_base.py`) is merged into its base while it is loaded, so that nobody who loads
a model need know.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from llama2_chat.adapter_base import base_of, name_base
from llama2_chat.distributed import is_main_process, local_number, process_count, wait_for_everyone
from llama2_chat.errors import MissingFileError, UserInputError, disk_full, out_of_memory
from llama2_chat.files import atomic_path, read_json, remove, write_text
from llama2_chat.packed_attention import use_packed_attention
from llama2_chat.settings import BaseModelSource, RunSettings
from llama2_chat.tokenizers import ChatTokenizer

_PARAMETERS_WORTH_THREADS = 10_000_000


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def select_device(device: str) -> torch.device:
    """The torch device for a recipe's `device`; `auto` is the GPU where there is one.

    Of several processes each takes the GPU of its own number.

    Raises:
        UserInputError: CUDA is asked for and not there, or one GPU for several processes.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserInputError(
            f"device: {device} asked for, but torch sees no CUDA GPU; use device=cpu or auto"
        )
    if process_count() > 1 and device.startswith("cuda"):
        if device != "cuda":
            raise UserInputError(f"device: {device} for {process_count()} processes; use device=cuda or auto")
        if local_number() >= torch.cuda.device_count():
            raise UserInputError(
                f"device: process {local_number()} of this machine has no GPU, it has {torch.cuda.device_count()}; "
                "launch as many processes as there are GPUs"
            )
        return torch.device("cuda", local_number())
    return torch.device(device)


def sampling_dtype(settings: RunSettings) -> torch.dtype | None:
    """The autocast dtype for sampling and scoring; None for float32."""
    return torch.bfloat16 if settings.precision == "bfloat16" else None


def load_policy(path: str | Path, settings: RunSettings, *, gguf_file: str | None = None) -> PreTrainedModel:
    """A causal language model on the run's device, in evaluation mode.

    Weights are float32 on disk and in training (bfloat16 runs train under autocast with float32
    master weights); callers that only sample may convert.

    Raises:
        UserInputError: the folder holds no safetensors or is not whole, is a reward model's, or a weight is NaN or
            infinite, or it holds an adapter alone whose base is not there.
    """
    _check_folder(path)
    if gguf_file is None:
        sorts = _config_of(path, "policy").architectures or []
        if any(str(sort).endswith("ForSequenceClassification") for sort in sorts):
            raise UserInputError(f"{path}: a reward model, where a policy is wanted; name a policy's folder")
    if (base := base_of(path)) is not None:
        return _merged_into(load_policy(base.path, settings, gguf_file=base.gguf_file), path)
    model = _loaded(AutoModelForCausalLM, path, "policy", gguf_file=gguf_file)
    if gguf_file is not None:
        model = _without_quantization(model)
        model.name_or_path = str(path)  # a GGUF file's own name leads nowhere
    _refuse_non_finite(model, path, gguf_file)
    return _ready(model, settings)


def load_base(settings: RunSettings) -> PreTrainedModel:
    """The recipe's base model."""
    source: BaseModelSource = settings.base_model
    return load_policy(source.path, settings, gguf_file=source.gguf_file)


def load_reward_model(path: str | Path, settings: RunSettings) -> PreTrainedModel:
    """A model with one scalar output, as `save_model` wrote it."""
    _check_folder(path)
    config = _config_of(path, "reward model")
    if config.num_labels != 1:
        raise UserInputError(
            f"{path}: a reward model has one output (num_labels 1), this one {config.num_labels}"
        )
    if (base := base_of(path)) is not None:
        trunk = load_policy(base.path, settings, gguf_file=base.gguf_file)
        with torch.random.fork_rng(devices=[]):  # the head is drawn at random before it is read
            return _merged_into(_ready(_under_a_head(trunk, config), settings), path)
    model = _loaded(AutoModelForSequenceClassification, path, "reward model")
    _refuse_non_finite(model, path)
    return _ready(model, settings)


def reward_model_from_policy(
    path: str | Path, settings: RunSettings, *, gguf_file: str | None = None
) -> PreTrainedModel:
    """A policy's trunk under a fresh scalar head whose weights depend only on the seed.

    Source: §3.2.2 (the classification head for next-token prediction is replaced by a scalar head).
    """
    policy = load_policy(path, settings, gguf_file=gguf_file)
    config = policy.config
    config.num_labels = 1
    config.architectures = None
    seed_everything(settings.seed)
    return _ready(_under_a_head(policy, config), settings)


def chat_format_of(path: str | Path) -> Literal["llama2", "tokenizer"]:
    """The chat format that a model folder's config names; llama2 where it names none."""
    _check_folder(path)
    config = _config_of(path, "policy")
    return "tokenizer" if getattr(config, "chat_format", "llama2") == "tokenizer" else "llama2"


def save_model(
    model: PreTrainedModel,
    tokenizer: ChatTokenizer,
    folder: Path,
    *,
    settings: RunSettings,
    card: str,
    adapter: Path | None = None,
) -> None:
    """Write model, tokenizer and model card as one folder, atomically; the config names the chat format.

    Of several processes the first writes, and all return when it has.

    Args:
        adapter: The folder that `lora.merged` wrote. Given, it goes into `folder` in place of the model's weights,
            with a `base.json` that names the model they were trained from (`adapter_base.py`).
    """
    model.config.chat_format = settings.chat_format
    if is_main_process():
        with atomic_path(folder) as temporary:
            if adapter is None:
                model.save_pretrained(temporary)
            else:
                shutil.copytree(adapter, temporary)
                _save_config(model, temporary)
                path = str(model.name_or_path)
                base = BaseModelSource(path=path, gguf_file=settings.gguf_file_of(path))
                name_base(base, folder, into=temporary)
            tokenizer.save(temporary)
            write_text(temporary / "README.md", card)
        if adapter is not None:
            remove(adapter)
    wait_for_everyone()


def use_fitting_threads(model: PreTrainedModel, device: torch.device) -> None:
    """One CPU thread for a model of a few million parameters.

    Its products take microseconds, so threads spend their time waiting for each other: with another process
    on the machine, sampling with two threads was ten times slower than with one. One thread also makes
    the result independent of the number of cores.
    """
    if device.type == "cpu" and model.num_parameters() < _PARAMETERS_WORTH_THREADS:
        torch.set_num_threads(1)


def _under_a_head(policy: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """The policy's trunk, its very weights, under a fresh scalar head."""
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(  # type: ignore[no-untyped-call]
        config, attn_implementation="sdpa"
    )
    model.base_model.load_state_dict(policy.base_model.state_dict(), assign=True)
    return model


def _merged_into(base: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """The base with the folder's adapter in its weights, as if that had been saved whole."""
    from llama2_chat.lora import merged, with_saved_adapter  # not above: it seeds with this module's function

    whole = merged(with_saved_adapter(base, folder))
    whole.config.chat_format = chat_format_of(folder)
    whole.name_or_path = whole.config.name_or_path = str(folder)
    _refuse_non_finite(whole, folder)
    return whole


def _save_config(model: PreTrainedModel, folder: Path) -> None:
    """What `save_pretrained` writes beside the weights."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _ready(model: PreTrainedModel, settings: RunSettings) -> PreTrainedModel:
    use_fitting_threads(model, select_device(settings.device))
    model.config.use_cache = True
    model.train(False)
    ready: PreTrainedModel = model.to(select_device(settings.device))  # type: ignore[arg-type]
    use_packed_attention(ready)
    return ready


def _check_folder(path: str | Path) -> None:
    """A path that looks like a folder must hold a model; anything else may be a hub id."""
    folder = Path(path)
    looks_local = folder.is_absolute() or str(path).startswith((".", "~")) or str(path).count(os.sep) != 1
    if folder.is_dir():
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.gguf")):
            raise UserInputError(f"{path}: no *.safetensors in this folder (pickled weights are not loaded)")
    elif looks_local:
        raise MissingFileError(f"{path}: no such model folder")


def _config_of(path: str | Path, what: str) -> Any:
    """The model's configuration; an error says that `path` is no `what`."""
    try:
        return AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _unusable(path, what, error) from error


def _loaded(auto_class: Any, path: str | Path, what: str, **arguments: Any) -> PreTrainedModel:
    """The whole model: transformers would make up the weights that a folder lacks, and only warn."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        model, report = auto_class.from_pretrained(
            str(path),
            dtype=torch.float32,
            attn_implementation="sdpa",
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **arguments,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if disk_full(error) or out_of_memory(error):
            raise
        raise _unusable(path, what, error) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    for name, stored, wanted in sorted(report["mismatched_keys"], key=str)[:1]:
        sizes = f"the tensor {name} is {tuple(stored)}, config.json says {tuple(wanted)}"
        raise _unusable(path, what, f"{sizes}: they belong to different models")
    if missing := sorted(report["missing_keys"]):
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise _unusable(path, what, f"it lacks the tensor {missing[0]}{others}")
    return model  # type: ignore[no-any-return]


def _unusable(path: str | Path, what: str, problem: object) -> UserInputError:
    text = str(problem).rstrip(". ")
    return UserInputError(f"{path}: cannot be loaded as a {what}: {text}; copy or make the model again")


def _refuse_non_finite(model: PreTrainedModel, path: str | Path, gguf_file: str | None = None) -> None:
    """One NaN among the weights makes every loss NaN, and no later message would say where it came from."""
    for name, weight in model.named_parameters():
        # Both ends of the range are NaN if any element is; unlike isfinite this needs no second tensor.
        if weight.numel() and not all(end.isfinite() for end in torch.aminmax(weight.detach())):
            raise UserInputError(
                f"{_file_of(name, path, gguf_file)}: the tensor {name} holds a value that is not finite (NaN or "
                "infinite), so nothing can be trained from or sampled with it; copy or make the model again"
            )


def _file_of(tensor: str, path: str | Path, gguf_file: str | None) -> Path:
    """The file of a model folder that holds a tensor; the folder (or hub id) itself where that is not known."""
    folder = Path(path)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return folder / str(read_json(index)["weight_map"].get(tensor, ""))
    single = folder / (gguf_file or "model.safetensors")
    return single if single.is_file() else folder


def _without_quantization(model: PreTrainedModel) -> PreTrainedModel:
    """A GGUF model's weights in a fresh model that can be saved."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, attn_implementation="sdpa"
    )
    fresh.load_state_dict(model.state_dict())
    return fresh
