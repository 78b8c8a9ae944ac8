"""`llama2-chat score`: reward scores for every dialogue of a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llama2_chat.cli.options import Device
from llama2_chat.dialogue import Dialogue
from llama2_chat.errors import MissingFileError, UserInputError

if TYPE_CHECKING:
    from llama2_chat.part_file import PartFile
    from llama2_chat.reward.scoring import RewardScorer

_ROWS_AT_ONCE = 256
"""Scored together; float32 scores depend on that in their last digits, so a run resumes at multiples of it."""


def score(
    input_file: Annotated[
        Path, typer.Argument(metavar="INPUT.jsonl", help="Dialogues that end with an answer")
    ],
    helpfulness: Annotated[Path, typer.Option(help="Helpfulness reward model folder")],
    output: Annotated[Path, typer.Option(help="Where the rows with their scores go")],
    safety: Annotated[Path | None, typer.Option(help="Safety reward model folder")] = None,
    safety_threshold: Annotated[
        float, typer.Option(help="Below this probability R_c is the safety score")
    ] = 0.15,
    device: Device = "auto",
) -> None:
    """Write each input row plus `scores`, in order; a run that was killed continues."""
    if not input_file.exists():
        raise MissingFileError(f"{input_file}: no such file")
    if not 0 < safety_threshold < 1:
        raise UserInputError(f"--safety-threshold: {safety_threshold} is not between 0 and 1")
    if output.exists() and output.samefile(input_file):
        raise UserInputError(f"--output {output}: is the input itself; name another file")
    from llama2_chat.part_file import opened, part_of
    from llama2_chat.pipeline.run_directory import ensure_writable
    from llama2_chat.reward.scoring import RewardScorer

    survey = _survey(input_file)
    ensure_writable(output.parent)
    scorer = RewardScorer.from_pretrained(
        helpfulness, safety, safety_threshold=safety_threshold, device=device
    )
    _refuse_too_long(input_file, survey, scorer)
    made_from = _made_from(input_file, helpfulness, safety, scorer)
    with opened(output, made_from, rows_per_chunk=_ROWS_AT_ONCE) as part:
        if part.started_anew:
            reason = "holds scores of another input, other models or other options; starting anew"
            print(f"{part_of(output)}: {reason}", file=sys.stderr)
        elif part.rows_done:
            print(f"{part_of(output)}: continuing after {part.rows_done} dialogues", file=sys.stderr)
        _score_into(part, input_file, survey.dialogues, scorer)
        part.finish()
    typer.echo(f"{output}: scores of {survey.dialogues} dialogues")


@dataclass(frozen=True)
class _Survey:
    """What a first look at the input found; every row of it is well formed."""

    dialogues: int
    longest_bytes: int
    """Of what cannot be left out of a dialogue: its system message and last turn."""


def _survey(file: Path) -> _Survey:
    from llama2_chat.errors import DataFormatError

    count = longest = 0
    for line, row, dialogue in _dialogues(file):
        try:
            json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
        except ValueError as error:
            # A field that is not scored, but written again.
            raise DataFormatError(file, line, f"cannot be written as JSON in UTF-8: {error}") from None
        count += 1
        longest = max(longest, _kept_bytes(dialogue))
    return _Survey(count, longest)


def _kept_bytes(dialogue: Dialogue) -> int:
    kept = dialogue.messages[-2:]
    if dialogue.messages[0].role == "system":
        kept = (dialogue.messages[0], *kept)
    return sum(len(message.content.encode()) for message in kept)


def _refuse_too_long(file: Path, survey: _Survey, scorer: RewardScorer) -> None:
    """Find a last turn that no model can take before hours of scoring, not after."""
    from llama2_chat.errors import DataFormatError

    # A token stands for a byte at least, so most inputs need not be tokenised twice; formats write some themselves.
    surely_fits = min(model.max_tokens for model in scorer.models) - 64
    if survey.longest_bytes <= surely_fits:
        return
    for line, _, dialogue in _dialogues(file):
        if _kept_bytes(dialogue) > surely_fits:
            for model in scorer.models:
                try:
                    model.encode(dialogue.messages)
                except UserInputError as error:
                    raise DataFormatError(file, line, str(error)) from error


def _made_from(file: Path, helpfulness: Path, safety: Path | None, scorer: RewardScorer) -> dict[str, Any]:
    """Everything that the scores depend on; another model of the same name and size is another one."""
    from importlib.metadata import version

    from llama2_chat import __version__
    from llama2_chat.files import sha256_of

    def digest(model: Path | None) -> str | None:
        return None if model is None else sha256_of(model) if model.is_dir() else str(model)

    return {
        "input": sha256_of(file),
        "helpfulness": digest(helpfulness),
        "safety": digest(safety),
        "safety_threshold": scorer.safety_threshold,
        "device": scorer.models[0].model.device.type,
        "versions": {
            "llama2-chat": __version__,
            **{name: version(name) for name in ("torch", "transformers")},
        },
    }


def _score_into(part: PartFile, file: Path, total: int, scorer: RewardScorer) -> None:
    """Score what is not done yet, chunk by chunk; stops between two of them when asked to."""
    from dataclasses import asdict

    from llama2_chat import interruption
    from llama2_chat.progress import track

    waiting = islice(_dialogues(file), part.rows_done, None)
    interruption.install_handlers()
    try:
        with track("scoring", total=total, unit="dialogues", done=part.rows_done) as progress:
            while batch := list(islice(waiting, _ROWS_AT_ONCE)):
                interruption.raise_if_requested()
                dialogues = [dialogue for _, _, dialogue in batch]
                scores = scorer.score([d.messages for d in dialogues], [d.is_safety for d in dialogues])
                part.append(
                    row | {"scores": asdict(value)} for (_, row, _), value in zip(batch, scores, strict=True)
                )
                progress.advance(len(batch))
    finally:
        interruption.reset()


def _dialogues(file: Path) -> Iterator[tuple[int, dict[str, Any], Dialogue]]:
    """Line number, row and dialogue, which ends with the assistant's message."""
    from llama2_chat.errors import DataFormatError
    from llama2_chat.jsonl import read_rows

    for line, row in read_rows(file):
        try:
            dialogue = Dialogue.from_row(row)
        except ValueError as problem:
            raise DataFormatError(file, line, str(problem)) from problem
        if dialogue.messages[-1].role != "assistant":
            raise DataFormatError(file, line, "a dialogue to be scored ends with the assistant's message")
        yield line, row, dialogue
