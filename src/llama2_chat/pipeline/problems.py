"""Validation that reports every problem at once, each with its dotted key and what is allowed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from llama2_chat.errors import did_you_mean

Model = TypeVar("Model", bound=BaseModel)


def validated(
    model: type[Model], value: Any, key: str, problems: list[str], *, elsewhere: Iterable[str] = ()
) -> Model | None:
    """The model made of a mapping; None, with what is wrong added to `problems`, where that does not work.

    Types are strict: a number is no text and `true` is no number (but 1 is good for 1.0).

    Args:
        key: Dotted key of the mapping; empty for a whole file.
        elsewhere: Further keys that are allowed beside the model's own (others take care of them).
    """
    if not isinstance(value, Mapping):
        problems.append(f"{key}: a mapping is wanted, found {value!r}")
        return None
    try:
        return model.model_validate(dict(value), strict=True)
    except ValidationError as error:
        problems += _messages(error, model, value, key, list(elsewhere))
        return None


def _messages(
    error: ValidationError, model: type[BaseModel], value: Any, prefix: str, elsewhere: list[str]
) -> list[str]:
    """One line for each key that is wrong."""
    found: dict[str, list[str]] = {}
    for item in error.errors():
        place = _place(item["loc"], value, missing=item["type"] == "missing")
        key = ".".join([*([prefix] if prefix else []), *place])
        if item["type"] == "extra_forbidden":
            allowed = [*sorted(_allowed_keys(model, place[:-1])), *(elsewhere if len(place) == 1 else [])]
            message = f"unknown key{did_you_mean(place[-1], allowed)}; allowed: {', '.join(allowed)}"
        elif item["type"] == "missing":
            message = "required, but missing"
        else:
            given = item.get("input")
            shown = f" (found {given!r})" if isinstance(given, str | int | float | bool) else ""
            message = item["msg"].removeprefix("Value error, ") + shown
        found.setdefault(key, []).append(message)
    heads = {key: f"{key}: " if key else "" for key in found}  # what is wrong with a whole file has no key
    return [heads[key] + ", or: ".join(dict.fromkeys(messages)) for key, messages in found.items()]


def _place(location: tuple[int | str, ...], value: Any, *, missing: bool) -> list[str]:
    """The keys of a location as they stand in the file, without the union members pydantic puts between."""
    place = []
    for number, part in enumerate(location):
        items = dict(enumerate(value)) if isinstance(value, list) else value
        if isinstance(items, Mapping) and part in items:
            value = items[part]
        elif not (missing and number == len(location) - 1):
            continue
        place.append(str(part))
    return place


def _allowed_keys(model: type[BaseModel], place: list[str]) -> list[str]:
    """Keys that the (nested) model at `place` knows, or any of several that may stand there."""
    models = [model]
    for part in place:
        fields = [m.model_fields[part] for m in models if part in m.model_fields]
        # A part that is no field is a place in a list, or a key of a mapping, of these models.
        models = [nested for field in fields for nested in _models_in(field.annotation)] if fields else models
    return list(dict.fromkeys(field.alias or name for m in models for name, field in m.model_fields.items()))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _models_in(part)]
