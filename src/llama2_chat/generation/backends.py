"""The engine that a stage's `sampling.backend` names."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from llama2_chat.adapter_base import base_of
from llama2_chat.chat_format import ChatFormat, build_chat_format
from llama2_chat.generation.engine import GenerationEngine
from llama2_chat.generation.transformers_engine import load_engine
from llama2_chat.generation.vllm_engine import VllmEngine
from llama2_chat.models import load_policy, select_device
from llama2_chat.settings import RunSettings, SamplingConfig, VllmConfig
from llama2_chat.tokenizers import load_tokenizer


@contextmanager
def open_engine(
    path: str, settings: RunSettings, sampling: SamplingConfig
) -> Iterator[tuple[GenerationEngine, ChatFormat]]:
    """An engine on the policy at `path` (a stage's model or the run's base) and its chat format, for the block.

    Raises:
        UserInputError: there is no such model, or no environment with vLLM.
        SamplingServerError: vLLM's server does not start.
    """
    if sampling.backend == "transformers":
        yield load_engine(path, settings)
        return
    gguf_file = settings.gguf_file_of(path)
    chat_format = build_chat_format(settings.chat_format, load_tokenizer(path, gguf_file))
    with (
        _folder_for_vllm(path, settings, gguf_file) as folder,
        VllmEngine(
            folder,
            stop_id=chat_format.stop_id,
            dtype=settings.precision,
            config=sampling.vllm or VllmConfig(),
            eager=select_device(settings.device).type == "cpu",
        ) as engine,
    ):
        yield engine, chat_format


@contextmanager
def _folder_for_vllm(path: str, settings: RunSettings, gguf_file: str | None) -> Iterator[str]:
    """vLLM reads whole models in safetensors: what is none is written as such, for as long as the block runs."""
    if gguf_file is None and base_of(path) is None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="llama2-chat-model-") as folder:
        on_cpu = settings.model_copy(update={"device": "cpu"})
        load_policy(path, on_cpu, gguf_file=gguf_file).save_pretrained(folder)
        yield folder
