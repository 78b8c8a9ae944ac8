"""What the stages of a run may refer to: where it lies and what it depends on."""

from __future__ import annotations

from dataclasses import dataclass, field

from llama2_chat.files import sha256_of
from llama2_chat.pipeline.data import prepare_data
from llama2_chat.pipeline.fingerprints import fingerprint_of_model, fingerprint_of_source
from llama2_chat.pipeline.recipe import Recipe
from llama2_chat.pipeline.references import references
from llama2_chat.pipeline.run_directory import RunDirectory
from llama2_chat.settings import StrictModel
from llama2_chat.stage import STAGE_KINDS, StageDirectory


@dataclass
class Inputs:
    """Paths and hashes of what stages may refer to (`model:NAME`, `data:NAME`), filled as the run goes on."""

    paths: dict[str, str] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)

    def add_stage(self, recipe: Recipe, name: str, directory: StageDirectory, fingerprint: str) -> None:
        """The model of a stage, which may be the run's base, and the data that it made can be used from now on."""
        kind = STAGE_KINDS[recipe.kind_of(name)]
        known_as = [name, *(["base"] if name == recipe.base_stage else [])] if kind.produces else []
        for model in known_as:
            self.paths[f"model:{model}"] = str(directory.model)
            self.hashes[f"model:{model}"] = fingerprint
        for data, made in kind.data_names(name).items():
            if data not in recipe.data:
                file = directory.path / made.file
                self.paths[f"data:{data}"] = str(file)
                self.hashes[f"data:{data}"] = sha256_of(file) if file.exists() else f"{data}: not made yet"


def base_inputs(recipe: Recipe, run: RunDirectory) -> Inputs:
    """Named models and the base are there from the start; a base that a stage makes will be where it puts it."""
    if recipe.base_stage is not None:
        model = run.stage(recipe.base_stage).model
        inputs = Inputs({"model:base": str(model)}, {"model:base": f"made by {recipe.base_stage}"})
    else:
        path = _folder_or_hub_id(recipe, recipe.head.base_model.path)
        inputs = Inputs({"model:base": path}, {"model:base": fingerprint_of_model(path)})
    for name, source in recipe.head.models.items():
        path = _folder_or_hub_id(recipe, source.path)
        inputs.paths[f"model:{name}"] = path
        # One folder under two names is one model.
        same = path == inputs.paths["model:base"]
        inputs.hashes[f"model:{name}"] = (
            inputs.hashes["model:base"] if same else fingerprint_of_source(path, source.gguf_file)
        )
    return inputs


def _folder_or_hub_id(recipe: Recipe, path: str) -> str:
    local = recipe.folder / path
    return str(local.resolve()) if local.is_dir() else path


def prepare_inputs(config: StrictModel, recipe: Recipe, run: RunDirectory, inputs: Inputs) -> None:
    """Make the data that a stage's or the evaluation's configuration names."""
    for referring in references(config):
        for data in referring.names if referring.kind == "data" else ():
            if f"data:{data}" not in inputs.paths:
                file = prepare_data(recipe, data, run.path, run.events)
                inputs.paths[f"data:{data}"] = str(file)
                inputs.hashes[f"data:{data}"] = sha256_of(file)
