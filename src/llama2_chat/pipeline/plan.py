"""`run --dry-run`: what would be run, from what, into what, and roughly at what cost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2_chat.adapter_base import whole_model
from llama2_chat.data_import import FormatName, Kind
from llama2_chat.files import read_json, sha256_of
from llama2_chat.pipeline.custom_rewards import custom_reward_names
from llama2_chat.pipeline.data import prepare_data, prepared
from llama2_chat.pipeline.data_entries import GeneratedData, ImportedData
from llama2_chat.pipeline.estimates import (
    Estimate,
    data_size,
    estimate_stage,
    format_bytes,
    matmul_flops,
    named_parameter_count,
    parameter_count,
)
from llama2_chat.pipeline.fingerprints import fingerprint_of
from llama2_chat.pipeline.inputs import base_inputs
from llama2_chat.pipeline.paper_values import paper_warnings
from llama2_chat.pipeline.recipe import Recipe
from llama2_chat.pipeline.references import references
from llama2_chat.pipeline.run import Selection
from llama2_chat.pipeline.run_directory import RunDirectory, check_belongs
from llama2_chat.pipeline.stage_config import write_stage_config
from llama2_chat.progress import format_duration
from llama2_chat.reward.config import RewardConfig, number_to_draw
from llama2_chat.settings import BaseModelSource, StrictModel
from llama2_chat.stage import STAGE_KINDS, EventLog, StageDirectory

_TOKENS_PER_GENERATED_ROW = 40
SIZE_OF_IMPORT: dict[FormatName, dict[Kind, tuple[float, float]]] = {
    "hh-rlhf": {"preferences": (1.0, 1.0), "dialogues": (1.0, 0.5), "prompts": (1.0, 0.25)},
    "pandalm": {"preferences": (1 / 15, 0.7), "dialogues": (1 / 15, 0.4), "prompts": (1 / 15, 0.2)},
    "oasst": {"preferences": (7.5, 2.1), "dialogues": (1.0, 0.2), "prompts": (4.8, 0.5)},
    "xstest": {"prompts": (1.0, 0.6)},
    "truthfulqa": {"preferences": (4.1, 0.8), "dialogues": (1.0, 0.2), "prompts": (1.0, 0.1)},
    "toxigen": {"prompts": (1.0, 1.0)},
    "bold": {"prompts": (120.0, 0.5)},
    "diasafety": {"dialogues": (1 / 6, 0.6), "prompts": (1 / 6, 0.4)},
}
"""Rows a line of the file, and text a byte of it, about as in the public sets: a row of HH-RLHF holds the dialogue
twice, with either answer; a row of PandaLM stands on 12 lines, and a fifth of the rows is dropped; a tree of
OpenAssistant gives many pairs; a file of BOLD is one line, and its whole files hold more rows than this."""

_NO_PASS = ("held_out", "sft_dialogues", "instructions", "temperature_prompts", "earlier_samples")
"""Fields whose rows no pass is made over: they are read once, or mixed in by a share of the stage's own rows."""


@dataclass(frozen=True)
class Plan:
    """One row a stage (stage, kind, inputs, output, state, memory, disk, time), and what times rest on."""

    rows: list[dict[str, str]]
    flops: float | None
    """FLOP/s of the machine; None where nothing can be estimated."""
    notes: list[str]
    """What the needs rest on beside that, and warnings."""


def make_plan(recipe: Recipe, root: Path, selection: Selection) -> Plan:
    """What a run into `root` would do.

    Raises:
        UserInputError: the folder holds something else.
    """
    run = RunDirectory(root, list(recipe.stages))
    check_belongs(run, recipe, root)
    inputs = base_inputs(recipe, run)
    parameters, notes = _base_size(inputs.paths["model:base"], recipe.head.base_model.gguf_file)
    notes += paper_warnings(recipe, parameters)
    sizes = {"base": parameters}
    for name, source in recipe.head.models.items():
        sizes[name], told = _base_size(inputs.paths[f"model:{name}"], source.gguf_file)
        notes += told
    flops = matmul_flops(recipe.head.device) if any(sizes.values()) else None
    inputs.hashes |= {f"data:{name}": _data_hash(recipe, name, run) for name in recipe.data}
    selected = selection.names(recipe)
    rows = []
    for name, config in recipe.stages.items():
        directory = run.stage(name)
        fingerprint = fingerprint_of(config, recipe.settings, inputs.hashes)
        state = _state(directory, fingerprint, name in selected, name in selection.force)
        if name not in selected and directory.done_file.exists():
            fingerprint = read_json(directory.done_file)["fingerprint"]  # the run would take it as it is
        inputs.add_stage(recipe, name, directory, fingerprint)
        sizes[name] = sizes[_made_from(config)]
        need = estimate_stage(config, sizes[name], *_data_size(recipe, config), flops or 1.0)
        rows.append(_row(name, config, directory, state, need))
    return Plan(rows, flops, notes)


def _made_from(config: StrictModel) -> str:
    """The policy that gives a stage's model its size: the first that its configuration names."""
    named = (
        name for referring in references(config) if referring.kind == "policy" for name in referring.names
    )
    return next(named, "base")


def _row(
    name: str, config: StrictModel, directory: StageDirectory, state: str, need: Estimate
) -> dict[str, str]:
    kind: str = config.kind  # type: ignore[attr-defined]
    inputs = [name for referring in references(config) for name in referring.names]
    inputs += custom_reward_names(config.model_dump())
    made = [
        *(["model"] if STAGE_KINDS[kind].produces else []),
        *(m.file for m in STAGE_KINDS[kind].makes.values()),
    ]
    return {
        "stage": name,
        "kind": kind,
        "inputs": ", ".join(dict.fromkeys(inputs)),
        "output": f"stages/{directory.path.name}/{', '.join(made)}",
        "state": state,
        "memory": "unknown" if need.memory is None else f"≥ {format_bytes(need.memory)}",
        "disk": format_bytes(need.disk),
        "time": "unknown" if need.seconds is None else f"≥ {format_duration(need.seconds)}",
    }


def write_configs(recipe: Recipe, root: Path, folder: Path) -> list[Path]:
    """Each stage's standalone configuration, as the run would write it, into `folder`; returns the files.

    Paths lead into the run directory `root`, where earlier stages are or will be (`--output-dir
    ROOT/stages/NN-name` puts them there). Data that has to be made is made now: in `root` if it lies there
    already, else in `folder`/data.
    """
    run = RunDirectory(root, list(recipe.stages))
    paths = dict(base_inputs(recipe, run).paths)
    with_model = [name for name in recipe.stages if STAGE_KINDS[recipe.kind_of(name)].produces]
    paths |= {f"model:{name}": str(run.stage(name).model) for name in with_model}
    paths |= {
        f"data:{data}": str(run.stage(name).path / made.file)
        for name in recipe.stages
        for data, made in STAGE_KINDS[recipe.kind_of(name)].data_names(name).items()
        if data not in recipe.data
    }
    target, events = folder.resolve(), EventLog(folder.resolve() / "data" / "events.jsonl")
    for name in {
        n
        for c in recipe.stages.values()
        for r in references(c)
        if r.kind == "data"
        for n in r.names
        if n in recipe.data
    }:
        there = prepared(recipe, name, run.path)
        paths[f"data:{name}"] = str(there or prepare_data(recipe, name, target, events))
    files = []
    for name, config in recipe.stages.items():
        file = target / f"{run.stage(name).path.name}.yaml"
        write_stage_config(file, config, recipe.settings, inside=run.path, paths=paths)
        files.append(file)
    return files


def _data_hash(recipe: Recipe, name: str, run: RunDirectory) -> str:
    """Of data that is yet to be made nothing can be known, so no stage that reads it is done."""
    file = prepared(recipe, name, run.path)
    return f"{name}: not made yet" if file is None else sha256_of(file)


def _state(directory: StageDirectory, fingerprint: str, selected: bool, forced: bool) -> str:
    started = directory.started_file
    record = read_json(directory.done_file) if directory.done_file.exists() else None
    same = record is not None and record["fingerprint"] == fingerprint
    if not selected:
        return "not selected" if record is None else f"not selected; done{'' if same else ', since changed'}"
    if forced:
        return "to run (forced)"
    if record is not None:
        seconds = format_duration(record["wall_seconds"])
        return f"done in {seconds}" if same else "to run again (changed)"
    begun = started.exists() and read_json(started)["fingerprint"] == fingerprint
    return "to continue" if begun else "to run"


def _base_size(path: str, gguf_file: str | None) -> tuple[int | None, list[str]]:
    """Parameters of the base model, counted or read from its name, and how they were told."""
    source = whole_model(BaseModelSource(path=path, gguf_file=gguf_file))
    folder, gguf_file = Path(source.path), source.gguf_file
    if folder.is_dir() and (counted := parameter_count(folder)) is not None:
        return counted, []
    name = gguf_file or folder.name
    if (named := named_parameter_count(name)) is None:
        return None, []
    return named, [f"{name}: taken for a model of {named / 1e6:,.0f} million parameters, as its name says"]


def _data_size(recipe: Recipe, config: Any) -> tuple[float, float]:
    """Tokens and rows that a stage goes through in one pass."""
    tokens = rows = other_tokens = other_rows = 0.0
    for referring in references(config):
        if referring.kind != "data" or referring.field in _NO_PASS:
            continue
        for name in referring.names:
            of_entry, in_entry = _entry_size(recipe, name)
            if referring.field == "other_preferences":
                other_tokens, other_rows = other_tokens + of_entry, other_rows + in_entry
            else:
                tokens, rows = tokens + of_entry, rows + in_entry
    if isinstance(config, RewardConfig) and config.share_of_others is not None and other_rows:
        drawn = min(other_rows, number_to_draw(rows, config.share_of_others))
        tokens, rows = tokens + other_tokens * drawn / other_rows, rows + drawn
    return tokens, rows


def _entry_size(recipe: Recipe, name: str) -> tuple[float, float]:
    """Tokens and rows of a data entry; nothing for what an earlier stage is yet to make."""
    if name not in recipe.data:
        return 0.0, 0.0
    entry = recipe.data[name]
    if isinstance(entry, GeneratedData):
        return float(entry.rows * _TOKENS_PER_GENERATED_ROW), float(entry.rows)
    of_file, in_file = data_size(recipe.folder / entry.path)
    if not isinstance(entry, ImportedData):
        return of_file, in_file
    a_line, share = SIZE_OF_IMPORT[entry.format][entry.kind]
    in_file *= a_line
    used = min(max(in_file * entry.part - entry.offset, 0.0), entry.limit or in_file)
    return of_file * share * used / max(in_file, 1.0), used
