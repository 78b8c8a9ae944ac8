"""The safety preprompt: what it says and where it stands."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from llama2_chat.dialogue import Message, Prompt
from llama2_chat.safety.config import ContextDistillationConfig


def draw_preprompt(prompt: Prompt, config: ContextDistillationConfig, rng: Random) -> str:
    """The preprompt with two adjectives at random and, where the risk category is known, its answer template.

    Source: §4.2.4.
    """
    adjectives = rng.sample(config.adjectives, min(2, len(config.adjectives)))
    text = config.preprompt.replace("{adjectives}", " and ".join(adjectives))
    template = config.category_templates.get(prompt.risk_category) if prompt.risk_category else None
    return f"{text} {template}" if template else text


def with_preprompt(messages: Sequence[Message], preprompt: str) -> tuple[Message, ...]:
    """The messages under a system message with the preprompt; one that is there already comes after it."""
    if messages[0].role == "system":
        return (Message("system", f"{preprompt}\n{messages[0].content}"), *messages[1:])
    return (Message("system", preprompt), *messages)
