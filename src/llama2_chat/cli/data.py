"""`llama2-chat data`: check files, look at what would be trained, import other formats."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llama2_chat.data_import import FORMATS, FormatName, Kind, Label, Split
from llama2_chat.dialogue import Domain
from llama2_chat.errors import UserInputError

if TYPE_CHECKING:
    from llama2_chat.tokenization import TokenizedDialogue
    from llama2_chat.tokenizers import ChatTokenizer

app = typer.Typer(
    help="Check, show and import data files (JSONL; *.gz is packed).",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL, or JSONL packed as .gz")],
    kind: Annotated[Kind, typer.Option(help="What the rows are")],
    max_errors: Annotated[int, typer.Option(min=1, help="How many unusable rows to name")] = 20,
) -> None:
    """Read every row; print counts and every row that cannot be used, with its line number."""
    from llama2_chat.data_check import check_file

    summary = check_file(file, kind, max_problems=max_errors)
    for line in summary.lines():
        typer.echo(line)
    if summary.unusable:
        rows = "1 row" if summary.unusable == 1 else f"{summary.unusable} rows"
        problems = list(summary.problems)
        if summary.unusable > len(problems):
            problems.append(f"and {summary.unusable - len(problems)} more; --max-errors shows more of them")
        raise UserInputError("\n".join([f"{rows} of {file} cannot be used:", *problems]))


@app.command()
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Dialogues: JSONL, or JSONL packed as .gz")],
    tokenizer: Annotated[str, typer.Option(metavar="DIR", help="Model or tokenizer folder, or hub id")],
    chat_format: Annotated[
        Literal["llama2", "tokenizer"], typer.Option(help="tokenizer: the tokenizer's own chat template")
    ] = "llama2",
    loss_policy: Annotated[
        Literal["all_answers", "last_answer"], typer.Option(help="Which answers are trained")
    ] = "all_answers",
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after this many dialogues")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One line a dialogue: input_ids, loss_mask")
    ] = False,
) -> None:
    """Print dialogues as the model is trained on them, the trained tokens in colour.

    Where there is no colour (a pipe, a file) trained tokens stand between ⟦ and ⟧.
    """
    from llama2_chat.jsonl import read_dialogues

    dialogues = read_dialogues(file)
    first = next(dialogues)  # a wrong file is reported before the tokenizer takes its time to load

    from llama2_chat.chat_format import build_chat_format
    from llama2_chat.tokenization import tokenize_dialogue
    from llama2_chat.tokenizers import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    format_ = build_chat_format(chat_format, loaded)
    for number, dialogue in enumerate(islice(chain([first], dialogues), limit), start=1):
        tokenized = tokenize_dialogue(dialogue.messages, format_, loss_policy)
        if as_json:
            mask = [int(trained) for trained in tokenized.loss_mask]
            typer.echo(json.dumps({"input_ids": tokenized.input_ids, "loss_mask": mask}))
        else:
            _print_dialogue(number, tokenized, loaded)


@app.command("import")
def import_file(
    format_: Annotated[FormatName, typer.Argument(metavar="FORMAT", help=", ".join(FORMATS))],
    input_file: Annotated[Path, typer.Argument(metavar="INPUT", help="Unpacked if the name ends in .gz")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="JSONL, packed if the name ends in .gz")],
    kind: Annotated[Kind, typer.Option(help="What to make of each row")],
    domain: Annotated[
        Domain | None,
        typer.Option(help="safety tags dialogues and prompts is_safety; default: the set's own"),
    ] = None,
    label: Annotated[
        Label | None, typer.Option(help="Only the rows that a labelled set calls so; default: both")
    ] = None,
    split: Annotated[
        Split | None, typer.Option(help="One of two parts that share no first user message; default: both")
    ] = None,
    held_out_share: Annotated[
        float | None, typer.Option(help="About what share is held out, with --split; default: 0.25")
    ] = None,
) -> None:
    """Convert a data set of another format; says how many rows were dropped and why."""
    from llama2_chat.data_import import ImportReport, import_rows
    from llama2_chat.jsonl import write_rows

    if output.resolve() == input_file.resolve():
        raise UserInputError(f"{output}: is the input file too; name another output")
    report = ImportReport()
    rows = import_rows(
        format_,
        input_file,
        kind=kind,
        domain=domain,
        label=label,
        split=split,
        held_out_share=held_out_share,
        report=report,
    )

    def written() -> Iterator[dict[str, object]]:
        row = None
        for row in rows:
            yield row.to_row()
        if row is None:
            raise UserInputError(f"{input_file}: nothing to write is left: {report}")

    write_rows(output, written())
    typer.echo(f"{output}: {report}")


def _print_dialogue(number: int, tokenized: TokenizedDialogue, tokenizer: ChatTokenizer) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    count, trained_count = len(tokenized.input_ids), sum(tokenized.loss_mask)
    line = Text(f"dialogue {number}: {count} tokens, {trained_count} trained\n", style="bold")
    for text, trained in _runs(tokenized, tokenizer):
        if console.color_system is None and trained:
            text = f"⟦{text}⟧"
        line.append(text, style="not bold green" if trained else "not bold dim")
    console.print(line, soft_wrap=True)


def _runs(tokenized: TokenizedDialogue, tokenizer: ChatTokenizer) -> Iterator[tuple[str, bool]]:
    """The text of each run of trained or untrained tokens, control pieces as they are named."""
    place, shown = 0, ""
    for trained, run in groupby(tokenized.loss_mask):
        place += len(list(run))
        # Decoded from the start: a run on its own would lose the space before its first word.
        text = tokenizer.decode(tokenized.input_ids[:place], keep_control=True)
        yield text[len(shown) :], trained
        shown = text
