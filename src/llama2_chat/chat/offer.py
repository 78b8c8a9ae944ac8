"""What a folder offers to talk to: the policies of a run with its reward models, or one model.

Nothing is loaded here, so that a wrong name is said at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llama2_chat.errors import MissingFileError, UserInputError, did_you_mean
from llama2_chat.pipeline.run_directory import RunDirectory
from llama2_chat.pipeline.yaml_files import read_mapping
from llama2_chat.settings import BaseModelSource, RunSettings
from llama2_chat.stage import STAGE_KINDS

DEFAULT_THRESHOLD = 0.15


@dataclass(frozen=True)
class Offer:
    """Policies by name in the order they were made, and what scores their answers."""

    policies: Mapping[str, BaseModelSource]
    settings: RunSettings
    helpfulness: Path | None
    safety: Path | None
    safety_threshold: float = DEFAULT_THRESHOLD

    @property
    def last(self) -> str:
        """The policy that was made last."""
        return list(self.policies)[-1]

    def check(self, name: str) -> str:
        """`name` if there is such a policy; UserInputError with the known ones otherwise."""
        if name not in self.policies:
            raise UserInputError(
                f"no policy {name}{did_you_mean(name, self.policies)}; there are {', '.join(self.policies)}"
            )
        return name


def find_offer(
    place: Path, *, helpfulness: Path | None = None, safety: Path | None = None, device: str = "auto"
) -> Offer:
    """What a run directory or a model folder offers; reward models given here come before the run's own.

    Raises:
        UserInputError: it is neither, or holds no policy yet.
    """
    if safety is not None and helpfulness is None and not (place / "recipe.yaml").is_file():
        raise UserInputError("--safety goes with --helpfulness: R_c is made from both")
    if not place.is_dir():
        raise MissingFileError(f"{place}: no such folder; a run directory or a model folder is wanted")
    if (place / "recipe.yaml").is_file():
        offer = _of_run(place, device)
        return Offer(
            offer.policies,
            offer.settings,
            helpfulness or offer.helpfulness,
            safety or offer.safety,
            offer.safety_threshold,
        )
    return _of_model(place, helpfulness, safety, device)


def _of_model(folder: Path, helpfulness: Path | None, safety: Path | None, device: str) -> Offer:
    config = folder / "config.json"
    if not config.is_file():
        raise UserInputError(
            f"{folder}: neither a run directory (recipe.yaml) nor a model folder (config.json)"
        )
    values = json.loads(config.read_text(encoding="utf-8"))
    architectures = values.get("architectures") or []
    if any("SequenceClassification" in str(name) for name in architectures):
        raise UserInputError(f"{folder}: a reward model scores answers and gives none; name a policy")
    settings = RunSettings(
        base_model=BaseModelSource(path=str(folder)),
        chat_format="tokenizer" if values.get("chat_format") == "tokenizer" else "llama2",
        device=device,
    )
    name = folder.resolve().name
    return Offer({name: settings.base_model}, settings, helpfulness, safety)


def _of_run(path: Path, device: str) -> Offer:
    recipe = read_mapping(path / "recipe.yaml")
    stages = recipe.get("stages")
    if not isinstance(stages, dict):
        raise UserInputError(f"{path / 'recipe.yaml'}: no stages in it; a run's own recipe.yaml is wanted")
    settings = _settings(path, recipe, device)
    run = RunDirectory(path, list(stages))
    made = {name: run.stage(name).model for name in stages if run.stage(name).model.is_dir()}
    kinds = {name: STAGE_KINDS.get(str(stages[name].get("kind"))) for name in made}
    policies = {
        name: BaseModelSource(path=str(model))
        for name, model in made.items()
        if (kind := kinds[name]) is not None and kind.produces == "policy"
    }
    base = settings.base_model
    if base.path not in stages and Path(base.path).is_dir():
        policies = {"base": base, **policies}
    if not policies:
        raise UserInputError(f"{path}: no policy is there yet; run the recipe first")
    return Offer(policies, settings, *_reward_models(recipe, stages, made))


def _settings(path: Path, recipe: Mapping[str, Any], device: str) -> RunSettings:
    """Chat format, precision, seed of the run; the device is this machine's."""
    names = [name for name in RunSettings.model_fields if name in recipe and name != "device"]
    base = recipe.get("base_model")
    try:
        return RunSettings(
            **{name: recipe[name] for name in names if name != "base_model"},
            base_model=BaseModelSource(path=base)
            if isinstance(base, str)
            else BaseModelSource(**(base or {})),
            device=device,
        )
    except (ValidationError, TypeError) as error:
        raise UserInputError(f"{path / 'recipe.yaml'}: not a run's recipe: {error}") from error


def _reward_models(
    recipe: Mapping[str, Any], stages: Mapping[str, Any], made: Mapping[str, Path]
) -> tuple[Path | None, Path | None, float]:
    """Those that the evaluation judges with; without it, the last of each domain."""
    evaluation = recipe.get("evaluation")
    evaluation = evaluation if isinstance(evaluation, dict) else {}
    found: dict[str, Path | None] = {}
    for domain in ("helpfulness", "safety"):
        own = [n for n in made if stages[n].get("kind") == "reward" and stages[n].get("domain") == domain]
        name = evaluation.get(domain) or (own[-1] if own and not evaluation else None)
        found[domain] = made.get(name) if isinstance(name, str) else None  # a custom reward is none
    # R_c without helpfulness is not defined.
    safety = found["safety"] if found["helpfulness"] is not None else None
    threshold = evaluation.get("safety_threshold", DEFAULT_THRESHOLD)
    return found["helpfulness"], safety, float(threshold)
