"""Chat formats: how messages become token ids, and which of those ids are an answer.

`llama2` is the format of Meta's released code, token for token; `tokenizer` renders the tokenizer's own
chat template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from llama2_chat.dialogue import Message
from llama2_chat.errors import UserInputError
from llama2_chat.tokenizers import ChatTokenizer


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of token ids; `trained` if it belongs to an answer (its end-of-turn token included)."""

    ids: list[int]
    trained: bool


class ChatFormat(Protocol):
    """Messages to token ids and back."""

    stop_id: int
    """The token that ends an answer."""

    def segments(self, messages: Sequence[Message]) -> list[Segment]:
        """A dialogue as alternating prompt and answer segments; it may end with either role."""
        ...

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """A dialogue that ends with the user, ready to be continued."""
        ...

    def decode_response(self, ids: Sequence[int]) -> str:
        """Text of sampled ids up to the stop token, stripped."""
        ...


def build_chat_format(name: Literal["llama2", "tokenizer"], tokenizer: ChatTokenizer) -> ChatFormat:
    """The chat format that a recipe names."""
    return Llama2ChatFormat(tokenizer) if name == "llama2" else TokenizerChatFormat(tokenizer)


class Llama2ChatFormat:
    """BOS `[INST] {user} [/INST] {answer} ` EOS, every turn encoded in one call and on its own.

    A system message is folded into the first user message. Source: PAPER's released reference code.
    """

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.tokenizer = tokenizer
        self.stop_id = tokenizer.eos_id

    def segments(self, messages: Sequence[Message]) -> list[Segment]:
        """See `ChatFormat.segments`."""
        result = []
        users, answers = _folded(messages)
        for number, user in enumerate(users):
            prompt_text = f"[INST] {user.strip()} [/INST]"
            prompt = self.tokenizer.encode(prompt_text)
            result.append(Segment([self.tokenizer.bos_id, *prompt], trained=False))
            if number < len(answers):
                whole = self.tokenizer.encode(f"{prompt_text} {answers[number].strip()} ")
                if whole[: len(prompt)] != prompt:
                    raise UserInputError(
                        f"this tokenizer merges the end of the prompt with the answer in {user!r}; "
                        "the Llama 2 format cannot be used with it, choose chat_format: tokenizer"
                    )
                result.append(Segment([*whole[len(prompt) :], self.tokenizer.eos_id], trained=True))
        return result

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """See `ChatFormat.prompt_ids`."""
        return _joined_prompt(self.segments(messages), messages)

    def decode_response(self, ids: Sequence[int]) -> str:
        """See `ChatFormat.decode_response`."""
        return self.tokenizer.decode(_until(ids, self.stop_id)).strip()


class TokenizerChatFormat:
    """The tokenizer's own chat template; answers are found by comparing rendered prefixes."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        if tokenizer.hf is None or tokenizer.hf.chat_template is None:
            raise UserInputError("chat_format: this tokenizer has no chat template; use llama2")
        self.tokenizer = tokenizer
        self.stop_id = tokenizer.eos_id

    def segments(self, messages: Sequence[Message]) -> list[Segment]:
        """See `ChatFormat.segments`."""
        result: list[Segment] = []
        seen: list[int] = []
        for number, message in enumerate(messages):
            if message.role != "assistant":
                continue
            for count, prompt, trained in ((number, True, False), (number + 1, False, True)):
                ids = self._render(messages[:count], prompt=prompt)
                if trained:
                    ids = self._through_stop(ids, len(seen))
                if ids[: len(seen)] != seen:
                    raise UserInputError(
                        "chat_format: this tokenizer's template changes earlier turns when a turn is added, so "
                        "answers cannot be found in it; use llama2 or a template that only appends"
                    )
                result.append(Segment(ids[len(seen) :], trained))
                seen = ids
        if messages[-1].role == "user":
            ids = self._render(messages, prompt=True)
            if ids[: len(seen)] != seen:
                raise UserInputError("chat_format: this tokenizer's template changes earlier turns")
            result.append(Segment(ids[len(seen) :], trained=False))
        return result

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """See `ChatFormat.prompt_ids`."""
        return _joined_prompt(self.segments(messages), messages)

    def decode_response(self, ids: Sequence[int]) -> str:
        """See `ChatFormat.decode_response`."""
        return self.tokenizer.decode(_until(ids, self.stop_id)).strip()

    def _render(self, messages: Sequence[Message], *, prompt: bool) -> list[int]:
        rows = [{"role": message.role, "content": message.content} for message in messages]
        rendered = self.tokenizer.hf.apply_chat_template(
            rows, tokenize=True, add_generation_prompt=prompt, return_dict=False
        )
        return list(rendered)

    def _through_stop(self, ids: list[int], start: int) -> list[int]:
        """Up to the answer's end-of-turn token; a template's line break after it belongs to the next turn."""
        for place in range(len(ids) - 1, start - 1, -1):
            if ids[place] == self.stop_id:
                return ids[: place + 1]
        return ids


def _folded(messages: Sequence[Message]) -> tuple[list[str], list[str]]:
    """User texts, the first with the system message folded in, and answers."""
    users = [message.content for message in messages if message.role == "user"]
    answers = [message.content for message in messages if message.role == "assistant"]
    if messages and messages[0].role == "system":
        users[0] = f"<<SYS>>\n{messages[0].content}\n<</SYS>>\n\n{users[0]}"
    return users, answers


def _joined_prompt(segments: Sequence[Segment], messages: Sequence[Message]) -> list[int]:
    if messages[-1].role != "user":
        raise ValueError("a prompt ends with the user's message")
    return [token for segment in segments for token in segment.ids]


def _until(ids: Sequence[int], stop_id: int) -> list[int]:
    kept = list(ids)
    return kept[: kept.index(stop_id)] if stop_id in kept else kept
