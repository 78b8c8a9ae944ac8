"""`llama2-chat data`: check files, look at what would be trained, import other formats."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from llama2_chat.errors import MissingFileError, UserInputError

app = typer.Typer(help="Check, show and import data files.", no_args_is_help=True)
_PROBLEMS_SHOWN = 20


class Kind(str, Enum):  # noqa: UP042 - typer shows the values of such an enumeration
    """What a file holds."""

    dialogues = "dialogues"
    preferences = "preferences"
    prompts = "prompts"


class Domain(str, Enum):  # noqa: UP042
    """What a preference was about."""

    helpfulness = "helpfulness"
    safety = "safety"


class Format(str, Enum):  # noqa: UP042
    """A format that can be imported."""

    hh_rlhf = "hh-rlhf"


class ChatFormatName(str, Enum):  # noqa: UP042
    """How messages become tokens."""

    llama2 = "llama2"
    tokenizer = "tokenizer"


class LossPolicyName(str, Enum):  # noqa: UP042
    """Which answers are trained."""

    all_answers = "all_answers"
    last_answer = "last_answer"


_File = Annotated[Path, typer.Argument(metavar="FILE", help="JSONL, or JSONL packed as .gz")]


@app.command()
def check(file: _File, kind: Annotated[Kind, typer.Option(help="What the rows are")]) -> None:
    """Read every row; print counts and what is wrong, with line numbers."""
    from llama2_chat.dialogue import Dialogue, Preference, Prompt
    from llama2_chat.jsonl import read_rows

    _must_exist(file)
    row_type: Any = {"dialogues": Dialogue, "preferences": Preference, "prompts": Prompt}[kind.value]
    counts: Counter[str] = Counter()
    problems: list[str] = []
    for number, row in read_rows(file):
        try:
            counts.update(_features(row_type.from_row(row)))
        except ValueError as problem:
            problems.append(f"{file}:{number}: {problem}")
    for name, count in sorted(counts.items()):
        typer.echo(f"{name}: {count}")
    if problems:
        shown = "\n".join(problems[:_PROBLEMS_SHOWN])
        more = f"\n(and {len(problems) - _PROBLEMS_SHOWN} more)" if len(problems) > _PROBLEMS_SHOWN else ""
        raise UserInputError(f"{len(problems)} rows cannot be used\n{shown}{more}")
    if not counts:
        raise UserInputError(f"{file}: holds no row")


def _features(row: Any) -> Iterator[str]:
    """What is counted of one row."""
    yield "rows"
    messages = row.messages if hasattr(row, "messages") else row.prompt
    contents = [message.content for message in messages]
    if hasattr(row, "chosen"):
        contents += [row.chosen, row.rejected]
        yield f"rating: {row.rating or 'none (margin 0)'}"
        yield f"safe (chosen, rejected): {row.chosen_safe}, {row.rejected_safe}"
        if row.chosen == row.rejected:
            yield "chosen equal to rejected"
    else:
        yield f"is_safety: {row.is_safety}"
    yield f"user turns: {sum(message.role == 'user' for message in messages)}"
    if messages[0].role == "system":
        yield "with system message"
    if not all(contents):
        yield "with an empty content"
    yield f"source: {row.source or 'none'}"


@app.command()
def show(
    file: _File,
    tokenizer: Annotated[Path, typer.Option(help="Model or tokenizer folder")],
    chat_format: Annotated[ChatFormatName, typer.Option()] = ChatFormatName.llama2,
    loss_policy: Annotated[LossPolicyName, typer.Option()] = LossPolicyName.all_answers,
    as_json: Annotated[
        bool, typer.Option("--json", help="One line a dialogue: input_ids, loss_mask")
    ] = False,
) -> None:
    """Print dialogues with their trained tokens in colour."""
    from llama2_chat.chat_format import build_chat_format
    from llama2_chat.jsonl import read_dialogues
    from llama2_chat.tokenization import tokenize_dialogue
    from llama2_chat.tokenizers import load_tokenizer

    _must_exist(file)
    loaded = load_tokenizer(tokenizer)
    format_ = build_chat_format(chat_format.value, loaded)
    for dialogue in read_dialogues(file):
        tokenized = tokenize_dialogue(dialogue.messages, format_, loss_policy.value)
        if as_json:
            typer.echo(
                json.dumps(
                    {"input_ids": tokenized.input_ids, "loss_mask": [int(m) for m in tokenized.loss_mask]}
                )
            )
        else:
            _print_coloured(loaded, tokenized.input_ids, tokenized.loss_mask)


def _print_coloured(tokenizer: Any, ids: list[int], mask: list[bool]) -> None:
    """Runs of tokens, the trained ones green and underlined; control tokens by name."""
    from itertools import groupby

    from rich.console import Console
    from rich.text import Text

    names = {tokenizer.bos_id: "<s>", tokenizer.eos_id: "</s>"}
    line = Text()
    for (trained, control), group in groupby(
        zip(ids, mask, strict=True), key=lambda pair: (pair[1], names.get(pair[0]))
    ):
        members = [token for token, _ in group]
        text = control * len(members) if control else tokenizer.decode(members)
        line.append(text, style="green underline" if trained else "dim")
        line.append(" ")
    Console(highlight=False).print(line, soft_wrap=True)


@app.command("import")
def import_file(
    format_: Annotated[Format, typer.Argument(metavar="FORMAT", help="hh-rlhf")],
    input_file: Annotated[Path, typer.Argument(metavar="INPUT")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="JSONL, .gz if the name ends so")],
    kind: Annotated[Kind, typer.Option(help="What to make of the rows")],
    domain: Annotated[Domain | None, typer.Option(help="safety tags prompts and dialogues is_safety")] = None,
) -> None:
    """Convert a data set of another format; says how many rows were dropped and why."""
    from llama2_chat.data_import import ImportReport, import_hh_rlhf
    from llama2_chat.jsonl import write_rows
    from llama2_chat.pipeline.run_directory import ensure_writable

    _must_exist(input_file)
    ensure_writable(output.parent)
    report = ImportReport()
    rows = import_hh_rlhf(
        input_file, kind=kind.value, domain=None if domain is None else domain.value, report=report
    )
    write_rows(output, (row.to_row() for row in rows))
    typer.echo(f"{output}: {report}")


def _must_exist(file: Path) -> None:
    if not file.is_file():
        raise MissingFileError(f"{file}: no such file")
