"""Running a recipe: prepare data, run the stages that are not done, evaluate, summarise."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2_chat import interruption
from llama2_chat.distributed import is_main_process, process_count
from llama2_chat.errors import UserInputError, did_you_mean
from llama2_chat.files import read_json, remove, write_json
from llama2_chat.pipeline.evaluation import evaluating
from llama2_chat.pipeline.fingerprints import fingerprint_of
from llama2_chat.pipeline.inputs import Inputs, base_inputs, prepare_inputs
from llama2_chat.pipeline.recipe import Recipe
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


def run_recipe(
    recipe_name: str, overrides: Sequence[str], output_dir: Path | None, selection: Selection
) -> list[Path]:
    """Run a recipe, or each combination of its `sweep`; returns the run directories.

    Raises:
        UserInputError: several processes were launched for it.
    """
    if process_count() > 1:
        raise UserInputError(
            f"run: launched as {process_count()} processes, but a whole recipe runs in one; write its stages' "
            "configurations with --dry-run --write-configs DIR and launch those that several can share"
        )
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
        with evaluating(recipe, run, inputs, wanted=selected[-1] == names[-1]) as evaluation:
            for number, name in enumerate(names, start=1):
                shown = f"[{number}/{len(names)}] {name} ({recipe.kind_of(name)})"
                if name in selected:
                    _run_stage(recipe, name, run, inputs, shown, force=name in selection.force, moved=moved)
                else:
                    _use_stage(recipe, name, run, inputs, needed=number <= names.index(selected[0]))
                write_summary(recipe, run, None)
                if number < len(names):  # nothing runs beside the last one's evaluation: `finish` is quicker
                    evaluation.go_on()
            results = evaluation.finish()
        write_summary(recipe, run, results)
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


def _run_stage(
    recipe: Recipe, name: str, run: RunDirectory, inputs: Inputs, shown: str, *, force: bool, moved: bool
) -> None:
    interruption.raise_if_requested()
    directory = run.stage(name)
    prepare_inputs(recipe.stages[name], recipe, run, inputs)
    fingerprint = fingerprint_of(recipe.stages[name], recipe.settings, inputs.hashes)
    if force or not _continues(directory, fingerprint):
        # What tells that the stage is done goes first: a kill may leave any part of the rest.
        for path in (directory.done_file, directory.started_file, directory.path):
            remove(path)
    done = directory.done_file.exists()
    begun = directory.checkpoints.exists() or any(directory.path.glob("*samples.jsonl*"))  # or a part of them
    _say(f"{shown}: {'done already' if done else 'continues' if begun else 'starts'}")
    if not done:
        write_json(directory.started_file, {"fingerprint": fingerprint})
    if not done or moved:
        write_stage_config(
            directory.config_file, recipe.stages[name], recipe.settings, inside=run.path, paths=inputs.paths
        )
    if not done:
        run_stage_file(directory.config_file, recipe.kind_of(name), directory, fingerprint)
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
    """Run one stage from its standalone configuration and write `done.json`; of several processes the first does."""
    config, settings = load_stage_config(file, kind, overrides)
    directory.events.write("stage_started", kind=kind)
    started = time.perf_counter()
    metrics = STAGE_KINDS[kind].load_run_function()(config, settings, directory)
    seconds = time.perf_counter() - started
    record = {"fingerprint": fingerprint, "kind": kind, "wall_seconds": round(seconds, 3), "metrics": metrics}
    if is_main_process():
        write_json(directory.done_file, record)
        directory.drop_progress()  # not before: a kill while the model is written is continued from it
    directory.events.write("stage_finished", kind=kind, seconds=seconds)
    return metrics


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
