"""A file's held-out part, chosen by the first user message alone.

Rows that begin alike (two judgments of one prompt, the turns of one tree) would tell a model what it is then
judged on; whatever begins with the same message is therefore in the same part, in every kind, in every file and
on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from llama2_chat.dialogue import Message
from llama2_chat.errors import UserInputError

DEFAULT_HELD_OUT_SHARE = 0.25


def is_held_out(messages: Sequence[Message], held_out_share: float) -> bool:
    """Whether a dialogue or prompt is in the held-out part: SHA-256 of its first user message, as a fraction.

    The text counts without white space around it. What is held out at one share is held out at every larger one.
    """
    first = next(message.content for message in messages if message.role == "user")
    digest = hashlib.sha256(first.strip().encode()).digest()
    return int.from_bytes(digest[:8], "big") < held_out_share * 2.0**64


def check_share(held_out_share: float) -> None:
    """Raise UserInputError unless both parts can hold rows."""
    if not 0.0 < held_out_share < 1.0:
        raise UserInputError(
            f"the held-out share is {held_out_share}; it lies between 0 and 1, both excluded"
        )
