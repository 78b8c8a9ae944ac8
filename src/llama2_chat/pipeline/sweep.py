"""A recipe's `sweep`: one run for each combination of values, each in a folder that says which."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

from llama2_chat.pipeline.recipe import Recipe, load_recipe

_LONGEST_NAME = 120


def load_runs(recipe_name: str, overrides: Sequence[str]) -> list[tuple[str, Recipe]]:
    """Every run that a recipe stands for: folder inside the run directory (`.` without a sweep) and recipe.

    All combinations are validated here, before the first of them runs.
    """
    recipe = load_recipe(recipe_name, overrides)
    if not recipe.head.sweep:
        return [(".", recipe)]
    runs = []
    for values in itertools.product(*recipe.head.sweep.values()):
        chosen = dict(zip(recipe.head.sweep, values, strict=True))
        # JSON is YAML, so every type of value gets through an override unchanged.
        changes = [f"{key}={json.dumps(value)}" for key, value in chosen.items()]
        runs.append(
            (f"sweep/{folder_name(chosen)}", load_recipe(recipe_name, [*overrides, *changes, "sweep={}"]))
        )
    return runs


def folder_name(chosen: dict[str, Any]) -> str:
    """`seed=1,name=x`: readable, legal as a folder's name, different for different values."""
    text = ",".join(
        f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in chosen.items()
    )
    name = re.sub(r"[^A-Za-z0-9=,._+-]", "_", text)[:_LONGEST_NAME]
    if name == text:
        return name
    return f"{name}-{hashlib.sha256(json.dumps(chosen).encode()).hexdigest()[:8]}"
