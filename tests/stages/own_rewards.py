"""A module of rewards, right and wrong ones, and the files of stages that use them."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

BREVITY = '''
def brevity(dialogues):
    """The shorter the better; anything under {most} characters is as good."""
    return [-max(len(dialogue[-1]["content"]), {most}) / 10 for dialogue in dialogues]


def carefulness(dialogues):
    return [1.0 if "a" in dialogue[-1]["content"] else -1.0 for dialogue in dialogues]


def broken(dialogues):
    return [1 / 0 for dialogue in dialogues]


def too_few(dialogues):
    return [0.0] * (len(dialogues) - 1)


def not_finite(dialogues):
    return [0.0, float("nan")] + [0.0] * (len(dialogues) - 2)


def nothing(dialogues):
    pass


def words(dialogues):
    return ["good" for _ in dialogues]


constant = 3.0
'''


def written(config, folder: Path, world: Path, **changes) -> Path:
    """The stage's configuration as a user writes it: a mapping in a YAML file."""
    head = {"base_model": {"path": str(world / "base")}, "seed": 1, "device": "cpu"}
    file = folder / "stage.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json") | head | changes))
    return file


def few_prompts(world: Path, folder: Path, count: int = 24) -> list[str]:
    file = folder / "few.jsonl"
    file.write_text("".join((world / "prompts.jsonl").read_text().splitlines(keepends=True)[:count]))
    return [str(file)]


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "done.json").read_text())["metrics"]
