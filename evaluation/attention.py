"""What a policy attends to while it writes the answers of a dialogue (Fig. 10).

For answer n and token j the *maximum attention activation* is

    a[n, j] = max over layers l, heads h and queries i of A[l, h, i, j]

with A the attention after the softmax and i over the positions from which the tokens of answer n are predicted: from
the last token of its prompt to the one before its stop token. Only what has been written is attended to, so a[n, j] is
0 for tokens after the answer.

Neighbouring tokens are binned within their *part* of the dialogue (a question, an answer, the instruction), so that
no bin mixes two of them. Control tokens (BOS, EOS) are in no bin: heads that have nothing to look for rest on them,
with activations near 1 whatever the dialogue says.

Suffixes: N answers, S tokens, B bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from llama2_chat.chat_format import ChatFormat
from llama2_chat.dialogue import Message
from llama2_chat.errors import UserInputError
from llama2_chat.tokenizers import ChatTokenizer

BinRule = Literal["mean", "max"]
_ACTIVATIONS_AT_ONCE = 2**26
"""Attention probabilities held at once, over all layers and heads: 256 MiB in float32."""


@dataclass(frozen=True, slots=True)
class Part:
    """A run of neighbouring tokens that belong together: the tokens `start` to `end` - 1.

    `role` is "instruction" for what is to be kept, in the system message or in the first question.
    """

    role: Literal["instruction", "user", "assistant"]
    turn: int
    start: int
    end: int

    def to_row(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"role": self.role, "turn": self.turn, "start": self.start, "end": self.end}


@dataclass(frozen=True, slots=True)
class TokenizedParts:
    """A dialogue's tokens, the parts they make up, and which of them are control tokens (S,)."""

    input_ids: list[int]
    parts: list[Part]
    control_mask: list[bool]

    @property
    def answers(self) -> list[Part]:
        """The answers, in order."""
        return [part for part in self.parts if part.role == "assistant"]


@torch.no_grad()
def maximum_attention(
    model: PreTrainedModel,
    input_ids: Sequence[int],
    answers: Sequence[tuple[int, int]],
    *,
    activations_at_once: int = _ACTIVATIONS_AT_ONCE,
) -> Tensor:
    """a[n, j] as above, float32 (N, S) on the CPU, each in [0, 1].

    The queries go through the model in chunks, with a key/value cache, so that no S x S matrix is ever held.

    Args:
        answers: First token and end of each answer; an answer begins after the first token.
        activations_at_once: Most attention probabilities of one chunk, over all layers and heads.

    Raises:
        UserInputError: the model does not give its attention probabilities.
    """
    if any(not 0 < start < end <= len(input_ids) for start, end in answers):
        raise ValueError(f"answers lie within tokens 1 to {len(input_ids)} and are not empty")
    length, config = len(input_ids), model.config
    trunk: Any = model.base_model  # without the head: nothing is predicted here
    each = int(config.num_hidden_layers) * int(config.num_attention_heads) * length
    chunk = max(1, activations_at_once // each)
    before = config._attn_implementation
    model.set_attn_implementation("eager")  # the only one that gives probabilities
    maxima_NS = torch.zeros(len(answers), length)
    cache = DynamicCache(config=config)
    ids = torch.tensor([list(input_ids)], device=model.device)
    try:
        for first in range(0, length, chunk):
            found = trunk(ids[:, first : first + chunk], past_key_values=cache, output_attentions=True)
            layers = (
                [] if found.attentions is None else [layer for layer in found.attentions if layer is not None]
            )
            if not layers:
                raise UserInputError(
                    f"{model.name_or_path}: {config.model_type} gives no attention probabilities"
                )
            # (heads, queries, keys) of each layer to (queries, keys)
            highest = torch.stack([layer[0].float().amax(0) for layer in layers]).amax(0).cpu()
            for number, (start, end) in enumerate(answers):
                own = highest[max(start - 1 - first, 0) : max(end - 1 - first, 0)]
                if len(own):
                    row = maxima_NS[number, : own.shape[1]]
                    torch.maximum(row, own.amax(0), out=row)
    finally:
        model.set_attn_implementation(before)
    return maxima_NS


def tokenize_parts(
    messages: Sequence[Message],
    chat_format: ChatFormat,
    tokenizer: ChatTokenizer,
    *,
    instruction: str | None = None,
) -> TokenizedParts:
    """A dialogue's tokens with its parts; what follows the last answer is left out.

    Args:
        instruction: What the first user message begins with and is to be kept; a system message is it otherwise.

    Raises:
        ValueError: there is no answer, or the first user message does not begin with `instruction`.
    """
    segments = chat_format.segments(messages)
    last = max((place for place, segment in enumerate(segments) if segment.trained), default=None)
    if last is None:
        raise ValueError("holds no answer; attention is measured while answers are written")
    parts: list[Part] = []
    start, turn = 0, 1
    for segment in segments[: last + 1]:
        end = start + len(segment.ids)
        parts.append(Part("assistant" if segment.trained else "user", turn, start, end))
        turn += segment.trained
        start = end
    ids = [token for segment in segments[: last + 1] for token in segment.ids]
    text = _instruction_of(messages, instruction)
    if text is not None:
        parts[:1] = _split(parts[0], _span_of(text, ids[: parts[0].end], tokenizer))
    control = [
        not tokenizer.decode([token]) and bool(tokenizer.decode([token], keep_control=True)) for token in ids
    ]
    return TokenizedParts(ids, parts, control)


def _instruction_of(messages: Sequence[Message], instruction: str | None) -> str | None:
    if instruction is None:
        # A system message of blanks alone keeps nothing.
        return messages[0].content.strip() or None if messages[0].role == "system" else None
    if not instruction.strip():
        raise ValueError("instruction is empty; write what is to be kept or leave it out")
    first = next(message for message in messages if message.role == "user")
    if not first.content.startswith(instruction):
        raise ValueError("the first user message does not begin with the row's instruction")
    return instruction


def _span_of(text: str, ids: Sequence[int], tokenizer: ChatTokenizer) -> tuple[int, int]:
    """First token and end of those that hold `text`, by what the ids decode to."""
    text = text.strip()
    ends = [len(tokenizer.decode(ids[:count])) for count in range(len(ids) + 1)]
    place = tokenizer.decode(ids).find(text)
    if place < 0:
        raise ValueError(f"the instruction {text[:40]!r} cannot be found in the first turn's tokens")
    touched = [
        number
        for number, (start, end) in enumerate(pairwise(ends))
        if start < place + len(text) and end > place
    ]
    return touched[0], touched[-1] + 1


def _split(part: Part, span: tuple[int, int]) -> list[Part]:
    """The first question's part as three: before the instruction, the instruction, after it."""
    start, end = span
    pieces = [
        Part(part.role, part.turn, part.start, start),
        Part("instruction", part.turn, start, end),
        Part(part.role, part.turn, end, part.end),
    ]
    return [piece for piece in pieces if piece.start < piece.end]


def bins_of(dialogue: TokenizedParts, bin_size: int) -> list[Part]:
    """Each part in bins of at most `bin_size` neighbouring tokens, sizes within a part as even as can be."""
    bins: list[Part] = []
    for part in dialogue.parts:
        length = part.end - part.start
        count = -(-length // bin_size)
        edges = [part.start + length * number // count for number in range(count + 1)]
        bins += [Part(part.role, part.turn, start, end) for start, end in pairwise(edges)]
    # A bin of control tokens alone would be empty.
    return [one for one in bins if not all(dialogue.control_mask[one.start : one.end])]


def binned(
    maxima_NS: Tensor, dialogue: TokenizedParts, bins: Sequence[Part], rule: BinRule
) -> list[list[float | None]]:
    """Mean or maximum of a[n, j] over each bin's tokens, (N, B); None for bins after the answer."""
    kept_S = ~torch.tensor(dialogue.control_mask)
    rows: list[list[float | None]] = []
    for row_S, answer in zip(maxima_NS, dialogue.answers, strict=True):
        row: list[float | None] = []
        for one in bins:
            values = row_S[one.start : one.end][kept_S[one.start : one.end]]
            value = values.mean() if rule == "mean" else values.max()
            row.append(value.item() if one.start < answer.end else None)
        rows.append(row)
    return rows


def attention_to_instruction(maxima_NS: Tensor, dialogue: TokenizedParts) -> list[float] | None:
    """Mean of a[n, j] over the instruction's tokens for each answer, (N,); None if there is no instruction."""
    spans = (range(part.start, part.end) for part in dialogue.parts if part.role == "instruction")
    places = [place for place in chain.from_iterable(spans) if not dialogue.control_mask[place]]
    return [float(value) for value in maxima_NS[:, places].mean(1)] if places else None
