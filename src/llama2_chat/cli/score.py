"""`llama2-chat score`: reward scores for every dialogue of a file."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from llama2_chat.dialogue import Dialogue
from llama2_chat.errors import MissingFileError, UserInputError

_ROWS_AT_ONCE = 256


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
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Write each input row plus `scores`, in order."""
    if not input_file.exists():
        raise MissingFileError(f"{input_file}: no such file")
    if not 0 < safety_threshold < 1:
        raise UserInputError(f"--safety-threshold: {safety_threshold} is not between 0 and 1")
    from dataclasses import asdict

    from llama2_chat.jsonl import count_rows, write_rows
    from llama2_chat.pipeline.run_directory import ensure_writable
    from llama2_chat.progress import track
    from llama2_chat.reward.scoring import RewardScorer

    total = sum(1 for _ in _dialogues(input_file))
    ensure_writable(output.parent)
    scorer = RewardScorer.from_pretrained(
        helpfulness, safety, safety_threshold=safety_threshold, device=device
    )
    waiting = _dialogues(input_file)
    with track("scoring", total=total, unit="dialogues") as progress:

        def scored() -> Iterator[dict[str, Any]]:
            while batch := list(islice(waiting, _ROWS_AT_ONCE)):
                dialogues = [dialogue for _, dialogue in batch]
                scores = scorer.score([d.messages for d in dialogues], [d.is_safety for d in dialogues])
                for (row, _), value in zip(batch, scores, strict=True):
                    yield row | {"scores": asdict(value)}
                progress.advance(len(batch))

        write_rows(output, scored())
    typer.echo(f"{output}: scores of {count_rows(output)} dialogues")


def _dialogues(file: Path) -> Iterator[tuple[dict[str, Any], Dialogue]]:
    """Each row with its dialogue, which ends with the assistant's message."""
    from llama2_chat.errors import DataFormatError
    from llama2_chat.jsonl import read_rows

    for line, row in read_rows(file):
        try:
            dialogue = Dialogue.from_row(row)
        except ValueError as problem:
            raise DataFormatError(file, line, str(problem)) from problem
        if dialogue.messages[-1].role != "assistant":
            raise DataFormatError(file, line, "a dialogue to be scored ends with the assistant's message")
        yield row, dialogue
