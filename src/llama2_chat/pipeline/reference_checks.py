"""Whether what a recipe's stages name is there, comes before, and is of the right sort.

Works on the mapping as it is written, so that one mistake in a stage hides no other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from llama2_chat.adapter_base import whole_model
from llama2_chat.errors import UserInputError, did_you_mean
from llama2_chat.evaluation.config import EvaluationConfig
from llama2_chat.pipeline.iterations_config import IterationsConfig
from llama2_chat.pipeline.references import Referring, references_in_mapping
from llama2_chat.settings import BaseModelSource
from llama2_chat.stage import STAGE_KINDS

_MODEL_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


ModelKind = Literal["policy", "reward_model"]


def reference_problems(recipe: Mapping[str, Any], folder: Path) -> list[str]:
    """References of every stage of a known kind (though other keys of it may be wrong) and the evaluation."""
    problems = []
    stages, stage_names, kinds = _stages(recipe)
    data = recipe.get("data")
    data_names = [str(name) for name in data] if isinstance(data, Mapping) else []
    models = _named_models(recipe, folder)
    for name, stage in stages.items():
        if (kind := kind_of(stage)) is not None:
            found = references_in_mapping(STAGE_KINDS[kind].load_config_class(), stage)
            earlier = stage_names[: stage_names.index(str(name))]
            problems += _problems(found, f"stages.{name}", data_names, stage_names, kinds, earlier, models)
    evaluation = recipe.get("evaluation")
    if isinstance(evaluation, Mapping):
        found = references_in_mapping(EvaluationConfig, evaluation)
        problems += _problems(found, "evaluation", data_names, stage_names, kinds, stage_names, models)
    return problems


def start_problems(recipe: Mapping[str, Any], folder: Path) -> list[str]:
    """What `iterations` start from: a policy and reward models of `stages`."""
    written = recipe.get("iterations")
    if not isinstance(written, Mapping):
        return []
    _, stage_names, kinds = _stages(recipe)
    found = references_in_mapping(IterationsConfig, written)
    models = _named_models(recipe, folder)
    return _problems(found, "iterations", [], stage_names, kinds, stage_names, models)


def _stages(recipe: Mapping[str, Any]) -> tuple[Mapping[Any, Any], list[str], dict[str, str]]:
    """The stages as they are written, their names, and the known kinds by name."""
    written = recipe.get("stages")
    stages = written if isinstance(written, Mapping) else {}
    kinds = {str(name): kind for name, stage in stages.items() if (kind := kind_of(stage)) is not None}
    return stages, [str(name) for name in stages], kinds


def _named_models(recipe: Mapping[str, Any], folder: Path) -> dict[str, ModelKind | None]:
    """What `models` calls the models beside the base, and of which kind each is; None where that is not seen here."""
    named = recipe.get("models")
    if not isinstance(named, Mapping):
        return {}
    return {str(name): _kind_of_model(_base(source), folder) for name, source in named.items()}


def _kind_of_model(source: Mapping[str, Any], folder: Path) -> ModelKind | None:
    if source.get("gguf_file") is not None:
        return "policy"
    try:
        config = json.loads((folder / str(source.get("path")) / "config.json").read_text(encoding="utf-8"))
        architectures = [str(name) for name in config.get("architectures") or []]
    except (OSError, ValueError, AttributeError, TypeError):
        return None  # a hub id, or a folder whose stage will say what is wrong with it
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        return "reward_model"
    return "policy" if any(name.endswith("ForCausalLM") for name in architectures) else None


def kind_of(stage: Any) -> str | None:
    """The kind in a stage's mapping, if it is a known one."""
    kind = stage.get("kind") if isinstance(stage, Mapping) else None
    return kind if isinstance(kind, str) and kind in STAGE_KINDS else None


def base_stage(recipe: Mapping[str, Any]) -> str | None:
    """The stage that makes the base model, where `base_model` names one instead of a folder."""
    stages, path = recipe.get("stages"), _base(recipe.get("base_model")).get("path")
    if not isinstance(stages, Mapping) or not isinstance(path, str) or path not in stages:
        return None
    kind = kind_of(stages[path])
    return path if kind is not None and STAGE_KINDS[kind].makes_base else None


def base_problems(recipe: Mapping[str, Any], folder: Path) -> list[str]:
    """A local base model must be there; `owner/name` may be a hub id. What is no text is reported elsewhere."""
    source = _base(recipe.get("base_model"))
    path, file = source.get("path"), source.get("gguf_file")
    if not isinstance(path, str):
        return []
    if (stage := base_stage(recipe)) is not None:
        first = next(iter(recipe["stages"]))
        return [] if stage == first else [f'base_model: the stage "{stage}" makes it and so must come first']
    return _source_problems("base_model", path, file, folder)


def model_problems(recipe: Mapping[str, Any], folder: Path) -> list[str]:
    """Named models must be there, as the base must, and each name and folder must mean one thing."""
    models, base = recipe.get("models"), _base(recipe.get("base_model"))
    stages = recipe.get("stages")
    problems = []
    files = {base.get("path"): ("base_model", base.get("gguf_file"))}
    for name, value in models.items() if isinstance(models, Mapping) else ():
        key, source = f"models.{name}", _base(value)
        path, file = source.get("path"), source.get("gguf_file")
        taken = name == "base" or (isinstance(stages, Mapping) and name in stages)
        if taken or not isinstance(name, str) or not _MODEL_NAME.fullmatch(name):
            why = "stands for another model already" if taken else "is letters, digits, -, _ and dots inside"
            problems.append(f"{key}: a model's name {why}; choose another")
        if not isinstance(path, str):
            continue
        problems += _source_problems(key, path, file, folder)
        other, other_file = files.setdefault(path, (key, file))
        if file != other_file:
            problems.append(
                f"{key}: the folder of {other} with another gguf_file; give each a folder of its own"
            )
    return problems


def _source_problems(key: str, path: str, file: Any, folder: Path) -> list[str]:
    local = folder / path
    if local.is_dir():
        if isinstance(file, str) and not (local / file).is_file():
            return [f"{key}.gguf_file: no such file: {local / file}"]
        try:
            whole_model(BaseModelSource(path=str(local)))
        except UserInputError as error:
            return [f"{key}.path: {error}"]
        return []
    looks_like_hub = path.count("/") == 1 and not path.startswith((".", "/", "~"))
    return [] if looks_like_hub else [f"{key}.path: no such folder: {local}"]


def _base(base: Any) -> Mapping[str, Any]:
    return {"path": base} if isinstance(base, str) else base if isinstance(base, Mapping) else {}


def _problems(
    found: Iterable[Referring],
    key: str,
    data: Sequence[str],
    stages: Sequence[str],
    kinds: Mapping[str, str],
    earlier: Sequence[str],
    models: Mapping[str, ModelKind | None],
) -> list[str]:
    """References to what is missing, comes later or is of the wrong sort."""
    problems = []
    made = {
        name: data.rows
        for stage in earlier
        if stage in kinds
        for name, data in STAGE_KINDS[kinds[stage]].data_names(stage).items()
    }
    for referring in found:
        place = f"{key}.{referring.field}"
        for name in referring.names:
            if referring.kind == "data":
                known = [*data, *(made_of for made_of, rows in made.items() if rows == referring.rows)]
                if name not in known:
                    there = f"there are {', '.join(known)}" if known else "there are none"
                    problems.append(f'{place}: no data entry "{name}"{did_you_mean(name, known)}; {there}')
                continue
            produced = {stage: STAGE_KINDS[kinds[stage]].produces for stage in earlier if stage in kinds}
            fitting = [stage for stage in earlier if produced.get(stage, referring.kind) == referring.kind]
            known = [
                *(["base"] if referring.kind == "policy" else []),
                *(model for model, kind in models.items() if kind in (None, referring.kind)),
                *fitting,
            ]
            if name in known:
                continue
            wanted = "reward model" if referring.kind == "reward_model" else "policy"
            why = (
                "comes later" if name in stages and name not in earlier
                else f"is not a {wanted}" if name in earlier or name in ("base", *models)
                else "is no stage"
            )  # fmt: skip
            allowed = ", ".join(known) or "none"
            problems.append(f'{place}: "{name}" {why}{did_you_mean(name, known)}; allowed here: {allowed}')
    return problems
