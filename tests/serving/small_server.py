"""Small reward models with random heads, a server process, a client without a network."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from llama2_chat.models import save_model
from llama2_chat.pretrain.tokenizer import train_tokenizer
from llama2_chat.serving.app import build_app
from llama2_chat.serving.limits import Limits
from llama2_chat.serving.service import ScoringService
from llama2_chat.settings import BaseModelSource, RunSettings
from llama2_chat.testbed.generators import GENERATORS
from llama2_chat.tokenizers import HuggingFaceTokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MAX_TOKENS = 256


def save_reward_model(folder: Path, *, seed: int, chatml: bool = False) -> Path:
    """A random Llama whose scores differ by whole units between dialogues."""
    texts = [row["text"] for row in GENERATORS["pretraining_text"](rows=400, seed=0)]
    raw = train_tokenizer(texts, 400)
    if chatml:
        raw.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
        raw.chat_template = CHATML
    tokenizer = HuggingFaceTokenizer(raw)
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.padding_id,
            num_labels=1,
        )
    )
    model.score.weight.data.mul_(20)
    settings = RunSettings(
        base_model=BaseModelSource(path="base"),
        chat_format="tokenizer" if chatml else "llama2",
        device="cpu",
    )
    save_model(model, tokenizer, folder, settings=settings, card="")
    return folder


@dataclass
class Running:
    """A server process."""

    process: subprocess.Popen[str]
    url: str
    errors: Path

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(60)


Start = Callable[..., Running]


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for something that happens in another thread or process."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


Row = dict[str, Any]
LIMITS = Limits(body_bytes=20_000, dialogues=40, messages=20, characters=3000, body_seconds=0.5)


def talk(question: str = "What is 2 plus 2?", answer: str = "It is 4.", **more: Any) -> Row:
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        **more,
    }


class Client:
    """Requests to an application without a network."""

    def __init__(self, service: ScoringService) -> None:
        self.service = service
        self.app = build_app(service)

    def post(self, path: str, **arguments: Any) -> httpx.Response:
        return asyncio.run(self.gathered([(path, arguments)]))[0]

    async def gathered(self, requests: list[tuple[str, Row]]) -> list[httpx.Response]:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app), base_url="http://server"
        ) as client:
            return await asyncio.gather(*(client.post(path, **row) for path, row in requests))

    def get(self, path: str) -> httpx.Response:
        async def request() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                return await client.get(path)

        return asyncio.run(request())
