"""Which fields of a stage's configuration name models and data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from llama2_chat.settings import Reference, RowKind, StrictModel

Config = TypeVar("Config", bound=StrictModel)
_REWARD_MODEL_FIELDS = ("helpfulness", "safety", "value", "independent", "check_reward")


@dataclass(frozen=True)
class Referring:
    """One field's references: its name, what they name, and the names."""

    field: str
    kind: Literal["policy", "reward_model", "data"]
    names: tuple[str, ...]
    rows: RowKind | None = None
    """What the data holds, where an earlier stage may have made it."""


def references(config: StrictModel) -> Iterator[Referring]:
    """All references in a configuration's own fields (None is no reference)."""
    values = {name: getattr(config, name) for name in type(config).model_fields}
    return references_in_mapping(type(config), values)


def references_in_mapping(model: type[StrictModel], values: Mapping[Any, Any]) -> Iterator[Referring]:
    """All references in a mapping meant for `model`, which may be wrong; what is no text is passed over."""
    for name, field in model.model_fields.items():
        reference = _reference_in(field.annotation, field.metadata)
        value = values.get(name)
        if reference is None or value is None:
            continue
        names = tuple(n for n in (value if isinstance(value, list) else [value]) if isinstance(n, str))
        if reference.kind == "data":
            yield Referring(name, "data", names, reference.rows)
        else:
            yield Referring(name, "reward_model" if name in _REWARD_MODEL_FIELDS else "policy", names)


def resolve(config: Config, path_of: Callable[[Referring, str], str]) -> Config:
    """The configuration with every reference replaced by `path_of(field, name)`."""
    update: dict[str, Any] = {}
    for referring in references(config):
        paths = [path_of(referring, name) for name in referring.names]
        if isinstance(getattr(config, referring.field), list):
            update[referring.field] = paths
        elif paths:  # a custom reward stands for itself
            update[referring.field] = paths[0]
    return config.model_copy(update=update)


def _reference_in(annotation: Any, metadata: list[Any]) -> Reference | None:
    """The marker on a field itself, or inside its list or optional type."""
    for item in metadata:
        if isinstance(item, Reference):
            return item
    for part in get_args(annotation):
        if isinstance(part, Reference):
            return part
        if (found := _reference_in(part, getattr(part, "__metadata__", []))) is not None:
            return found
    return None
