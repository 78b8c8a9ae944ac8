"""Reading YAML that users write, with `KEY=VALUE` overrides and `${NAME:-default}` in texts."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from llama2_chat.errors import MissingFileError, RecipeError, UserInputError

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `1e-5` is a number (YAML 1.1 wants `1.0e-5`) and no key may stand twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is a plain text, not a list, mapping or nothing", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f'the key "{key}" stands twice', key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would take for a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


def read_mapping(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file, environment variables expanded.

    Raises:
        MissingFileError: there is no such file.
        UserInputError: it is not YAML, not UTF-8 or not a mapping.
    """
    if not file.is_file():
        raise MissingFileError(f"{file}: no such file")
    try:
        value = parse(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserInputError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UserInputError(f"{file}{line}: not valid YAML: {problem}") from error
    if not isinstance(value, dict):
        raise UserInputError(f"{file}: a mapping (KEY: VALUE lines) is wanted, found {type(value).__name__}")
    expanded: dict[str, Any] = expand(value, str(file))
    return expanded


def parse(text: str) -> Any:
    """YAML as this toolkit reads it."""
    return yaml.load(text, Loader=_Loader)


def expand(value: Any, source: str) -> Any:
    """Replace `${NAME}` and `${NAME:-default}` in all texts by environment variables.

    A relative path in a variable means the folder of whoever set it, not the recipe's: a text that begins
    with a variable and, seen from the current folder, is the path of something becomes absolute.
    """
    if isinstance(value, dict):
        return {key: expand(item, source) for key, item in value.items()}
    if isinstance(value, list):
        return [expand(item, source) for item in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        found = os.environ.get(name, default)
        if found is None:
            raise UserInputError(
                f"{source}: environment variable {name} is not set; set it or write ${{{name}:-default}}"
            )
        return found

    expanded = _VARIABLE.sub(replace, value)
    if _VARIABLE.match(value) and "/" in expanded and Path(expanded).exists():
        return str(Path(expanded).absolute())
    return expanded


def apply_overrides(mapping: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `mapping` with each dotted `KEY=VALUE` set; values are YAML.

    Raises:
        RecipeError: an override is not of that form, or its key leads through something that is no mapping.
    """
    result: dict[str, Any] = _copied(mapping)
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            problems.append(f'"{override}": an override has the form KEY=VALUE, for example seed=1')
            continue
        place = result
        *parents, last = key.split(".")
        for parent in parents:
            following = place.setdefault(parent, {})
            if isinstance(following, str) and (parents == ["base_model"] or parents[:-1] == ["data"]):
                following = place[parent] = {"path": following}  # the short form of these entries
            if not isinstance(following, dict):
                problems.append(f'{key}: "{parent}" holds {following!r}, not a mapping')
                break
            place = following
        else:
            try:
                place[last] = expand(parse(text), "overrides")
            except yaml.YAMLError:
                problems.append(f"{key}: {text!r} is not valid YAML")
    if problems:
        raise RecipeError("overrides", problems)
    return result


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return list(value) if isinstance(value, list) else value


def dump(value: Any) -> str:
    """YAML text in the order given."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text
