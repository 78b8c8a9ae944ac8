"""Validation that reports every problem at once, each with its dotted key and what is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from llama2_chat.errors import did_you_mean


def validation_problems(error: ValidationError, model: type[BaseModel], prefix: str = "") -> list[str]:
    """One line per problem of a pydantic error: dotted key, what is wrong, what is allowed."""
    problems = []
    for item in error.errors():
        place = [str(part) for part in item["loc"]]
        key = ".".join([*([prefix] if prefix else []), *place])
        if item["type"] == "extra_forbidden":
            allowed = allowed_keys(model, place[:-1])
            hint = did_you_mean(place[-1], allowed)
            problems.append(f"{key}: unknown key{hint}; allowed: {', '.join(sorted(allowed))}")
        elif item["type"] == "missing":
            problems.append(f"{key}: required, but missing")
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = item.get("input")
            shown = f" (found {given!r})" if isinstance(given, str | int | float | bool) else ""
            problems.append(f"{key}: {message}{shown}")
    return problems


def allowed_keys(model: type[BaseModel], place: list[str]) -> list[str]:
    """Keys that the (nested) model at `place` knows."""
    for part in place:
        field = model.model_fields.get(part)
        nested = _model_in(field.annotation) if field is not None else None
        if nested is None:
            return []
        model = nested
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in get_args(annotation):
        if (found := _model_in(part)) is not None:
            return found
    return None


def unknown_key(key: str, known: Mapping[str, Any] | list[str]) -> str:
    """The message for a key that is not among the known ones."""
    return f"{key}: unknown key{did_you_mean(key.rsplit('.', 1)[-1], known)}; allowed: {', '.join(known)}"
