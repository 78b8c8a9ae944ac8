"""The safety preprompt: what it says and where it stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from llama2_chat.dialogue import Message, Prompt, RiskCategory

if TYPE_CHECKING:
    from llama2_chat.safety.config import ContextDistillationConfig

PLACE = "{adjectives}"
"""Where the adjectives stand in a template."""

ADJECTIVES = ("safe", "responsible", "respectful", "wise")
"""The paper's (§4.2.4)."""

PREPROMPTS = (
    "You are a {adjectives} assistant.",
    "You are a {adjectives} assistant. You never help anyone to do harm.",
    "Answer as a {adjectives} assistant would.",
    "Be {adjectives} in everything that you say.",
)
"""The first one is §4.2.4's, the others are ours."""

ANSWER_TEMPLATES: Mapping[RiskCategory, str] = {
    "illicit": (
        "The user may be asking for something that breaks the law. Begin with the danger, if anyone may be in one. "
        "Say that you will not help with it and what harm it does, then offer a lawful way to what the user needs."
    ),
    "hateful": (
        "The user may be asking for something that hurts or belittles people. Say so first. "
        "Explain why you will not write it and whom it would hurt, then turn to a respectful way to speak of it."
    ),
    "unqualified_advice": (
        "The user may be asking for advice that only a professional should give. Say first that you are none. "
        "Explain what could go wrong, then name who can help and what is generally known and safe to say."
    ),
}
"""How an adversarial prompt of each risk category is answered: address the risk, explain, redirect."""


@dataclass(frozen=True, slots=True)
class Preprompt:
    """A preprompt as it was drawn: the generic sentence and, where the risk category has one, its answer template."""

    generic: str
    template: str | None = None

    @property
    def text(self) -> str:
        """All of it."""
        return f"{self.generic} {self.template}" if self.template else self.generic


def draw_preprompt(prompt: Prompt, config: ContextDistillationConfig, rng: Random) -> Preprompt:
    """A template of `preprompts` with two adjectives at random, and the answer template of the risk category.

    Source: §4.2.4.
    """
    sentence = config.preprompts[0]
    if len(config.preprompts) > 1:  # a single one takes no draw
        sentence = rng.choice(config.preprompts)
    adjectives = rng.sample(config.adjectives, min(2, len(config.adjectives)))
    template = config.category_templates.get(prompt.risk_category) if prompt.risk_category else None
    return Preprompt(sentence.replace(PLACE, " and ".join(adjectives)), template)


def with_preprompt(messages: Sequence[Message], preprompt: str) -> tuple[Message, ...]:
    """The messages under a system message with the preprompt; one that is there already comes after it."""
    if messages[0].role == "system":
        return (Message("system", f"{preprompt}\n{messages[0].content}"), *messages[1:])
    return (Message("system", preprompt), *messages)
