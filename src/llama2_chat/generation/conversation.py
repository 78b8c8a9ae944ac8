"""Sampling whole conversations: the key/value cache is kept from turn to turn, so no history is encoded twice.

Every answer is the one that `TransformersEngine.generate` would give to the same messages with the same
seed (up to the rounding of batched arithmetic). So the cache must hold what encoding the messages anew would
give. It may not: an answer is stripped, ends before a chat tag, lacks its stop token, or was sampled in
other tokens than its text is encoded in. Therefore each turn's prompt is tokenised from the messages, the
cache is kept as far as its tokens agree with it, and everything after the first difference is computed again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from llama2_chat import interruption
from llama2_chat.chat_format import ChatFormat, InstructedChatFormat
from llama2_chat.dialogue import Message, Prompt
from llama2_chat.generation.answers import Answer, to_answer
from llama2_chat.generation.decoding import CachedBatch, decode, feed
from llama2_chat.generation.engine import Response
from llama2_chat.generation.growing_cache import growing_cache
from llama2_chat.generation.sampling import uniforms_for_prompt
from llama2_chat.generation.transformers_engine import TransformersEngine
from llama2_chat.settings import SamplingConfig
from llama2_chat.tokenization import fit_to_length


@dataclass(frozen=True, slots=True)
class Conversation:
    """The user's side of a conversation.

    `questions` are answered one after the other. `history` stands before them as it is: a system message,
    whole turns whose answers are given, both or nothing. `asides[n]` is asked after n of the questions, and the
    conversation goes on as if it had not been. `instruction` stands, with a space, before the first user message of
    every prompt, also where the oldest turns are left out.
    """

    questions: tuple[str, ...]
    history: tuple[Message, ...] = ()
    asides: Mapping[int, str] = field(default_factory=dict)
    instruction: str | None = None

    def __post_init__(self) -> None:
        if not self.questions:
            raise ValueError("a conversation needs at least one question")
        if not all(0 <= place <= len(self.questions) for place in self.asides):
            raise ValueError(f"an aside comes after 0 to {len(self.questions)} of the questions")
        for text in (*self.questions, *self.asides.values(), self.instruction or ""):
            Prompt((*self.history, Message("user", text)))  # checks the roles and the text


@dataclass(frozen=True, slots=True)
class SampledConversation:
    """The answer to each question and to each aside, and what became of the cache on the way.

    `recomputed` counts the turns at which a part of the cache was not what the messages encode to; `shortened_at` are
    those, from 1 on, at which the oldest turns were left out to fit into the model's context.
    """

    answers: tuple[Answer, ...]
    asides: Mapping[int, Answer]
    recomputed: int
    shortened_at: tuple[int, ...]

    @property
    def shortened(self) -> int:
        """How many turns were shortened."""
        return len(self.shortened_at)


@dataclass(eq=False)
class _Row:
    """A conversation in progress. `cache` holds at least the tokens `ids`: (2·layers, heads, tokens, width)."""

    messages: list[Message]
    questions: deque[str]
    asides: dict[int, str]
    chat_format: ChatFormat
    size: int
    answers: list[Answer] = field(default_factory=list)
    aside_answers: dict[int, Answer] = field(default_factory=dict)
    in_aside: bool = False
    ids: list[int] = field(default_factory=list)
    cache: Tensor | None = None
    prompt: list[int] = field(default_factory=list)
    recomputed: int = 0
    shortened_at: list[int] = field(default_factory=list)

    def has_more(self) -> bool:
        """Whether anything is still to be asked."""
        return bool(self.questions or self.asides)

    def ask(self) -> None:
        """Put the next question, an aside if one comes here."""
        aside = self.asides.pop(len(self.answers), None)
        self.in_aside = aside is not None
        self.messages.append(Message("user", self.questions.popleft() if aside is None else aside))

    def take(self, answer: Answer) -> None:
        """The answer to what was asked; an aside is forgotten."""
        if self.in_aside:
            self.aside_answers[len(self.answers)] = answer
            self.messages.pop()
            return
        self.answers.append(answer)
        self.messages.append(Message("assistant", answer.text))


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
        while active := [row for row in batch if row.has_more()]:
            interruption.raise_if_requested()
            ready = [row for row in active if _ask(row, context - sampling.max_new_tokens)]
            with engine.inference():
                responses = _respond(engine, ready, sampling, seed) if ready else []
            for row, response in zip(ready, responses, strict=True):
                row.take(to_answer(response, chat_format))
    return [
        SampledConversation(tuple(row.answers), row.aside_answers, row.recomputed, tuple(row.shortened_at))
        for row in rows
    ]


def _new_row(
    conversation: Conversation, chat_format: ChatFormat, sampling: SamplingConfig, context: int
) -> _Row:
    if conversation.instruction is not None:
        chat_format = InstructedChatFormat(chat_format, conversation.instruction)
    first, *others = conversation.questions
    size = len(chat_format.prompt_ids([*conversation.history, Message("user", first)]))
    size += sum(len(chat_format.prompt_ids([Message("user", question)])) for question in others)
    size += sampling.max_new_tokens * len(conversation.questions)
    size = min(size, context)
    if conversation.asides:
        size *= 2  # an aside is answered on a copy of the cache
    questions, asides = deque(conversation.questions), dict(conversation.asides)
    return _Row(list(conversation.history), questions, asides, chat_format, size)


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


def _ask(row: _Row, room: int) -> bool:
    """Put the next question; False if it is too long to be answered."""
    row.ask()
    row.prompt = row.chat_format.prompt_ids(row.messages)
    if len(row.prompt) <= room:
        return True
    fitted = fit_to_length(row.messages, row.chat_format, room)
    if fitted is None:
        row.take(Answer("", "too_long", Response([], [], "length")))
        return False
    if not row.in_aside:
        row.shortened_at.append(len(row.answers) + 1)
    row.prompt = row.chat_format.prompt_ids(fitted)
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
        row.recomputed += kept[-1] < len(row.ids) and not row.in_aside
    new = [row.prompt[start:] for row, start in zip(rows, kept, strict=True)]
    cache, mask = _joined(rows, kept, engine, room=max(map(len, new)) + sampling.max_new_tokens)
    batch = feed(engine.model, new, padding_id=engine.padding_id, cache=cache, mask_BC=mask)
    uniforms = torch.cat([uniforms_for_prompt(seed, row.prompt, 1, sampling.max_new_tokens) for row in rows])

    def take_cache(batch: CachedBatch, place: int, number: int) -> None:
        if rows[number].has_more() and not rows[number].in_aside:
            rows[number].cache = _row_of(batch, place)

    responses = decode(engine.model, batch, uniforms, sampling, stop_id=engine.stop_id, on_leave=take_cache)
    for row, response in zip(rows, responses, strict=True):
        if not row.in_aside:
            row.ids = row.prompt + response.token_ids[:-1]  # the last token was never fed
    return responses


def _joined(
    rows: Sequence[_Row], kept: Sequence[int], engine: TransformersEngine, *, room: int
) -> tuple[Cache, Tensor]:
    """The first `kept` tokens of the rows' caches as one cache, padded on the left, with its mask.

    The rows give their caches up, but for an aside. The cache has `room` for more tokens.
    """
    longest = max(kept)
    columns = torch.arange(longest, device=engine.model.device)
    mask = (columns >= longest - torch.tensor(kept, device=columns.device)[:, None]).long()
    cache = growing_cache(engine.model.config, room)
    held = [row.cache for row in rows if row.cache is not None]
    if longest == 0:
        return cache, mask
    parts, heads, _, width = held[0].shape
    joined = held[0].new_zeros(parts, len(rows), heads, longest + room, width)
    for place, (row, count) in enumerate(zip(rows, kept, strict=True)):
        if row.cache is not None and count:
            joined[:, place, :, longest - count : longest] = row.cache[:, :, :count]
        if not row.in_aside:
            row.cache = None
    layers: list[Any] = cache.layers
    for number, layer in enumerate(layers):
        layer.hold(joined[2 * number], joined[2 * number + 1], longest)
    return cache, mask


def _row_of(batch: CachedBatch, place: int) -> Tensor:
    """A copy of one row of the cache without its padding."""
    columns = batch.mask[place].nonzero().squeeze(1)
    layers: list[Any] = batch.cache.layers
    parts = (part for layer in layers for part in (layer.keys, layer.values))
    return torch.stack([part[place].index_select(1, columns) for part in parts])
