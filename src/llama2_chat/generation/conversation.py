"""Sampling whole conversations: the key/value cache is kept from turn to turn, so no history is encoded twice.

Every answer is the one that `TransformersEngine.generate` would give to the same messages with the same
seed (up to the rounding of batched arithmetic). So the cache must hold what encoding the messages anew would
give. It may not: an answer is stripped, ends before a chat tag, lacks its stop token, or was sampled in
other tokens than its text is encoded in. Therefore each turn's prompt is tokenised from the messages, the
cache is kept as far as its tokens agree with it, and everything after the first difference is computed again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from llama2_chat import interruption
from llama2_chat.chat_format import ChatFormat
from llama2_chat.dialogue import Message, Prompt
from llama2_chat.generation.answers import Answer, to_answer
from llama2_chat.generation.decoding import CachedBatch, decode, feed
from llama2_chat.generation.engine import Response
from llama2_chat.generation.sampling import uniforms_for_prompt
from llama2_chat.generation.transformers_engine import TransformersEngine
from llama2_chat.settings import SamplingConfig
from llama2_chat.tokenization import fit_to_length


@dataclass(frozen=True, slots=True)
class Conversation:
    """The user's side of a conversation.

    `questions` are answered one after the other. `history` stands before them as it is: a system message,
    whole turns whose answers are given, both or nothing.
    """

    questions: tuple[str, ...]
    history: tuple[Message, ...] = ()

    def __post_init__(self) -> None:
        if not self.questions:
            raise ValueError("a conversation needs at least one question")
        for question in self.questions:
            Prompt((*self.history, Message("user", question)))  # checks the roles and the text


@dataclass(frozen=True, slots=True)
class SampledConversation:
    """The answer to each question, and what became of the cache on the way.

    `recomputed` counts the turns at which a part of the cache was not what the messages encode to;
    `shortened` those at which the oldest turns were left out to fit into the model's context.
    """

    answers: tuple[Answer, ...]
    recomputed: int
    shortened: int


@dataclass(eq=False)
class _Row:
    """A conversation in progress. `cache` holds at least the tokens `ids`: (2·layers, heads, tokens, width)."""

    messages: list[Message]
    questions: deque[str]
    size: int
    answers: list[Answer] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    cache: Tensor | None = None
    prompt: list[int] = field(default_factory=list)
    recomputed: int = 0
    shortened: int = 0


def sample_conversations(
    engine: TransformersEngine,
    chat_format: ChatFormat,
    conversations: Sequence[Conversation],
    *,
    sampling: SamplingConfig,
    seed: int,
) -> list[SampledConversation]:
    """Sample an answer to every question of every conversation, each after the answers before it.

    A prompt that leaves no room for `sampling.max_new_tokens` in the model's context loses its oldest whole
    turns; where its last question alone is too long, the answer is empty with status "too_long".
    """
    context = int(getattr(engine.model.config, "max_position_embeddings", 4096))
    rows = [_new_row(conversation, chat_format, sampling, context) for conversation in conversations]
    for batch in _batches(rows, sampling.token_budget):
        while active := [row for row in batch if row.questions]:
            interruption.raise_if_requested()
            ready = [row for row in active if _ask(row, chat_format, context - sampling.max_new_tokens)]
            with engine.inference():
                responses = _respond(engine, ready, sampling, seed) if ready else []
            for row, response in zip(ready, responses, strict=True):
                answer = to_answer(response, chat_format)
                row.answers.append(answer)
                row.messages.append(Message("assistant", answer.text))
                row.ids = row.prompt + response.token_ids[:-1]  # the last token was never fed
    return [SampledConversation(tuple(row.answers), row.recomputed, row.shortened) for row in rows]


def _new_row(
    conversation: Conversation, chat_format: ChatFormat, sampling: SamplingConfig, context: int
) -> _Row:
    first, *others = conversation.questions
    size = len(chat_format.prompt_ids([*conversation.history, Message("user", first)]))
    size += sum(len(chat_format.prompt_ids([Message("user", question)])) for question in others)
    size += sampling.max_new_tokens * len(conversation.questions)
    return _Row(list(conversation.history), deque(conversation.questions), min(size, context))


def _batches(rows: Sequence[_Row], token_budget: int) -> Iterator[list[_Row]]:
    """Conversations of similar length whose caches fit into the budget together."""
    waiting = sorted(rows, key=lambda row: (-len(row.questions), -row.size))
    while waiting:
        count = 1
        longest = waiting[0].size
        for row in waiting[1:]:
            longest = max(longest, row.size)
            if (count + 1) * longest > token_budget:
                break
            count += 1
        yield waiting[:count]
        waiting = waiting[count:]


def _ask(row: _Row, chat_format: ChatFormat, room: int) -> bool:
    """Put the next question; False if it is too long to be answered."""
    row.messages.append(Message("user", row.questions.popleft()))
    row.prompt = chat_format.prompt_ids(row.messages)
    if len(row.prompt) <= room:
        return True
    fitted = fit_to_length(row.messages, chat_format, room)
    if fitted is None:
        row.answers.append(Answer("", "too_long", Response([], [], "length")))
        row.messages.append(Message("assistant", ""))
        return False
    row.shortened += 1
    row.prompt = chat_format.prompt_ids(fitted)
    return True


def _respond(
    engine: TransformersEngine, rows: Sequence[_Row], sampling: SamplingConfig, seed: int
) -> list[Response]:
    """A response to each row's prompt; the rows' caches grow by it."""
    kept = []
    for row in rows:
        agreeing = takewhile(lambda pair: pair[0] == pair[1], zip(row.ids, row.prompt, strict=False))
        # At least one token must be fed: the answer is drawn from what it gives.
        kept.append(min(sum(1 for _ in agreeing), len(row.prompt) - 1))
        row.recomputed += kept[-1] < len(row.ids)
    cache, mask = _joined(rows, kept, engine)
    new = [row.prompt[start:] for row, start in zip(rows, kept, strict=True)]
    batch = feed(engine.model, new, padding_id=engine.padding_id, cache=cache, mask_BC=mask)
    uniforms = torch.cat([uniforms_for_prompt(seed, row.prompt, 1, sampling.max_new_tokens) for row in rows])

    def take_cache(batch: CachedBatch, place: int, number: int) -> None:
        if rows[number].questions:
            rows[number].cache = _row_of(batch, place)

    return decode(engine.model, batch, uniforms, sampling, stop_id=engine.stop_id, on_leave=take_cache)


def _joined(
    rows: Sequence[_Row], kept: Sequence[int], engine: TransformersEngine
) -> tuple[DynamicCache, Tensor]:
    """The first `kept` tokens of the rows' caches as one cache, padded on the left, with its mask.

    The rows give their caches up.
    """
    longest = max(kept)
    columns = torch.arange(longest, device=engine.model.device)
    mask = (columns >= longest - torch.tensor(kept, device=columns.device)[:, None]).long()
    held = [row.cache for row in rows if row.cache is not None]
    if longest == 0:
        return DynamicCache(), mask
    parts, heads, _, width = held[0].shape
    joined = held[0].new_zeros(parts, len(rows), heads, longest, width)
    for place, (row, count) in enumerate(zip(rows, kept, strict=True)):
        if row.cache is not None and count:
            joined[:, place, :, longest - count :] = row.cache[:, :, :count]
        row.cache = None
    return DynamicCache([(joined[layer], joined[layer + 1]) for layer in range(0, parts, 2)]), mask


def _row_of(batch: CachedBatch, place: int) -> Tensor:
    """A copy of one row of the cache without its padding."""
    columns = batch.mask[place].nonzero().squeeze(1)
    layers: list[Any] = batch.cache.layers
    parts = (part for layer in layers for part in (layer.keys, layer.values))
    return torch.stack([part[place].index_select(1, columns) for part in parts])
