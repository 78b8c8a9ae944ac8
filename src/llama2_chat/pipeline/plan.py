"""`run --dry-run`: what would be run, from what, into what, and roughly at what cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama2_chat.files import read_json
from llama2_chat.pipeline.estimates import (
    data_tokens,
    estimate_stage,
    format_bytes,
    matmul_flops,
    parameter_count,
)
from llama2_chat.pipeline.recipe import GeneratedData, Recipe
from llama2_chat.pipeline.references import references
from llama2_chat.pipeline.run import Selection, base_inputs
from llama2_chat.pipeline.run_directory import RunDirectory
from llama2_chat.pipeline.stage_config import write_stage_config
from llama2_chat.progress import format_duration
from llama2_chat.stage import STAGE_KINDS

_TOKENS_PER_GENERATED_ROW = 40


def plan_rows(recipe: Recipe, root: Path, selection: Selection) -> list[dict[str, str]]:
    """One row a stage: name, kind, inputs, output, state, memory, disk, time."""
    run = RunDirectory(root, list(recipe.stages))
    base = Path(base_inputs(recipe).paths["model:base"])
    parameters = parameter_count(base) if base.is_dir() else None
    flops = matmul_flops()
    selected = selection.names(recipe)
    rows = []
    for name, config in recipe.stages.items():
        kind: str = config.kind  # type: ignore[attr-defined]
        directory = run.stage(name)
        need = estimate_stage(config, parameters, _tokens(recipe, config), flops)
        output = f"stages/{directory.path.name}/model"
        if STAGE_KINDS[kind].makes_dataset:
            output += ", dataset.jsonl"
        rows.append(
            {
                "stage": name,
                "kind": kind,
                "inputs": ", ".join(dict.fromkeys(n for r in references(config) for n in r.names)),
                "output": output,
                "state": _state(directory.done_file, name, selected, selection),
                "memory": format_bytes(need.memory),
                "disk": format_bytes(need.disk),
                "time": "unknown" if need.seconds is None else f"≥ {format_duration(need.seconds)}",
            }
        )
    return rows


def write_configs(recipe: Recipe, root: Path, folder: Path) -> list[Path]:
    """Each stage's standalone configuration, as the run would write it, into `folder`; returns the files.

    Paths lead into the run directory `root`, where earlier stages and prepared data will lie.
    """
    run = RunDirectory(root, list(recipe.stages))
    paths = dict(base_inputs(recipe).paths)
    paths |= {f"model:{name}": str(run.stage(name).model) for name in recipe.stages}
    for name, entry in recipe.data.items():
        made = run.path / "data" / f"{name}.jsonl"
        path = getattr(entry, "path", None)
        is_file = path is not None and not hasattr(entry, "format")
        paths[f"data:{name}"] = str((recipe.folder / str(path)).resolve() if is_file else made)
    files = []
    for name, config in recipe.stages.items():
        file = folder.resolve() / f"{run.stage(name).path.name}.yaml"
        write_stage_config(file, config, recipe.settings, inside=run.path, paths=paths)
        files.append(file)
    return files


def _state(done: Path, name: str, selected: Sequence[str], selection: Selection) -> str:
    if name in selection.force:
        return "to run (forced)"
    if done.exists():
        return f"done in {format_duration(read_json(done)['wall_seconds'])}, if unchanged"
    return "to run" if name in selected else "not selected"


def _tokens(recipe: Recipe, config: Any) -> float | None:
    total = 0.0
    for referring in references(config):
        if referring.kind != "data" or referring.field == "held_out":
            continue
        for name in referring.names:
            entry = recipe.data[name]
            if isinstance(entry, GeneratedData):
                total += entry.rows * _TOKENS_PER_GENERATED_ROW
            else:
                total += data_tokens(recipe.folder / entry.path)
    return total or None
