"""Running a recipe: prepare data, run the stages that are not done, evaluate, summarise."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama2_chat import interruption
from llama2_chat.errors import UserInputError, did_you_mean
from llama2_chat.files import read_json, remove, sha256_of, write_json
from llama2_chat.pipeline.data import prepare_data
from llama2_chat.pipeline.fingerprints import fingerprint_of, fingerprint_of_model
from llama2_chat.pipeline.recipe import Recipe
from llama2_chat.pipeline.references import references, resolve
from llama2_chat.pipeline.run_directory import RunDirectory, opened
from llama2_chat.pipeline.stage_config import load_stage_config, write_stage_config
from llama2_chat.pipeline.sweep import load_runs
from llama2_chat.stage import STAGE_KINDS, StageDirectory


@dataclass(frozen=True)
class Selection:
    """Which stages of a recipe to run: from one, until one, some by force."""

    first: str | None = None
    last: str | None = None
    force: Sequence[str] = ()

    def check(self, recipe: Recipe) -> None:
        """Raise UserInputError for a name that is no stage, or an order that selects nothing."""
        names = list(recipe.stages)
        for option, name in [
            ("--from", self.first),
            ("--until", self.last),
            *(("--force", f) for f in self.force),
        ]:
            if name is not None and name not in names:
                raise UserInputError(
                    f"{option} {name}: no such stage{did_you_mean(name, names)}; there are {', '.join(names)}"
                )
        if self.first and self.last and names.index(self.first) > names.index(self.last):
            raise UserInputError(f"--from {self.first} comes after --until {self.last}")
        for name in self.force:
            if name not in self.names(recipe):
                option = "--from" if self.first and names.index(name) < names.index(self.first) else "--until"
                limit = self.first if option == "--from" else self.last
                raise UserInputError(f"--force {name}: not among the stages that {option} {limit} leaves")

    def names(self, recipe: Recipe) -> list[str]:
        """The selected stages in order."""
        names = list(recipe.stages)
        start = names.index(self.first) if self.first else 0
        end = names.index(self.last) + 1 if self.last else len(names)
        return names[start:end]


@dataclass
class Inputs:
    """Paths and hashes of what stages may refer to (`model:NAME`, `data:NAME`), filled as the run goes on."""

    paths: dict[str, str] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)

    def add_stage(self, recipe: Recipe, name: str, directory: StageDirectory, fingerprint: str) -> None:
        """The model of a stage can be used from now on; it may be the run's base."""
        for known_as in [name, *(["base"] if name == recipe.base_stage else [])]:
            self.paths[f"model:{known_as}"] = str(directory.model)
            self.hashes[f"model:{known_as}"] = fingerprint


def run_recipe(
    recipe_name: str, overrides: Sequence[str], output_dir: Path | None, selection: Selection
) -> list[Path]:
    """Run a recipe, or each combination of its `sweep`; returns the run directories."""
    runs = load_runs(recipe_name, overrides)
    for _, recipe in runs:
        selection.check(recipe)
    root = output_dir or Path("runs") / runs[0][1].head.name
    for folder, recipe in runs:
        _run_one(recipe, root / folder, selection)
    return [root / folder for folder, _ in runs]


def _run_one(recipe: Recipe, path: Path, selection: Selection) -> None:
    names = list(recipe.stages)
    selected = selection.names(recipe)
    with opened(path, recipe) as run:
        run.events.write("run_started", recipe=recipe.head.name)
        moved = run.renumber()
        inputs = base_inputs(recipe, run)
        for number, name in enumerate(names, start=1):
            shown = f"[{number}/{len(names)}] {name} ({_kind(recipe, name)})"
            if name in selected:
                _run_stage(recipe, name, run, inputs, shown, force=name in selection.force, moved=moved)
            else:
                _use_stage(recipe, name, run, inputs, needed=number <= names.index(selected[0]))
            write_summary(recipe, run, None)
        evaluation = None
        if recipe.evaluation is not None and selected[-1] == names[-1]:
            evaluation = _evaluate(recipe, run, inputs)
        write_summary(recipe, run, evaluation)
        run.events.write("run_finished")
        _write_report(run)


def _write_report(run: RunDirectory) -> None:
    """`report.html`. The results are safe by now, so a failure to draw them is said and ends nothing."""
    from llama2_chat.report.page import write_report

    try:
        write_report(run.path)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        run.events.write("report_failed", error=problem, traceback=traceback.format_exc())
        _say(
            f"the report could not be written ({problem}); `llama2-chat --debug report {run.path}` shows why"
        )


def base_inputs(recipe: Recipe, run: RunDirectory) -> Inputs:
    """The base model is there from the start, or will be where a stage of the run puts it."""
    if recipe.base_stage is not None:
        model = run.stage(recipe.base_stage).model
        return Inputs({"model:base": str(model)}, {"model:base": f"made by {recipe.base_stage}"})
    local = recipe.folder / recipe.head.base_model.path
    path = str(local.resolve()) if local.is_dir() else recipe.head.base_model.path
    return Inputs({"model:base": path}, {"model:base": fingerprint_of_model(path)})


def _prepare(recipe: Recipe, name: str, run: RunDirectory, inputs: Inputs) -> None:
    """Make the data that a stage (or the evaluation) names."""
    config = recipe.stages.get(name, recipe.evaluation)
    assert config is not None
    for referring in references(config):
        for data in referring.names if referring.kind == "data" else ():
            if f"data:{data}" not in inputs.paths:
                file = prepare_data(recipe, data, run.path, run.events)
                inputs.paths[f"data:{data}"] = str(file)
                inputs.hashes[f"data:{data}"] = sha256_of(file)


def _run_stage(
    recipe: Recipe, name: str, run: RunDirectory, inputs: Inputs, shown: str, *, force: bool, moved: bool
) -> None:
    interruption.raise_if_requested()
    directory = run.stage(name)
    _prepare(recipe, name, run, inputs)
    fingerprint = fingerprint_of(recipe.stages[name], recipe.settings, inputs.hashes)
    if force or not _continues(directory, fingerprint):
        # What tells that the stage is done goes first: a kill may leave any part of the rest.
        for path in (directory.done_file, directory.started_file, directory.path):
            remove(path)
    done = directory.done_file.exists()
    begun = directory.checkpoints.exists() or directory.samples.exists()
    _say(f"{shown}: {'done already' if done else 'continues' if begun else 'starts'}")
    if not done:
        write_json(directory.started_file, {"fingerprint": fingerprint})
    if not done or moved:
        write_stage_config(
            directory.config_file, recipe.stages[name], recipe.settings, inside=run.path, paths=inputs.paths
        )
    if not done:
        run_stage_file(directory.config_file, _kind(recipe, name), directory, fingerprint)
        _say(f"{shown}: done")
    inputs.add_stage(recipe, name, directory, fingerprint)


def _say(line: str) -> None:
    """For whoever watches; standard output is left to results."""
    print(line, file=sys.stderr, flush=True)


def _continues(directory: StageDirectory, fingerprint: str) -> bool:
    """Whether what lies in the folder was begun with the same configuration and inputs."""
    started = directory.started_file
    return started.exists() and read_json(started)["fingerprint"] == fingerprint


def _use_stage(recipe: Recipe, name: str, run: RunDirectory, inputs: Inputs, *, needed: bool) -> None:
    """Take a stage that is not to be run as it is."""
    directory = run.stage(name)
    if directory.done_file.exists():
        inputs.add_stage(recipe, name, directory, read_json(directory.done_file)["fingerprint"])
    elif needed:
        raise UserInputError(f"--from: stage {name} comes before and is not done in {run.path}; run it first")


def run_stage_file(
    file: Path, kind: str, directory: StageDirectory, fingerprint: str, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Run one stage from its standalone configuration and write `done.json`."""
    config, settings = load_stage_config(file, kind, overrides)
    directory.events.write("stage_started", kind=kind)
    started = time.perf_counter()
    metrics = STAGE_KINDS[kind].load_run_function()(config, settings, directory)
    seconds = time.perf_counter() - started
    write_json(
        directory.done_file,
        {"fingerprint": fingerprint, "kind": kind, "wall_seconds": round(seconds, 3), "metrics": metrics},
    )
    directory.events.write("stage_finished", kind=kind, seconds=seconds)
    return metrics


def _evaluate(recipe: Recipe, run: RunDirectory, inputs: Inputs) -> dict[str, Any]:
    from llama2_chat.evaluation.run import run_evaluation

    assert recipe.evaluation is not None
    _prepare(recipe, "evaluation", run, inputs)
    made = [name for name in recipe.stages if STAGE_KINDS[_kind(recipe, name)].produces == "policy"]
    policies = ["base", *(name for name in made if name != recipe.base_stage)]
    sft = next((name for name in policies if name != "base" and _kind(recipe, name) == "sft"), None)
    resolved = resolve(
        recipe.evaluation,
        lambda referring, name: inputs.paths[f"{'data' if referring.kind == 'data' else 'model'}:{name}"],
    )
    own = fingerprint_of(recipe.evaluation, recipe.settings, inputs.hashes)
    base = recipe.settings.base_model.model_copy(update={"path": inputs.paths["model:base"]})
    return run_evaluation(
        resolved,
        recipe.settings.model_copy(update={"base_model": base}),
        policies={name: inputs.paths[f"model:{name}"] for name in policies},
        fingerprints={
            name: ":".join([own, inputs.hashes[f"model:{name}"], inputs.hashes.get(f"model:{sft}", "")])
            for name in policies
        },
        sft=sft,
        directory=run.evaluation,
        events=run.events,
    )


def _kind(recipe: Recipe, name: str) -> str:
    kind: str = recipe.stages[name].kind  # type: ignore[attr-defined]
    return kind


def write_summary(recipe: Recipe, run: RunDirectory, evaluation: dict[str, Any] | None) -> None:
    """`summary.json`: metrics and time of every stage that is done, and the evaluation once it is."""
    stages = {}
    for name in recipe.stages:
        done = run.stage(name).done_file
        if done.exists():
            record = read_json(done)
            stages[name] = {
                "kind": record["kind"],
                "wall_seconds": record["wall_seconds"],
                **record["metrics"],
            }
    write_json(
        run.summary,
        {
            "recipe": recipe.head.name,
            "seed": recipe.head.seed,
            "wall_seconds": round(sum(stage["wall_seconds"] for stage in stages.values()), 3),
            "stages": stages,
            "evaluation": evaluation or {},
        },
    )
