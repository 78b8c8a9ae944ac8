"""One command for each kind of stage: `llama2-chat sft CONFIG [KEY=VALUE …] --output-dir DIR`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from llama2_chat.settings import RunSettings, StrictModel
    from llama2_chat.stage import StageDirectory

_Config = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="The stage's mapping plus the recipe-level keys")
]
_Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")]
_Output = Annotated[
    Path, typer.Option(help="Gets model/ or the data that is made, metrics.jsonl, checkpoints/, done.json")
]

_MADE_FILES = (
    *("samples.jsonl", "samples.jsonl.partial", "held_out.jsonl"),
    *("annotations.jsonl", "annotations.jsonl.partial", "to_annotate.jsonl"),
    *("temperature.json", "temperature_samples.jsonl", "temperature_samples.jsonl.partial"),
    *("best_of.json", "pool.jsonl", "pool.jsonl.partial"),
    *("asked.jsonl", "instructions.jsonl"),
)


def _command(kind: str, doc: str) -> Callable[..., None]:
    def command(config: _Config, output_dir: _Output, overrides: _Overrides = None) -> None:
        _run(kind, config, overrides or [], output_dir)

    command.__doc__ = doc
    return command


COMMANDS: dict[str, Callable[..., None]] = {
    "pretrain": _command("pretrain", "Train a base model from nothing."),
    "sft": _command("sft", "Supervised fine-tuning on dialogues."),
    "reward": _command("reward", "Train a reward model on preference pairs."),
    "preferences": _command("preferences", "Collect preference pairs: sample two answers, have one chosen."),
    "rejection-sampling": _command("rejection_sampling", "Sample, keep the best, fine-tune on it."),
    "ppo": _command("ppo", "Optimise the reward by PPO with a KL penalty."),
    "ghost-attention": _command("ghost_attention", "Teach instructions that last through a dialogue."),
    "context-distillation": _command("context_distillation", "Distil a safety preprompt into the model."),
}


def _run(kind: str, config_file: Path, overrides: list[str], output_dir: Path) -> None:
    """Run a stage, or continue it if it was interrupted with the same configuration and inputs.

    Of several processes the first prepares the folder and speaks; then all run the stage.
    """
    from llama2_chat import distributed, interruption
    from llama2_chat.models import select_device
    from llama2_chat.pipeline.run import run_stage_file
    from llama2_chat.pipeline.run_directory import ensure_writable, locked
    from llama2_chat.pipeline.stage_config import load_stage_config, prepare_stage_data
    from llama2_chat.stage import EventLog, StageDirectory

    _refuse_many_processes(kind)
    made_data = output_dir.resolve() / "data"
    config, settings = load_stage_config(config_file, kind, overrides, made_data=made_data)
    directory = StageDirectory(output_dir.resolve(), EventLog(output_dir.resolve() / "events.jsonl"))
    main, alone = distributed.is_main_process(), distributed.process_count() == 1
    if alone:
        interruption.install_handlers()
    with ExitStack() as held:
        if main:
            ensure_writable(output_dir)
            held.enter_context(locked(directory.path, output_dir))
            _refuse_what_is_not_ours(directory, output_dir)
            prepare_stage_data(config_file, overrides, config, settings, directory)
            fingerprint = _prepare(directory, config_file, config, settings, output_dir)
        else:
            fingerprint = ""
        if not alone:
            distributed.connect(select_device(settings.device).type)
            distributed.wait_for_everyone()
            # Not before: a process that waits for one that has failed is ended by the launcher's first signal.
            interruption.install_handlers()
        if directory.done_file.exists():
            if main:
                typer.echo(f"{output_dir}: done already, with the same configuration and inputs")
            return
        if config_file.resolve() != directory.config_file:
            config_file, overrides = directory.config_file, []
        run_stage_file(config_file, kind, directory, fingerprint, overrides)
        distributed.disconnect()
    if main:
        typer.echo(f"{output_dir}: done; {_result(kind, directory)}")


def _result(kind: str, directory: StageDirectory) -> str:
    """Where to find what a stage of this kind makes."""
    from llama2_chat.stage import STAGE_KINDS

    if STAGE_KINDS[kind].produces:
        return f"the model is in {directory.model}"
    return f"{', '.join(made.file for made in STAGE_KINDS[kind].makes.values())} are in {directory.path}"


def _refuse_many_processes(kind: str) -> None:
    """A stage that only one process can run, launched by several, would run several times."""
    from llama2_chat.distributed import process_count
    from llama2_chat.errors import UserInputError
    from llama2_chat.stage import STAGE_KINDS

    if process_count() > 1 and not STAGE_KINDS[kind].many_processes:
        able = ", ".join(name for name, stage in STAGE_KINDS.items() if stage.many_processes)
        raise UserInputError(
            f"{kind}: launched as {process_count()} processes, but runs in one so far; "
            f"several can share {able}"
        )


def _prepare(
    directory: StageDirectory, config_file: Path, config: StrictModel, settings: RunSettings, shown: Path
) -> str:
    """Make the folder ready to begin or to continue; returns the fingerprint of what is to be run."""
    from llama2_chat.files import read_json, remove, write_json
    from llama2_chat.pipeline.fingerprints import fingerprint_of_files
    from llama2_chat.pipeline.stage_config import write_resolved_config

    fingerprint = fingerprint_of_files(config, settings)
    started = directory.started_file
    if not started.exists() or read_json(started)["fingerprint"] != fingerprint:
        leftovers = _left_by_another(directory)
        _refuse_to_remove_inputs(leftovers, config, shown)
        for leftover in leftovers:
            remove(leftover)
        write_json(started, {"fingerprint": fingerprint})
    if not directory.done_file.exists() and config_file.resolve() != directory.config_file:
        write_resolved_config(directory.config_file, config, settings)
    return fingerprint


def _refuse_what_is_not_ours(directory: StageDirectory, shown: Path) -> None:
    """Files that no stage began are the user's own and are not to be replaced."""
    from llama2_chat.errors import OutputFolderError

    found = [path for path in _left_by_another(directory) if path.exists()]
    if found and not directory.started_file.exists():
        raise OutputFolderError(
            f"{shown}: holds {found[0].name}, which no stage made; choose another --output-dir"
        )


def _refuse_to_remove_inputs(leftovers: list[Path], config: StrictModel, shown: Path) -> None:
    """What an earlier call made here may be what this one starts from: its model, its instructions."""
    from llama2_chat.errors import OutputFolderError
    from llama2_chat.pipeline.references import references

    for referring in references(config):
        for name in referring.names:
            path = Path(name).resolve()
            if any(path == leftover or leftover in path.parents for leftover in leftovers):
                raise OutputFolderError(
                    f"{shown}: {referring.field} names {path.relative_to(shown.resolve())} in it, which would be "
                    "removed when another configuration begins here; choose another --output-dir"
                )


def _left_by_another(directory: StageDirectory) -> list[Path]:
    """What an earlier call with another configuration may have left; `done.json` goes first."""
    return [
        directory.done_file,
        directory.model,
        directory.metrics_file,
        directory.checkpoints,
        directory.adapter,
        directory.answers,
        directory.tracking,
        directory.dataset,
        *(directory.path / name for name in _MADE_FILES),
    ]
