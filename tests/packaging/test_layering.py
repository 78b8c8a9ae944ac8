"""Who may import whom: shared vocabulary at the bottom, stages above it, pipeline and command line on top."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = "llama2_chat"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]
TOP = ("pipeline", "report", "chat", "serving", "cli", "recipes")
"""Above the stages; the recipes folder may hold scripts that run commands."""

BETWEEN_STAGES = {
    ("reward", "ppo"): ("rewards", "scores are combined by PPO's rule, also when they are only reported"),
    ("reward", "testbed"): ("annotator", "held-out accuracy is shown beside what is attainable"),
    ("ppo", "reward"): (
        "pooling scoring",
        "the reward models score responses and lend their trunk to the value model",
    ),
    ("preferences", "testbed"): ("annotator", "the test world's annotator may choose between the answers"),
    ("rejection_sampling", "reward"): ("scoring", "samples are ranked by the reward models"),
    ("rejection_sampling", "sft"): ("config made_data", "the best samples are trained on as SFT trains"),
    ("ghost_attention", "sft"): ("config made_data", "made dialogues are trained on as SFT trains"),
    ("ghost_attention", "reward"): (
        "custom scoring",
        "a reward may say whether an answer follows its instruction",
    ),
    ("ghost_attention", "testbed"): (
        "oracle request",
        "the testbed knows whether an answer keeps what was stated",
    ),
    ("safety", "sft"): ("config made_data", "made dialogues are trained on as SFT trains"),
    ("safety", "reward"): ("custom scoring", "an answer is kept where the safety reward model prefers it"),
    ("evaluation", "reward"): (
        "custom scoring metrics calibration data held_out",
        "policies are judged by the reward models, and these on held-out pairs",
    ),
    ("evaluation", "ghost_attention"): (
        "instructions",
        "policies are measured by whether they keep the instructions that it trains",
    ),
    ("evaluation", "testbed"): ("oracle", "the testbed knows how good an answer truly is"),
    ("pretrain", "sft"): ("trainer", "one training loop for every next-token loss"),
}
"""(importing folder, imported folder): modules that may be imported, and why."""

MATHS = (
    "llama2_chat.masked_stats",
    "llama2_chat.reward.loss",
    "llama2_chat.ppo.rewards",
    "llama2_chat.ppo.advantages",
    "llama2_chat.ppo.losses",
    "llama2_chat.ppo.measures",
    "llama2_chat.ppo.running",
    "llama2_chat.rejection_sampling.best_of",
)
VAGUE_NAMES = ("utils", "util", "helpers", "misc", "common")


class Import(NamedTuple):
    module: str
    line: int
    lazy: bool
    """Inside a function, or only for type checkers."""


class Module(NamedTuple):
    name: str
    file: Path
    imports: list[Import]

    def place(self, found: Import) -> str:
        return f"{self.file.relative_to(REPOSITORY)}:{found.line} imports {found.module}"


def test_imports_are_read_right(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "import os, torch.nn as nn\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from a.b import c\n"
        "try:\n    import eager\nexcept ImportError:\n    pass\n"
        "class C:\n    import inner\n"
        "def f():\n    from lazy import x, y\n"
        "from . import sibling\n"
        "from .deep import z\n"
    )
    # `from a import b` may name a module or something in it, so both readings are listed.
    assert sorted(imports_of(file, "p.module")) == sorted(
        [
            Import("os", 1, False),
            Import("torch.nn", 1, False),
            Import("typing", 2, False),
            Import("typing.TYPE_CHECKING", 2, False),
            Import("a.b", 4, True),
            Import("a.b.c", 4, True),
            Import("eager", 6, False),
            Import("inner", 10, False),
            Import("lazy", 12, True),
            Import("lazy.x", 12, True),
            Import("lazy.y", 12, True),
            Import("p", 13, False),
            Import("p.sibling", 13, False),
            Import("p.deep", 14, False),
            Import("p.deep.z", 14, False),
        ]
    )


def imports_of(file: Path, name: str) -> list[Import]:
    return list(_walk(ast.parse(file.read_text(encoding="utf-8")), name, file.name == "__init__.py", False))


def _walk(node: ast.AST, name: str, is_package: bool, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, lazy) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            parts = name.split(".")
            up = child.level - is_package
            base = ".".join(parts[: len(parts) - up]) if child.level else ""
            module = ".".join(filter(None, (base, child.module)))
            yield Import(module, child.lineno, lazy)
            yield from (Import(f"{module}.{alias.name}", child.lineno, lazy) for alias in child.names)
        else:
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            checking = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from _walk(child, name, is_package, lazy or function or checking)


def read_modules() -> list[Module]:
    modules = []
    for package in PROJECT["tool"]["setuptools"]["packages"]:
        # Packages inside src/llama2_chat follow the package itself and have no mapping of their own.
        folder = REPOSITORY / FOLDERS.get(package, "src/" + package.replace(".", "/"))
        for file in sorted(folder.glob("*.py")):
            name = package if file.stem == "__init__" else f"{package}.{file.stem}"
            modules.append(Module(name, file, imports_of(file, name)))
    return modules


MODULES = read_modules()
STAGES = tuple(folder for folder in FOLDERS.values() if "/" not in folder and folder not in TOP)


def part_of(module: str) -> str:
    """The stage folder or top layer that a module's name lies in, or ""."""
    parts = module.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 and parts[1] in (*STAGES, *TOP) else ""


def layer(module: Module) -> str:
    return part_of(module.name) or "shared"


def test_every_file_was_seen() -> None:
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    tracked = subprocess.run(
        ["git", "ls-files", "--", "*.py"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.split()
    inside = {
        path for path in tracked if path.startswith(("src/", *(f"{folder}/" for folder in FOLDERS.values())))
    }
    seen = {str(module.file.relative_to(REPOSITORY)) for module in MODULES}
    scripts = {path for path in inside if not (REPOSITORY / path).with_name("__init__.py").exists()}
    assert not scripts, "a folder of Python files without __init__.py is not in the wheel"
    missing = {path for path in inside - seen if (REPOSITORY / path).exists()}
    assert not missing, "not in pyproject's list of packages"
    assert len(MODULES) >= 90
    counts = {name: sum(layer(module) == name for module in MODULES) for name in ("shared", *TOP, *STAGES)}
    assert all(count >= 2 for count in counts.values()), counts


def test_shared_vocabulary_imports_no_stage_and_no_top_layer() -> None:
    # The package's own __init__ offers RewardScorer; it does so lazily, which is tested below.
    wrong = [
        module.place(found)
        for module in MODULES
        if layer(module) == "shared" and module.name != PACKAGE
        for found in module.imports
        if part_of(found.module)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_package_itself_imports_stages_lazily() -> None:
    (package,) = [module for module in MODULES if module.name == PACKAGE]
    wrong = [package.place(found) for found in package.imports if part_of(found.module) and not found.lazy]
    assert not wrong, "\n".join(wrong)


def test_stages_import_each_other_only_where_the_method_says_so() -> None:
    used = set()
    wrong = []
    for module in MODULES:
        here = layer(module)
        if here not in STAGES:
            continue
        for found in module.imports:
            there = part_of(found.module)
            if not there or there == here:
                continue
            allowed = BETWEEN_STAGES.get((here, there), ("", ""))[0].split()
            if found.module.split(".")[2:3] and found.module.split(".")[2] in allowed:
                used.add((here, there, found.module.split(".")[2]))
            else:
                wrong.append(module.place(found))
    assert not wrong, "\n".join(wrong)
    table = {
        (here, there, name) for (here, there), (names, _) in BETWEEN_STAGES.items() for name in names.split()
    }
    assert used == table, "the table allows what nobody needs"


def test_the_pipeline_imports_stages_lazily_or_their_configuration() -> None:
    wrong, seen = [], 0
    for module in MODULES:
        if layer(module) not in ("pipeline", "report", "chat", "serving"):
            continue
        for found in module.imports:
            if part_of(found.module) in STAGES:
                seen += 1
                if not found.lazy and found.module.split(".")[2:3] != ["config"]:
                    wrong.append(module.place(found))
    assert not wrong, "\n".join(wrong)
    assert seen >= 3


def test_the_pipeline_does_not_import_the_command_line() -> None:
    wrong = [
        module.place(found)
        for module in MODULES
        if layer(module) in ("pipeline", "report", "chat", "serving", *STAGES)
        for found in module.imports
        if part_of(found.module) == "cli" or (part_of(found.module) == "pipeline" and layer(module) in STAGES)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", MATHS)
def test_maths_imports_torch_and_the_standard_library_alone(name: str) -> None:
    """The imports of every maths module against the allowed list."""
    (module,) = [module for module in MODULES if module.name == name]
    # A maths module may build on another: what that one imports is held to the same rule.
    outside = [found.module for found in module.imports if not found.module.startswith(MATHS)]
    roots = {name.split(".")[0] for name in outside}
    assert "torch" in roots
    assert not roots - {"torch"} - sys.stdlib_module_names, sorted(roots)


def test_the_command_line_starts_without_torch() -> None:
    wrong = [
        module.place(found)
        for module in MODULES
        if layer(module) == "cli"
        for found in module.imports
        if not found.lazy and found.module.split(".")[0] in ("torch", "transformers", "trl", "datasets")
    ]
    assert not wrong, "\n".join(wrong)
    # What a module imports may import torch in turn.
    names = sorted(module.name for module in MODULES if layer(module) in TOP)
    names += [
        f"{PACKAGE}.{name}" for name in ("dialogue", "jsonl", "settings", "stage", "progress", "errors")
    ]
    names += [
        module.name for module in MODULES if module.name.endswith(".config") or layer(module) == "testbed"
    ]
    names.append(PACKAGE)
    code = (
        f"import sys, {', '.join(names)}\nprint([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    # From a folder of its own, where no stage folder can be found by its short name.
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "[]\n"), result.stderr
    assert len(names) >= 40


def test_no_file_has_a_vague_name() -> None:
    wrong = [str(module.file) for module in MODULES if module.file.stem in VAGUE_NAMES]
    folders = [folder for folder in FOLDERS.values() if Path(folder).name in VAGUE_NAMES]
    assert not wrong + folders


def test_every_stage_folder_has_its_readme() -> None:
    assert len(STAGES) >= 7
    assert [folder for folder in STAGES if not (REPOSITORY / folder / "README.md").exists()] == []
