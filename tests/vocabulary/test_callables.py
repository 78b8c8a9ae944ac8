"""A user's function: found without running anything, imported from its own folder, imported anew when it changes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama2_chat.callables import callable_problem, load_callable, module_file, source_digest
from llama2_chat.errors import UserInputError
from llama2_chat.files import sha256_of
from llama2_chat.settings import CallableSource


@pytest.fixture(autouse=True)
def _imports_undone() -> Iterator[None]:
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def source(name: str, folder: Path | None) -> CallableSource:
    return CallableSource(callable=name, folder=None if folder is None else str(folder))


def test_a_module_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "beside_one.py").write_text("def score(dialogues):\n    return [1.5]\n")
    found = source("beside_one:score", tmp_path)
    assert module_file(found) == tmp_path / "beside_one.py"
    assert callable_problem(found) is None
    assert source_digest(found) == sha256_of(tmp_path / "beside_one.py")
    assert "beside_one" not in sys.modules
    assert load_callable(found)([]) == [1.5]


def test_a_module_in_a_package_with_imports_of_its_own(tmp_path: Path) -> None:
    package = tmp_path / "rewards_package" / "inner"
    package.mkdir(parents=True)
    (tmp_path / "rewards_package" / "__init__.py").write_text("")
    (package / "lengths.py").write_text("from ..constants import SCALE\nimport sibling_constants\n\n"
                                        "def score(d):\n    return [SCALE * sibling_constants.TWO]\n")  # fmt: skip
    (tmp_path / "rewards_package" / "constants.py").write_text("SCALE = 3\n")
    (tmp_path / "sibling_constants.py").write_text("TWO = 2\n")
    found = source("rewards_package.inner.lengths:score", tmp_path)  # `inner` has no __init__.py
    assert module_file(found) == package / "lengths.py"
    assert "rewards_package" not in sys.modules
    assert load_callable(found)([]) == [6]


def test_a_module_on_the_python_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed, recipe = tmp_path / "installed", tmp_path / "recipe"
    for folder in (installed, recipe):
        folder.mkdir()
    (installed / "both_places.py").write_text("def score(d):\n    return ['path']\n")
    monkeypatch.syspath_prepend(str(installed))
    assert load_callable(source("both_places:score", recipe))([]) == ["path"]
    # The recipe's folder goes first.
    del sys.modules["both_places"]
    (recipe / "both_places.py").write_text("def score(d):\n    return ['recipe']\n")
    assert load_callable(source("both_places:score", recipe))([]) == ["recipe"]


def test_a_changed_module_is_imported_anew(tmp_path: Path) -> None:
    file = tmp_path / "changing.py"
    found = source("changing:score", tmp_path)
    digests = []
    for number in (7, 88, 999):  # of other lengths: Python's cache looks at size and second
        file.write_text(f"def score(d):\n    return [{number}]\n")
        assert load_callable(found)([]) == [number]
        digests.append(source_digest(found))
    assert len(set(digests)) == 3


def test_a_module_of_the_same_name_elsewhere(tmp_path: Path) -> None:
    for number in (1, 22):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "twin.py").write_text(f"def score(d):\n    return [{number}]\n")
        assert load_callable(source("twin:score", folder))([]) == [number]


def test_a_name_that_is_taken_is_told(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("def score(d):\n    return []\n")
    with pytest.raises(UserInputError, match='another module "torch" is loaded already'):
        load_callable(source("torch:score", tmp_path))


@pytest.mark.parametrize(
    ("text", "function", "told"),
    [
        ("def score(d): ...", "scor", 'defines no "scor" (did you mean "score"?)'),
        ("if True:\n    score = len", "score", None),
        ("from os.path import join as score", "score", None),
        ("import os.path", "os", None),
        ("from os import *", "anything", None),
        ("def __getattr__(name): return len", "anything", None),
        ("class Scorer:\n    def score(self): ...", "Scorer", None),
        ("def score(:", "score", "is no valid Python"),
        ("\0", "score", "is no valid Python"),
    ],
)
def test_what_can_be_told_of_a_file_without_running_it(
    tmp_path: Path, text: str, function: str, told: str | None
) -> None:
    (tmp_path / "looked_at.py").write_text(text)
    problem = callable_problem(source(f"looked_at:{function}", tmp_path))
    assert problem is None if told is None else told in (problem or "")


@pytest.mark.parametrize("module", ["no_such_module", "no.such.module", "json.no_such", "json.decoder.x"])
def test_a_module_that_is_nowhere(tmp_path: Path, module: str) -> None:
    assert f'no module "{module}" in {tmp_path} or on the Python path' in (
        callable_problem(source(f"{module}:f", tmp_path)) or ""
    )
    with pytest.raises(UserInputError, match="no module"):
        load_callable(source(f"{module}:f", tmp_path))


def test_an_import_that_fails_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "failing_import.py").write_text("import no_such_package\ndef score(d): ...\n")
    with pytest.raises(
        UserInputError, match=r"importing .*failing_import.py failed: ModuleNotFoundError: No module"
    ):
        load_callable(source("failing_import:score", tmp_path))


@pytest.mark.parametrize(
    "name", ["module", "module:", ":f", "a b:f", "a:b:c", "a..b:f", "a:f.g", "/a/b.py:f"]
)
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(ValueError, match="module:function is wanted"):
        CallableSource(callable=name)
