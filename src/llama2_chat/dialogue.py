"""The project's vocabulary: messages, dialogues, preferences, prompts and scored samples.

Each type checks itself when it is made and converts to and from one row of a JSONL file (docs/data.md). A
problem is a `ValueError` that names the place inside the row; the readers of `llama2_chat.jsonl` add file
and line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from llama2_chat.errors import ChatTagError
from llama2_chat.fields import (
    check_choice,
    check_count,
    check_number,
    check_text,
    json_type,
    optional_choice,
    optional_flag,
    optional_text,
    required,
)

Role = Literal["system", "user", "assistant"]
Rating = Literal["significantly_better", "better", "slightly_better", "negligibly_better"]
RiskCategory = Literal["illicit", "hateful", "unqualified_advice"]
Domain = Literal["helpfulness", "safety"]

ROLES: tuple[Role, ...] = get_args(Role)
RATINGS: tuple[Rating, ...] = get_args(Rating)
RISK_CATEGORIES: tuple[RiskCategory, ...] = get_args(RiskCategory)
DOMAINS: tuple[Domain, ...] = get_args(Domain)

CHAT_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
"""Text that the Llama 2 chat format gives a meaning: in a user's text it could pose as another turn."""

Row = dict[str, Any]
"""One JSON object, as a line of a JSONL file holds it."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn's text. An empty content is legal; a chat tag in a system or user message is not.

    Assistant text is not searched for tags here, because sampled text may hold anything; `from_row` does
    search the assistant messages that it reads from a file (but not a sample's response).
    """

    role: Role
    content: str

    def __post_init__(self) -> None:
        check_choice(self.role, "role", ROLES)
        check_text(self.content, "content")
        if self.role != "assistant":
            refuse_chat_tags(self.content, f"{self.role} content")

    def to_row(self) -> Row:
        """The message as a JSON object."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A conversation to train on or to score: an optional system message, then user and assistant in turn."""

    messages: tuple[Message, ...]
    is_safety: bool = False
    id: str | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        check_role_order(self.messages, "messages")

    def to_row(self) -> Row:
        """One row of a dialogues file."""
        return _row(
            messages=messages_to_rows(self.messages), is_safety=self.is_safety, id=self.id, source=self.source
        )

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Dialogue:
        """Read one row of a dialogues file; raises ValueError on any departure from the format."""
        return cls(
            messages=messages_from_rows(required(row, "messages"), "messages"),
            is_safety=optional_flag(row, "is_safety") or False,
            id=optional_text(row, "id"),
            source=optional_text(row, "source"),
        )


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that waits for an answer: it ends with a user message."""

    messages: tuple[Message, ...]
    is_safety: bool = False
    risk_category: RiskCategory | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        _check_prompt(self.messages)
        if self.risk_category is not None:
            check_choice(self.risk_category, "risk_category", RISK_CATEGORIES)

    def to_row(self) -> Row:
        """One row of a prompts file."""
        return _row(
            prompt=messages_to_rows(self.messages),
            is_safety=self.is_safety,
            risk_category=self.risk_category,
            source=self.source,
        )

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Prompt:
        """Read one row of a prompts file; raises ValueError on any departure from the format."""
        return cls(
            messages=messages_from_rows(required(row, "prompt"), "prompt"),
            is_safety=optional_flag(row, "is_safety") or False,
            risk_category=optional_choice(row, "risk_category", RISK_CATEGORIES),
            source=optional_text(row, "source"),
        )


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one prompt and which of them was preferred, how clearly, and how safe each is."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    rating: Rating | None = None
    chosen_safe: bool | None = None
    rejected_safe: bool | None = None
    domain: Domain | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        _check_prompt(self.prompt)
        check_text(self.chosen, "chosen")
        check_text(self.rejected, "rejected")
        if self.rating is not None:
            check_choice(self.rating, "rating", RATINGS)
        if self.domain is not None:
            check_choice(self.domain, "domain", DOMAINS)

    def to_row(self) -> Row:
        """One row of a preferences file."""
        return _row(
            prompt=messages_to_rows(self.prompt),
            chosen=[{"role": "assistant", "content": self.chosen}],
            rejected=[{"role": "assistant", "content": self.rejected}],
            rating=self.rating,
            chosen_safe=self.chosen_safe,
            rejected_safe=self.rejected_safe,
            domain=self.domain,
            source=self.source,
        )

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Preference:
        """Read one row of a preferences file; raises ValueError on any departure from the format."""
        return cls(
            prompt=messages_from_rows(required(row, "prompt"), "prompt"),
            chosen=_answer_from_rows(row, "chosen"),
            rejected=_answer_from_rows(row, "rejected"),
            rating=optional_choice(row, "rating", RATINGS),
            chosen_safe=optional_flag(row, "chosen_safe"),
            rejected_safe=optional_flag(row, "rejected_safe"),
            domain=optional_choice(row, "domain", DOMAINS),
            source=optional_text(row, "source"),
        )


@dataclass(frozen=True, slots=True)
class Scores:
    """A response's rewards: helpfulness and safety raw (logits), combined as a probability in (0, 1)."""

    helpfulness: float
    safety: float | None
    combined: float

    def __post_init__(self) -> None:
        check_number(self.helpfulness, "scores.helpfulness")
        if self.safety is not None:
            check_number(self.safety, "scores.safety")
        # A float sigmoid of a far-off logit rounds to exactly 0 or 1.
        if not 0.0 <= check_number(self.combined, "scores.combined") <= 1.0:
            raise ValueError(f"scores.combined is {self.combined}; a probability lies between 0 and 1")

    def to_row(self) -> Row:
        """The `scores` object of a row."""
        return {"helpfulness": self.helpfulness, "safety": self.safety, "combined": self.combined}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Scores:
        """Read the `scores` object of a row; raises ValueError on any departure from the format."""
        if not isinstance(row, Mapping):
            raise ValueError(f"scores must be an object, found {json_type(row)}")
        return cls(
            helpfulness=required(row, "helpfulness", "scores."),
            safety=row.get("safety"),
            combined=required(row, "combined", "scores."),
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """A response that a policy sampled, with its scores. The response may hold anything, chat tags too."""

    prompt: tuple[Message, ...]
    response: str
    scores: Scores | None
    policy: str
    iteration: int
    temperature: float
    sample_index: int
    is_safety: bool = False

    def __post_init__(self) -> None:
        _check_prompt(self.prompt)
        check_text(self.response, "response")
        check_text(self.policy, "policy")
        check_count(self.iteration, "iteration")
        check_count(self.sample_index, "sample_index")
        if check_number(self.temperature, "temperature") < 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or above")

    def to_row(self) -> Row:
        """One row of a samples file."""
        return {
            "prompt": messages_to_rows(self.prompt),
            "response": self.response,
            "scores": None if self.scores is None else self.scores.to_row(),
            "policy": self.policy,
            "iteration": self.iteration,
            "temperature": self.temperature,
            "sample_index": self.sample_index,
            "is_safety": self.is_safety,
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Sample:
        """Read one row of a samples file; raises ValueError on any departure from the format."""
        scores = row.get("scores")
        return cls(
            prompt=messages_from_rows(required(row, "prompt"), "prompt"),
            response=required(row, "response"),
            scores=None if scores is None else Scores.from_row(scores),
            policy=required(row, "policy"),
            iteration=required(row, "iteration"),
            temperature=required(row, "temperature"),
            sample_index=required(row, "sample_index"),
            is_safety=optional_flag(row, "is_safety") or False,
        )


def refuse_chat_tags(text: str, place: str) -> None:
    """Raise ChatTagError if `text` holds one of `CHAT_TAGS`."""
    found = [tag for tag in CHAT_TAGS if tag in text]
    if found:
        raise ChatTagError(
            f"{place} holds the chat tag {found[0]}, which could pose as another turn; "
            "remove or rewrite it (tags are never escaped)"
        )


def check_role_order(messages: Sequence[Message], place: str = "messages") -> None:
    """Raise ValueError unless the roles are: system (optional), then user and assistant strictly in turn."""
    if not messages:
        raise ValueError(f"{place} is empty; at least one user message is needed")
    turns = messages[1:] if messages[0].role == "system" else messages
    offset = len(messages) - len(turns)
    if not turns:
        raise ValueError(f"{place} holds only a system message; a user message must follow")
    for index, message in enumerate(turns):
        expected = "user" if index % 2 == 0 else "assistant"
        if message.role != expected:
            raise ValueError(
                f'{place}[{index + offset}] has role "{message.role}", expected "{expected}": '
                "an optional system message, then user and assistant strictly in turn"
            )


def messages_to_rows(messages: Sequence[Message]) -> list[Row]:
    """Messages as JSON objects."""
    return [message.to_row() for message in messages]


def messages_from_rows(value: object, place: str) -> tuple[Message, ...]:
    """Messages from JSON objects of a file; assistant text with a chat tag is refused too."""
    if not isinstance(value, list):
        raise ValueError(f"{place} must be a list of messages, found {json_type(value)}")
    messages = []
    for index, row in enumerate(value):
        where = f"{place}[{index}]"
        if not isinstance(row, Mapping):
            raise ValueError(f'{where} must be an object with "role" and "content", found {json_type(row)}')
        role, content = required(row, "role", f"{where}."), required(row, "content", f"{where}.")
        try:
            message = Message(role, content)
            if role == "assistant":
                refuse_chat_tags(content, "assistant content")
        except ChatTagError as error:
            raise ChatTagError(f"{where}: {error}") from None
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        messages.append(message)
    return tuple(messages)


def _answer_from_rows(row: Mapping[str, Any], name: str) -> str:
    messages = messages_from_rows(required(row, name), name)
    if len(messages) != 1 or messages[0].role != "assistant":
        roles = [message.role for message in messages]
        raise ValueError(f"{name} must be a list of exactly one assistant message, found roles {roles}")
    return messages[0].content


def _check_prompt(messages: Sequence[Message]) -> None:
    check_role_order(messages, "prompt")
    if messages[-1].role != "user":
        raise ValueError(f'prompt must end with a user message, it ends with role "{messages[-1].role}"')


def _row(**fields: Any) -> Row:
    """A row without the optional fields that are not set."""
    return {name: value for name, value in fields.items() if value is not None}
