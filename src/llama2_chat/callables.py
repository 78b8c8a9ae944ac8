"""Finding a user's own scoring function without running any of it, and importing it when a stage needs it.

No torch here: recipes are checked and fingerprinted with the first part alone.
"""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama2_chat.errors import UserInputError, did_you_mean
from llama2_chat.files import sha256_of
from llama2_chat.settings import CallableSource

_imported: dict[str, tuple[Path, str]] = {}
"""Modules that were imported from here, by name: file and digest."""


def module_file(source: CallableSource) -> Path | None:
    """The file of the function's module, first in `source.folder` and then on the Python path; nothing is imported."""
    importlib.invalidate_caches()
    path: list[str] | None = [*([source.folder] if source.folder else []), *sys.path]
    spec = None
    for part in source.module.split("."):
        # By its last name and its parent's folders: the whole name would have the parents imported.
        spec = None if path is None else importlib.machinery.PathFinder.find_spec(part, path)
        if spec is None:
            return None
        locations = spec.submodule_search_locations
        path = None if locations is None else list(locations)
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def callable_problem(source: CallableSource) -> str | None:
    """What is wrong with a function that a recipe names, as far as its file tells without running; else None."""
    file = module_file(source)
    if file is None:
        folder = f"in {source.folder} or " if source.folder else ""
        return f'no module "{source.module}" {folder}on the Python path; wanted is module:function'
    if file.suffix != ".py":
        return None
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError) as error:
        return f"{file} is no valid Python: {error}"
    names = set(_bound_names(tree))
    if source.function in names or "*" in names or "__getattr__" in names:
        return None
    hint = did_you_mean(source.function, names)
    return f'{file} defines no "{source.function}"{hint}'


def _bound_names(tree: ast.AST) -> list[str]:
    """Every name that is bound anywhere in a module, also inside its functions: what is not here is not there."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append(node.id)
        elif isinstance(node, ast.alias):
            names.append(node.asname or node.name.partition(".")[0])
    return names


def source_digest(source: CallableSource) -> str:
    """SHA-256 of the module's file: a function that was changed is another reward.

    What the module imports is not looked at.
    """
    file = module_file(source)
    return "not found" if file is None else sha256_of(file)


def load_callable(source: CallableSource) -> Callable[..., Any]:
    """Import the function; a module that has changed since it was imported from here is imported anew.

    Raises:
        UserInputError: it is not there, cannot be imported, is no function, or another module has its name.
    """
    if (problem := callable_problem(source)) is not None:
        raise UserInputError(f"{source.callable}: {problem}")
    file = module_file(source)
    assert file is not None
    file = file.resolve()
    if source.folder is not None:
        # As Python itself does for a script's folder; it stays, for what the function imports when it is called.
        sys.path[:] = [source.folder, *(place for place in sys.path if place != source.folder)]
    known = file, sha256_of(file)
    if _imported.get(source.module, known) != known:
        sys.modules.pop(source.module, None)
    try:
        module = importlib.import_module(source.module)
    except Exception as error:
        raise UserInputError(
            f"{source.callable}: importing {file} failed: {type(error).__name__}: {error}"
        ) from error
    loaded = getattr(module, "__file__", None)
    if loaded is None or Path(loaded).resolve() != file:
        raise UserInputError(
            f'{source.callable}: another module "{source.module}" is loaded already, from {loaded}; rename {file}'
        )
    _imported[source.module] = known
    function = getattr(module, source.function, None)
    if not callable(function):
        there = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        hint = did_you_mean(source.function, there)
        raise UserInputError(f'{source.callable}: {file} has no function "{source.function}"{hint}')
    return function  # type: ignore[no-any-return]
