"""Chat formats: how messages become token ids, and which of those ids are an answer.

`llama2` is the format of Meta's released code, token for token; `tokenizer` is the tokenizer's own chat
template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, Protocol

from llama2_chat.chat_template import ChatTemplate
from llama2_chat.dialogue import Message, check_role_order
from llama2_chat.errors import UserInputError
from llama2_chat.tokenizers import LLAMA2_TEMPLATE, ChatTokenizer


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of token ids; `trained` if it belongs to an answer (its end-of-turn token included)."""

    ids: list[int]
    trained: bool


class ChatFormat(Protocol):
    """Messages to token ids and back."""

    @property
    def stop_id(self) -> int:
        """The token that ends an answer."""
        ...

    def segments(self, messages: Sequence[Message]) -> list[Segment]:
        """A dialogue as alternating prompt and answer segments; it may end with either role."""
        ...

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """A dialogue that ends with the user, ready to be continued."""
        ...

    def decode_response(self, ids: Sequence[int]) -> str:
        """Text of sampled ids up to the stop token, stripped."""
        ...

    def first_control(self, ids: Sequence[int]) -> int | None:
        """The place of the first control token before the stop token; it has no text, so no text shows it."""
        ...


def build_chat_format(name: Literal["llama2", "tokenizer"], tokenizer: ChatTokenizer) -> ChatFormat:
    """The chat format that a recipe names; `tokenizer` is from then on saved with that format's template."""
    return Llama2ChatFormat(tokenizer) if name == "llama2" else TokenizerChatFormat(tokenizer)


class Llama2ChatFormat:
    """BOS `[INST] {user} [/INST] {answer} ` EOS, every turn encoded in one call and on its own.

    A system message is folded into the first user message. Source: the reference code released with
    "Llama 2: Open Foundation and Fine-Tuned Chat Models".
    """

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        """Raises UserInputError if the tokenizer has no BOS."""
        self.tokenizer = tokenizer
        self.bos_id = tokenizer.bos_id
        self.stop_id = tokenizer.eos_id
        tokenizer.chat_template = LLAMA2_TEMPLATE

    def segments(self, messages: Sequence[Message]) -> list[Segment]:
        """See `ChatFormat.segments`.

        Raises:
            ValueError: the roles are out of order.
            UserInputError: the tokenizer merges text across the end of the prompt.
        """
        check_role_order(messages)
        result = []
        users, answers = _folded(messages)
        for number, user in enumerate(users):
            prompt_text = f"[INST] {user.strip()} [/INST]"
            prompt = self.tokenizer.encode(prompt_text)
            result.append(Segment([self.bos_id, *prompt], trained=False))
            if number < len(answers):
                whole = self.tokenizer.encode(f"{prompt_text} {answers[number].strip()} ")
                if whole[: len(prompt)] != prompt:
                    raise UserInputError(
                        f"chat_format: this tokenizer merges the end of the prompt {prompt_text[-60:]!r} with the "
                        "answer, so the Llama 2 format cannot be used with it; choose chat_format: tokenizer"
                    )
                result.append(Segment([*whole[len(prompt) :], self.stop_id], trained=True))
        return result

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """See `ChatFormat.prompt_ids`."""
        return _prompt_ids(self, messages)

    def decode_response(self, ids: Sequence[int]) -> str:
        """See `ChatFormat.decode_response`."""
        return _decode_response(ids, self.stop_id, self.tokenizer)

    def first_control(self, ids: Sequence[int]) -> int | None:
        """See `ChatFormat.first_control`."""
        return _first_control(ids, self.stop_id, self.tokenizer)


class TokenizerChatFormat:
    """The tokenizer's own chat template.

    An answer ends with the first control token that the template writes after it, which is also where
    sampling stops; what the template writes between that token and the next turn is prompt again, and is
    left out at the end of a dialogue.
    """

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        """Raises UserInputError if the tokenizer has no template or the template never ends an answer."""
        self.tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer.hf)
        tokenizer.chat_template = self._template.source
        self.stop_id = self._find_stop_id()

    def segments(self, messages: Sequence[Message]) -> list[Segment]:
        """See `ChatFormat.segments`.

        Raises:
            ValueError: the roles are out of order.
            UserInputError: the template refuses the dialogue, or answers cannot be found in its output.
        """
        check_role_order(messages)
        pieces = self._pieces(messages)
        for place in range(1, len(pieces), 2):
            answer = pieces[place] + pieces[place + 1]
            # The stop token may lie just outside a template's generation mark: one place beyond the answer.
            if self.stop_id not in answer[: len(pieces[place]) + 1]:
                raise UserInputError(
                    f"chat_format: the tokenizer's template does not end an answer with token {self.stop_id} as it "
                    "does elsewhere; mend the template or choose chat_format: llama2"
                )
            end = answer.index(self.stop_id) + 1
            pieces[place], pieces[place + 1] = answer[:end], answer[end:]
        if messages[-1].role == "assistant":
            pieces.pop()
        return [Segment(piece, trained=place % 2 == 1) for place, piece in enumerate(pieces)]

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """See `ChatFormat.prompt_ids`."""
        return _prompt_ids(self, messages)

    def decode_response(self, ids: Sequence[int]) -> str:
        """See `ChatFormat.decode_response`."""
        return _decode_response(ids, self.stop_id, self.tokenizer)

    def first_control(self, ids: Sequence[int]) -> int | None:
        """See `ChatFormat.first_control`."""
        return _first_control(ids, self.stop_id, self.tokenizer)

    def _pieces(self, messages: Sequence[Message]) -> list[list[int]]:
        """Ids between the answers' boundaries: prompt, answer, prompt, …, and last what follows."""
        text, spans = self._template.render_with_answers(messages)
        pieces: list[list[int]] = []
        ids: list[int] = []
        start = 0
        for end in (*chain.from_iterable(spans), len(text)):
            whole = self._template.encode(text[:end])
            # A token that reaches across a boundary would hide the prompt from the answer, or show what the
            # sampler never sees: then the answer is encoded on its own, as a continuation of the prompt.
            keeps = whole[: len(ids)] == ids
            piece = whole[len(ids) :] if keeps else self._template.encode(text[start:end])
            pieces.append(piece)
            ids, start = ids + piece, end
        return pieces

    def _find_stop_id(self) -> int:
        _, answer, following = self._pieces((Message("user", "a"), Message("assistant", "b")))
        for token in answer + following[:1]:
            if token in self._template.control_ids:
                return token
        raise UserInputError(
            "chat_format: the tokenizer's template writes no control token after an answer, so no answer could "
            "ever end; mend the template or choose chat_format: llama2"
        )


@dataclass(frozen=True, slots=True)
class InstructedChatFormat:
    """A chat format that puts an instruction before the first question, whichever that is.

    So where the oldest turns are left out, the instruction goes on to the first one that stays.
    """

    inner: ChatFormat
    instruction: str

    @property
    def stop_id(self) -> int:
        """See `ChatFormat.stop_id`."""
        return self.inner.stop_id

    def segments(self, messages: Sequence[Message]) -> list[Segment]:
        """See `ChatFormat.segments`."""
        return self.inner.segments(self._instructed(messages))

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """See `ChatFormat.prompt_ids`."""
        return self.inner.prompt_ids(self._instructed(messages))

    def decode_response(self, ids: Sequence[int]) -> str:
        """See `ChatFormat.decode_response`."""
        return self.inner.decode_response(ids)

    def first_control(self, ids: Sequence[int]) -> int | None:
        """See `ChatFormat.first_control`."""
        return self.inner.first_control(ids)

    def _instructed(self, messages: Sequence[Message]) -> list[Message]:
        place = next(place for place, message in enumerate(messages) if message.role == "user")
        first = Message("user", f"{self.instruction} {messages[place].content}")
        return [*messages[:place], first, *messages[place + 1 :]]


def _folded(messages: Sequence[Message]) -> tuple[list[str], list[str]]:
    """User texts, the first with the system message folded in, and answers."""
    users = [message.content for message in messages if message.role == "user"]
    answers = [message.content for message in messages if message.role == "assistant"]
    if messages[0].role == "system":
        users[0] = f"<<SYS>>\n{messages[0].content}\n<</SYS>>\n\n{users[0]}"
    return users, answers


def _prompt_ids(chat_format: ChatFormat, messages: Sequence[Message]) -> list[int]:
    if messages[-1].role != "user":
        raise ValueError("a dialogue to be continued must end with a user message")
    return [token for segment in chat_format.segments(messages) for token in segment.ids]


def _decode_response(ids: Sequence[int], stop_id: int, tokenizer: ChatTokenizer) -> str:
    kept = list(ids)
    if stop_id in kept:
        kept = kept[: kept.index(stop_id)]
    return tokenizer.decode(kept).strip()


def _first_control(ids: Sequence[int], stop_id: int, tokenizer: ChatTokenizer) -> int | None:
    for place, token in enumerate(ids):
        if token == stop_id:
            return None
        if token in tokenizer.control_ids:
            return place
    return None


def check_takes_system(chat_format: ChatFormat, what: str) -> None:
    """Raise UserInputError unless system messages reach the model: some tokenizers' templates leave them out.

    Args:
        what: What is to stand in the system message, with the setting that says so.
    """
    question = Message("user", "Hello.")
    try:
        instructed = chat_format.prompt_ids([Message("system", "Be brief."), question])
    except UserInputError as error:
        raise UserInputError(
            f"{what} stands in the system message; {error}; choose chat_format: llama2"
        ) from error
    if instructed == chat_format.prompt_ids([question]):
        raise UserInputError(
            f"{what} stands in the system message, which the tokenizer's template leaves out; choose "
            "chat_format: llama2 or another model"
        )
