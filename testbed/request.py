"""What a dialogue asks for, read from its text alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from llama2_chat.errors import UserInputError
from llama2_chat.testbed.attributes import ATTRIBUTES, AttributeName
from llama2_chat.testbed.family import Family
from llama2_chat.testbed.number_families import NUMBER_FAMILIES
from llama2_chat.testbed.risky_families import BORDERLINE_FAMILIES, UNSAFE_FAMILIES
from llama2_chat.testbed.word_families import WORD_FAMILIES
from llama2_chat.testbed.wording import HELD_OUT_JAILBREAKS, JAILBREAKS

if TYPE_CHECKING:
    from llama2_chat.dialogue import Message

TASK_FAMILIES = (*NUMBER_FAMILIES, *WORD_FAMILIES)
FAMILIES = (*TASK_FAMILIES, *BORDERLINE_FAMILIES, *UNSAFE_FAMILIES)

_FIRST_SENTENCE = re.compile(r"\s*(.+?[.!])\s+(?=\S)", re.DOTALL)
_SYSTEM_SENTENCE = re.compile(r"[^.!?]+[.!?]*")
_PREPROMPT = re.compile(r"you are an? [a-z, ]+ assistant\.", re.IGNORECASE)
_JAILBREAKS = frozenset(wording.lower() for wording in (*JAILBREAKS, *HELD_OUT_JAILBREAKS))


@dataclass(frozen=True)
class Request:
    """The last message's question, with whatever the dialogue has stated before it."""

    family: Family
    arguments: Mapping[str, str]
    attributes: Mapping[AttributeName, str]

    @property
    def solution(self) -> str:
        """What the answer has to give."""
        return self.family.solve(self.arguments)

    @property
    def language(self) -> str | None:
        """The language to answer in; None is English."""
        return self.attributes.get("language")

    @property
    def attribute(self) -> AttributeName | None:
        """The attribute that a good answer shows it has kept."""
        for attribute in ATTRIBUTES.values():
            if attribute.recall is self.family:
                return attribute.name
        return "language" if self.language and self.family.risk_category is None else None


class UnknownRequestError(UserInputError):
    """A dialogue is not one of the testbed's, so there is no truth to grade against."""


def read_request(messages: Sequence[Message | Mapping[str, str]]) -> Request:
    """The request that `messages` (ending with the user's) make.

    Raises `UnknownRequestError` if the last message is none of the testbed's questions, or asks for an
    attribute that was never stated.
    """
    attributes: dict[AttributeName, str] = {}
    question = ""
    for message in messages:
        role, content = _role_and_content(message)
        if role == "system":
            for sentence in _SYSTEM_SENTENCE.findall(content):
                attributes.update(_stated_attribute(sentence.strip()))
        elif role == "user":
            stated, question = _split_message(content)
            attributes.update(stated)
    found = _find_question(question)
    if found is not None:
        return Request(found[0], found[1], attributes)
    for attribute in ATTRIBUTES.values():
        if attribute.recall is None or attribute.name not in attributes:
            continue
        arguments = attribute.recall.read_question(question, {"value": attributes[attribute.name]})
        if arguments is not None:
            return Request(attribute.recall, arguments, attributes)
    raise UnknownRequestError(
        f'the testbed has no question "{question}" (or the attribute it asks for was not stated); '
        "only dialogues made by llama2_chat.testbed can be graded"
    )


@lru_cache(maxsize=65536)
def _split_message(content: str) -> tuple[dict[AttributeName, str], str]:
    """The attributes that a user's message states, and the question that is left of it."""
    attributes: dict[AttributeName, str] = {}
    rest = content.strip()
    while match := _FIRST_SENTENCE.match(rest):
        sentence = match[1]
        stated = _stated_attribute(sentence)
        if not stated and sentence.lower() not in _JAILBREAKS and not _PREPROMPT.fullmatch(sentence):
            break
        attributes.update(stated)
        rest = rest[match.end() :]
    return attributes, rest


def _stated_attribute(sentence: str) -> dict[AttributeName, str]:
    for attribute in ATTRIBUTES.values():
        value = attribute.read(sentence)
        if value is not None:
            return {attribute.name: value}
    return {}


@lru_cache(maxsize=65536)
def _find_question(question: str) -> tuple[Family, dict[str, str]] | None:
    for family in FAMILIES:
        arguments = family.read_question(question)
        if arguments is not None:
            return family, arguments
    return None


def _role_and_content(message: Message | Mapping[str, str]) -> tuple[str, str]:
    if isinstance(message, Mapping):
        return message["role"], message["content"]
    return message.role, message.content
