"""Options that several commands share, with the checks that typer itself does not make."""

from __future__ import annotations

import re
from typing import Annotated

import typer

LARGEST_SEED = 2**32 - 1


def _known_device(device: str) -> str:
    """`device` if `RunSettings` takes it: a wrong one is the user's mistake."""
    from llama2_chat.errors import UserInputError
    from llama2_chat.settings import DEVICE_PATTERN

    if not re.fullmatch(DEVICE_PATTERN, device):
        raise UserInputError(
            f'--device "{device}" unknown; one of auto, cpu, cuda, or cuda:N for the N-th GPU'
        )
    return device


Device = Annotated[str, typer.Option(help="auto, cpu or cuda", callback=_known_device)]
"""Where models are."""
