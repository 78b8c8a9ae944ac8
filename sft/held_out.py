"""A policy watched on held-out dialogues: the loss that training minimises, and answers to read, where nothing is
trained."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llama2_chat import distributed, interruption
from llama2_chat.chat_format import ChatFormat
from llama2_chat.dialogue import Dialogue, Message, messages_to_rows
from llama2_chat.errors import UserInputError
from llama2_chat.generation.transformers_engine import TransformersEngine
from llama2_chat.packing import IGNORED, PackedRow, collate_rows
from llama2_chat.settings import SamplingConfig
from llama2_chat.tokenization import fit_to_length
from llama2_chat.training import forget_later_steps

Score = Callable[..., tuple[Tensor, Tensor]]
"""`trained_token_loss` of a model, by the names of a batch's tensors."""

_SHOWN = SamplingConfig(temperature=0.0, max_new_tokens=128)


@dataclass(frozen=True)
class Questions:
    """Held-out questions that the policy answers in the course of its training, for a person to read."""

    messages: Sequence[tuple[Message, ...]]
    chat_format: ChatFormat
    padding_id: int
    file: Path
    """JSONL, a line an answer: step, prompt, response."""

    def answer(self, model: PreTrainedModel, step: int, autocast: torch.dtype | None) -> None:
        """Append greedy answers to the file, in place of what an interrupted run left from this step on; print them."""
        engine = TransformersEngine(
            model, stop_id=self.chat_format.stop_id, padding_id=self.padding_id, autocast=autocast
        )
        prompts = [self.chat_format.prompt_ids(messages) for messages in self.messages]
        answers = engine.generate(prompts, samples_per_prompt=1, sampling=_SHOWN, seed=0)
        forget_later_steps(self.file, step - 1)
        with self.file.open("a", encoding="utf-8") as stream:
            for messages, responses in zip(self.messages, answers, strict=True):
                text = self.chat_format.decode_response(responses[0].token_ids)
                row = {"step": step, "prompt": messages_to_rows(messages), "response": text}
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
                print(f"step {step}: {messages[-1].content!r} -> {text!r}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class HeldOut:
    """Held-out dialogues, packed, and how often a policy is measured on them in the course of its training.

    Each dialogue is measured by itself, whatever training lets a dialogue see.
    """

    rows: Sequence[PackedRow]
    padding_id: int
    every: int | None = None
    questions: Questions | None = None

    @torch.no_grad()
    def measure(self, score: Score, device: torch.device, autocast: torch.dtype | None) -> dict[str, Any]:
        """Over all tokens that the masks select: `loss` (nats a token), `perplexity`, `token_accuracy` and
        `trained_tokens`. Several processes share the rows, and each gets the whole result.

        Raises:
            UserInputError: the masks select nothing.
            Interrupted: a signal asked for the end.
        """
        loss, correct, count = 0.0, 0, 0
        for columns in self._share():
            interruption.raise_together()
            batch = collate_rows([columns], self.padding_id)
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                total, right = score(**batch)
            loss += total.item()
            correct += int(right)
            count += int((batch["labels"] != IGNORED).sum())
        loss, all_correct, tokens = distributed.total([loss, float(correct), float(count)])
        if tokens == 0:
            raise UserInputError(
                "held_out: no answer to measure; the loss policy selects nothing in what fits into a row"
            )
        return {
            "loss": loss / tokens,
            "perplexity": math.exp(min(loss / tokens, 700.0)),
            "token_accuracy": all_correct / tokens,
            "trained_tokens": int(tokens),
        }

    def _share(self) -> list[dict[str, list[int]]]:
        """This process's rows; all have as many, since sharded weights are gathered by all at once."""
        processes = distributed.process_count()
        nothing = PackedRow([self.padding_id], [IGNORED], [0])
        shares = [self.rows[number::processes] for number in range(processes)]
        turns = zip_longest(*shares, fillvalue=nothing)
        return [turn[distributed.process_number()].to_columns() for turn in turns]


def questions_of(
    dialogues: Iterable[Dialogue], count: int, chat_format: ChatFormat, max_tokens: int
) -> list[tuple[Message, ...]]:
    """The first `count` dialogues up to their last question, without oldest turns that exceed `max_tokens`.

    One whose last question alone exceeds them is passed over.
    """
    asked = (_until_last_question(dialogue.messages) for dialogue in dialogues)
    fitted = (fit_to_length(messages, chat_format, max_tokens) for messages in asked)
    return list(islice((messages for messages in fitted if messages is not None), count))


def _until_last_question(messages: Sequence[Message]) -> Sequence[Message]:
    last = max(place for place, message in enumerate(messages) if message.role == "user")
    return messages[: last + 1]
