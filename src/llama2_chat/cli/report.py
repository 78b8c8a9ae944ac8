"""`llama2-chat report`: a run's report, or the comparison of two runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run directory, finished or not")],
    other: Annotated[
        Path | None, typer.Argument(metavar="[OTHER_RUN_DIR]", help="A second one to compare it with")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="The comparison's file; default RUN_DIR/report-vs-NAME.html"),
    ] = None,
) -> None:
    """Write a run's report.html again, or compare two runs; prints the file's path."""
    from llama2_chat.errors import UserInputError

    if other is None:
        if output is not None:
            raise UserInputError("--output goes with two runs; a run's own report is RUN_DIR/report.html")
        from llama2_chat.report.page import write_report

        typer.echo(str(write_report(run)))
        return
    from llama2_chat.report.comparison import write_comparison

    typer.echo(str(write_comparison(run, other, output)))
