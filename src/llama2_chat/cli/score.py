"""`llama2-chat score`: reward scores for every dialogue of a file."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from llama2_chat.errors import MissingFileError

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
    from dataclasses import asdict

    from llama2_chat.errors import DataFormatError
    from llama2_chat.jsonl import count_rows, read_dialogues, read_rows, write_rows
    from llama2_chat.progress import track
    from llama2_chat.reward.scoring import RewardScorer

    for number, dialogue in enumerate(read_dialogues(input_file), start=1):
        if dialogue.messages[-1].role != "assistant":
            raise DataFormatError(
                input_file, number, "a dialogue to be scored ends with the assistant's message"
            )
    scorer = RewardScorer.from_pretrained(
        helpfulness, safety, safety_threshold=safety_threshold, device=device
    )
    dialogues = read_dialogues(input_file)
    rows = read_rows(input_file)
    with track("scoring", total=count_rows(input_file), unit="dialogues") as progress:

        def scored() -> object:
            while batch := list(islice(dialogues, _ROWS_AT_ONCE)):
                scores = scorer.score([d.messages for d in batch], [d.is_safety for d in batch])
                for (_, row), value in zip(islice(rows, len(batch)), scores, strict=True):
                    yield row | {"scores": asdict(value)}
                progress.advance(len(batch))

        write_rows(output, scored())  # type: ignore[arg-type]
    typer.echo(f"{output}: scores of {count_rows(output)} dialogues")
