"""The project's vocabulary: messages, dialogues, preferences, prompts and scored samples.

Each type checks itself when it is made and converts to and from one row of a JSONL file (docs/data.md). A
problem is a `ValueError` that names the place inside the row; the readers of `llama2_chat.jsonl` add file
and line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from llama2_chat.errors import ChatTagError, did_you_mean

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

_Choice = TypeVar("_Choice", bound=str)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn's text. An empty content is legal; a chat tag in a system or user message is not.

    Assistant text is not searched for tags here, because sampled text may hold anything; `from_row`
    of every type does search what it reads from a file.
    """

    role: Role
    content: str

    def __post_init__(self) -> None:
        _check_choice(self.role, "role", ROLES)
        _check_text(self.content, "content")
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
            messages=messages_from_rows(_required(row, "messages"), "messages"),
            is_safety=_flag(row, "is_safety") or False,
            id=_text(row, "id"),
            source=_text(row, "source"),
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
            _check_choice(self.risk_category, "risk_category", RISK_CATEGORIES)

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
            messages=messages_from_rows(_required(row, "prompt"), "prompt"),
            is_safety=_flag(row, "is_safety") or False,
            risk_category=_choice(row, "risk_category", RISK_CATEGORIES),
            source=_text(row, "source"),
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
        _check_text(self.chosen, "chosen")
        _check_text(self.rejected, "rejected")
        if self.rating is not None:
            _check_choice(self.rating, "rating", RATINGS)
        if self.domain is not None:
            _check_choice(self.domain, "domain", DOMAINS)

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
            prompt=messages_from_rows(_required(row, "prompt"), "prompt"),
            chosen=_answer_from_rows(row, "chosen"),
            rejected=_answer_from_rows(row, "rejected"),
            rating=_choice(row, "rating", RATINGS),
            chosen_safe=_flag(row, "chosen_safe"),
            rejected_safe=_flag(row, "rejected_safe"),
            domain=_choice(row, "domain", DOMAINS),
            source=_text(row, "source"),
        )


@dataclass(frozen=True, slots=True)
class Scores:
    """A response's rewards: helpfulness and safety raw (logits), combined as a probability in (0, 1)."""

    helpfulness: float
    safety: float | None
    combined: float

    def __post_init__(self) -> None:
        _check_number(self.helpfulness, "scores.helpfulness")
        if self.safety is not None:
            _check_number(self.safety, "scores.safety")
        # A float sigmoid of a far-off logit rounds to exactly 0 or 1.
        if not 0.0 <= _check_number(self.combined, "scores.combined") <= 1.0:
            raise ValueError(f"scores.combined is {self.combined}; a probability lies between 0 and 1")

    def to_row(self) -> Row:
        """The `scores` object of a row."""
        return {"helpfulness": self.helpfulness, "safety": self.safety, "combined": self.combined}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Scores:
        """Read the `scores` object of a row; raises ValueError on any departure from the format."""
        if not isinstance(row, Mapping):
            raise ValueError(f"scores must be an object, found {_kind(row)}")
        return cls(
            helpfulness=_required(row, "helpfulness", "scores."),
            safety=row.get("safety"),
            combined=_required(row, "combined", "scores."),
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
        _check_text(self.response, "response")
        _check_text(self.policy, "policy")
        _check_count(self.iteration, "iteration")
        _check_count(self.sample_index, "sample_index")
        if _check_number(self.temperature, "temperature") < 0:
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
            prompt=messages_from_rows(_required(row, "prompt"), "prompt"),
            response=_required(row, "response"),
            scores=None if scores is None else Scores.from_row(scores),
            policy=_required(row, "policy"),
            iteration=_required(row, "iteration"),
            temperature=_required(row, "temperature"),
            sample_index=_required(row, "sample_index"),
            is_safety=_flag(row, "is_safety") or False,
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
        raise ValueError(f"{place} must be a list of messages, found {_kind(value)}")
    messages = []
    for index, row in enumerate(value):
        where = f"{place}[{index}]"
        if not isinstance(row, Mapping):
            raise ValueError(f'{where} must be an object with "role" and "content", found {_kind(row)}')
        role, content = _required(row, "role", f"{where}."), _required(row, "content", f"{where}.")
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
    messages = messages_from_rows(_required(row, name), name)
    if len(messages) != 1 or messages[0].role != "assistant":
        roles = [message.role for message in messages]
        raise ValueError(f"{name} must be a list of exactly one assistant message, found roles {roles}")
    return messages[0].content


def _check_prompt(messages: Sequence[Message]) -> None:
    check_role_order(messages, "prompt")
    if messages[-1].role != "user":
        raise ValueError(f'prompt must end with a user message, it ends with role "{messages[-1].role}"')


def _check_text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, found {_kind(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            # JSON can spell such a half ("\ud800"); no UTF-8 file and no tokenizer can hold it.
            raise ValueError(
                f"{name} holds half of a surrogate pair (U+{ord(value[error.start]):04X}) at character "
                f"{error.start}, which is no Unicode text; replace it"
            ) from None
    return value


def _check_number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, found {_kind(value)}")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; it must be finite")
    return float(value)


def _check_count(value: object, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        found = value if isinstance(value, int | float) and not isinstance(value, bool) else _kind(value)
        raise ValueError(f"{name} must be a whole number from 0, found {found}")


def _check_choice(value: object, name: str, allowed: tuple[_Choice, ...]) -> _Choice:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, found {_kind(value)}; one of {', '.join(allowed)}")
    if value not in allowed:
        hint = did_you_mean(value, allowed)
        raise ValueError(f'{name} "{value}" unknown; one of {", ".join(allowed)}{hint}')
    return value


def _required(row: Mapping[str, Any], name: str, prefix: str = "") -> Any:
    if name not in row:
        raise ValueError(f'"{prefix}{name}" is missing; found {", ".join(row) or "no fields"}')
    return row[name]


def _choice(row: Mapping[str, Any], name: str, allowed: tuple[_Choice, ...]) -> _Choice | None:
    value = row.get(name)
    return None if value is None else _check_choice(value, name, allowed)


def _flag(row: Mapping[str, Any], name: str) -> bool | None:
    value = row.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, found {_kind(value)}")
    return value


def _text(row: Mapping[str, Any], name: str) -> str | None:
    value = row.get(name)
    return None if value is None else _check_text(value, name)


def _row(**fields: Any) -> Row:
    """A row without the optional fields that are not set."""
    return {name: value for name, value in fields.items() if value is not None}


def _kind(value: object) -> str:
    """A JSON value's type in words."""
    names: list[tuple[type, str]] = [
        (bool, "true or false"),
        (str, "a string"),
        (int, "a number"),
        (float, "a number"),
        (list, "a list"),
        (Mapping, "an object"),
    ]
    if value is None:
        return "null"
    return next((name for kind, name in names if isinstance(value, kind)), type(value).__name__)
