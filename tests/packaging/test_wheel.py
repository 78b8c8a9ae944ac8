"""The wheel: every tracked file of the packages, nothing else, and it runs outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]
INSIDE = (".py", ".md", ".yaml", ".json", ".jsonl", ".safetensors", ".jinja", "py.typed")
"""What the packages' folders may hold; a file of another kind needs a decision."""

pytestmark = pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="not a git checkout")


def output_of(*command: str | Path, cwd: Path) -> str:
    # A PYTHONPATH would let the checkout stand in for what is tested.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    return result.stdout


def tracked_files() -> list[str]:
    listed = output_of("git", "ls-files", "-z", cwd=REPOSITORY).split("\0")
    return [path for path in listed if path and (REPOSITORY / path).exists()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the tracked files alone, so that neither build/ nor a stray file can take part."""
    copy = tmp_path_factory.mktemp("checkout")
    for path in tracked_files():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / path, copy / path)
    output_of(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "out", cwd=copy)
    (built,) = (copy / "out").iterdir()
    return built


def place_in_wheel(path: str) -> str | None:
    """Where a tracked file belongs in the wheel, by the longest matching folder; None if it does not."""
    for package, folder in sorted(FOLDERS.items(), key=lambda item: -len(item[1])):
        if path.startswith(f"{folder}/"):
            return f"{package.replace('.', '/')}/{path.removeprefix(f'{folder}/')}"
    return None


def test_the_wheel_holds_the_tracked_files_of_the_packages_and_nothing_else(wheel: Path) -> None:
    expected = {place for path in tracked_files() if (place := place_in_wheel(path))}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        metadata = {name for name in names if ".dist-info/" in name}
        assert names - metadata == expected
        by_name = {name.partition(".dist-info/")[2]: archive.read(name).decode() for name in metadata}
    assert set(by_name) == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "top_level.txt",
        "licenses/LICENSE",
    }
    header, _, body = by_name["METADATA"].partition("\n\n")
    assert f"Version: {PROJECT['project']['version']}" in header.splitlines()
    readme = REPOSITORY / PROJECT["project"]["readme"]
    if readme.exists():  # setuptools only warns where it is missing
        assert body.strip() == readme.read_text(encoding="utf-8").strip()
    assert by_name["top_level.txt"].split() == ["llama2_chat"]
    assert by_name["entry_points.txt"].split("\n")[:2] == [
        "[console_scripts]",
        "llama2-chat = llama2_chat.cli.main:main",
    ]
    assert not [name for name in names if "test_" in name or name.startswith("tests")]
    assert "llama2_chat/py.typed" in names
    strange = [name for name in expected if not name.endswith(INSIDE)]
    assert not strange
    assert len(expected) >= 100


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel; its dependencies are the ones installed here."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    output_of(sys.executable, "-m", "venv", "--without-pip", folder, cwd=wheel.parent)
    python = folder / "bin" / "python"
    output_of(
        *(sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"),
        *("install", "--quiet", "--no-index", "--no-deps", wheel),
        cwd=wheel.parent,
    )
    own = Path(
        output_of(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    )
    # A folder named in a .pth file is searched last, and the .pth files in it (the editable checkout) are not read.
    shared = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (own / "dependencies.pth").write_text("\n".join(shared) + "\n", encoding="utf-8")
    return folder


def test_the_command_runs_outside_the_checkout(environment: Path, tmp_path: Path) -> None:
    where = output_of(
        environment / "bin" / "python", "-c", "import llama2_chat; print(llama2_chat.__file__)", cwd=tmp_path
    )
    assert Path(where.strip()).is_relative_to(environment)
    command = environment / "bin" / "llama2-chat"
    text = output_of(command, "--help", cwd=tmp_path)
    for name in (
        "run",
        "sft",
        "reward",
        "rejection-sampling",
        "evaluate",
        "score",
        "serve",
        "data",
        "recipes",
    ):
        assert name in text
    listed = output_of(command, "recipes", "list", cwd=tmp_path)
    recipes = [folder.split("/")[1] for folder in FOLDERS.values() if folder.startswith("recipes/")]
    assert {"tiny", "stories260k"} <= set(recipes)
    assert [name for name in recipes if name not in listed] == []
    assert list(tmp_path.iterdir()) == []


def test_every_module_of_the_wheel_imports(environment: Path, tmp_path: Path) -> None:
    code = (
        "import importlib, pkgutil, llama2_chat\n"
        "names = [m.name for m in pkgutil.walk_packages(llama2_chat.__path__, 'llama2_chat.')]\n"
        "names = [name for name in names if not name.endswith('__main__')]\n"
        "for name in names: importlib.import_module(name)\n"
        "print(len(names))"
    )
    assert int(output_of(environment / "bin" / "python", "-c", code, cwd=tmp_path).split()[-1]) >= 90
