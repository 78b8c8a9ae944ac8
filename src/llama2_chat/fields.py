"""Checks of single values of a JSON row.

Each raises a ValueError that names the field, what it may be and what it is; a field that is null counts as
not set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from llama2_chat.errors import did_you_mean

Choice = TypeVar("Choice", bound=str)


def check_text(value: object, name: str) -> str:
    """`value` if it is text that UTF-8 can hold."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, found {json_type(value)}")
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


def check_number(value: object, name: str) -> float:
    """`value` as a float if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, found {json_type(value)}")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; it must be finite")
    return float(value)


def check_count(value: object, name: str) -> None:
    """Raise unless `value` is a whole number from 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        found = value if isinstance(value, int | float) and not isinstance(value, bool) else json_type(value)
        raise ValueError(f"{name} must be a whole number from 0, found {found}")


def check_choice(value: object, name: str, allowed: tuple[Choice, ...]) -> Choice:
    """`value` if it is one of `allowed`."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, found {json_type(value)}; one of {', '.join(allowed)}")
    if value not in allowed:
        hint = did_you_mean(value, allowed)
        raise ValueError(f'{name} "{value}" unknown; one of {", ".join(allowed)}{hint}')
    return value


def required(row: Mapping[str, Any], name: str, prefix: str = "") -> Any:
    """The value of a field that must be there; `prefix` is the place of `row` in the message."""
    if name not in row:
        raise ValueError(f'"{prefix}{name}" is missing; found {", ".join(row) or "no fields"}')
    return row[name]


def optional_choice(row: Mapping[str, Any], name: str, allowed: tuple[Choice, ...]) -> Choice | None:
    """The value of a field if it is set; one of `allowed`."""
    value = row.get(name)
    return None if value is None else check_choice(value, name, allowed)


def optional_flag(row: Mapping[str, Any], name: str) -> bool | None:
    """The value of a field if it is set; true or false."""
    value = row.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, found {json_type(value)}")
    return value


def optional_text(row: Mapping[str, Any], name: str) -> str | None:
    """The value of a field if it is set; a string."""
    value = row.get(name)
    return None if value is None else check_text(value, name)


def json_type(value: object) -> str:
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
