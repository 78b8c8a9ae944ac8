"""`llama2-chat evaluate attention | instructions`: what policies do over the turns of a dialogue."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llama2_chat.cli.options import Device
from llama2_chat.errors import MissingFileError, UserInputError

if TYPE_CHECKING:
    from llama2_chat.settings import RunSettings

_Policy = Annotated[Path, typer.Argument(help="Policy folder")]
_Compare = Annotated[
    list[Path] | None,
    typer.Option(help="Another policy, on the same dialogues and side by side; may be repeated"),
]
_GgufFile = Annotated[
    str | None, typer.Option(help="Name of a GGUF file in MODEL, which then speaks its own chat template")
]


def attention(
    model: _Policy,
    dialogues: Annotated[
        Path,
        typer.Argument(
            metavar="DIALOGUES.jsonl",
            help="Dialogues with answers; the system message, or a row's `instruction`, is what is to be kept",
        ),
    ],
    output_dir: Annotated[
        Path, typer.Option(help="Gets evaluation.json, evaluation.md, attention.jsonl and figures/")
    ],
    compare: _Compare = None,
    bin_size: Annotated[int, typer.Option(min=1, help="Most neighbouring tokens in a bin")] = 8,
    bin_rule: Annotated[
        Literal["mean", "max"], typer.Option(help="What a bin shows of its tokens' activations")
    ] = "mean",
    most: Annotated[int | None, typer.Option(min=1, help="Only the first so many dialogues")] = None,
    pictures: Annotated[int, typer.Option(min=0, help="Dialogues that are drawn")] = 3,
    gguf_file: _GgufFile = None,
    device: Device = "auto",
) -> None:
    """The maximum attention of each answer to every earlier token, tokens binned, as figures and as data (Fig. 10)."""
    folders = [model, *(compare or [])]
    _check(folders, [dialogues], output_dir)
    from llama2_chat.evaluation.attention_evaluation import (
        BinSettings,
        attention_markdown,
        evaluate_attention,
    )
    from llama2_chat.evaluation.reward_evaluation import model_names
    from llama2_chat.files import write_json, write_text
    from llama2_chat.jsonl import write_rows
    from llama2_chat.report.attention_figures import draw_attention, draw_attention_to_instruction

    policies = dict(zip(model_names(folders), _settings(folders, gguf_file, device), strict=True))
    bins = BinSettings(bin_size, bin_rule)
    evaluation, rows = evaluate_attention(policies, dialogues, bins=bins, most=most)
    titles = {name: name for name in policies}
    drawn = {}
    if "attention_to_instruction" in evaluation:
        drawn["Attention to the instruction"] = "figures/attention_to_instruction.png"
        found = evaluation["attention_to_instruction"]
        draw_attention_to_instruction(found, titles, output_dir / drawn["Attention to the instruction"])
    for row in rows[:pictures]:
        title = f"The dialogue of line {row['line']}"
        drawn[title] = f"figures/attention_{row['line']}.png"
        draw_attention(row, titles, output_dir / drawn[title])
    markdown = attention_markdown(evaluation, drawn)
    typer.echo(attention_markdown(evaluation), nl=False)
    write_rows(output_dir / "attention.jsonl", rows)
    write_json(output_dir / "evaluation.json", evaluation)
    write_text(output_dir / "evaluation.md", markdown)
    typer.echo(f"{output_dir / 'evaluation.md'}: table and figures; attention.jsonl: every number", err=True)


def instructions(
    model: _Policy,
    dialogues: Annotated[
        Path, typer.Argument(metavar="DIALOGUES.jsonl", help="Their user messages are put to the policy")
    ],
    instructions: Annotated[
        Path,
        typer.Argument(metavar="INSTRUCTIONS.jsonl", help="What is to be kept, each row with its `check`"),
    ],
    output_dir: Annotated[
        Path, typer.Option(help="Gets evaluation.json, evaluation.md, conversations-N.jsonl and figures/")
    ],
    compare: _Compare = None,
    checker: Annotated[
        Literal["programs", "testbed"],
        typer.Option(
            help="Who says whether an answer keeps it: the instructions' checks, or the testbed's oracle"
        ),
    ] = "programs",
    place: Annotated[
        Literal["first_user", "system"], typer.Option(help="Where the instruction stands")
    ] = "first_user",
    turns: Annotated[
        int | None,
        typer.Option(
            min=1, help="Questions of each conversation, with those of the next dialogues if need be"
        ),
    ] = None,
    per_dialogue: Annotated[int, typer.Option(min=1, help="Instructions tried with each dialogue")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 512,
    token_budget: Annotated[int, typer.Option(min=1, help="Most tokens held in one batch's cache")] = 65536,
    gguf_file: _GgufFile = None,
    device: Device = "auto",
) -> None:
    """How long an instruction of the first turn is kept: every answer checked, policies side by side (Table 30)."""
    folders = [model, *(compare or [])]
    _check(folders, [dialogues, instructions], output_dir)
    from llama2_chat.chat_format import check_takes_system
    from llama2_chat.evaluation.instruction_report import compliance_figures, compliance_markdown
    from llama2_chat.evaluation.instructions import obey, read_tasks
    from llama2_chat.evaluation.reward_evaluation import model_names
    from llama2_chat.files import write_json, write_text
    from llama2_chat.generation.transformers_engine import load_engine
    from llama2_chat.jsonl import write_rows
    from llama2_chat.report.instruction_figures import draw_compliance
    from llama2_chat.settings import SamplingConfig

    tasks = read_tasks(dialogues, instructions, checker=checker, per_dialogue=per_dialogue, turns=turns)
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=max_new_tokens, token_budget=token_budget)
    found = {}
    policies = zip(model_names(folders), _settings(folders, gguf_file, device), strict=True)
    for number, (name, settings) in enumerate(policies, start=1):
        engine, chat_format = load_engine(settings.base_model.path, settings)
        if place == "system":
            check_takes_system(chat_format, f"{name}: --place system: the instruction")
        typer.echo(f"{name}: {len(tasks)} conversations", err=True)
        found[name] = obey(engine, chat_format, tasks, checker=checker, place=place, sampling=sampling)
        write_rows(output_dir / f"conversations-{number}.jsonl", (one.to_row() for one in found[name]))
    figures = compliance_figures(found)
    draw_compliance(figures, output_dir / "figures" / "compliance.png")
    typer.echo(compliance_markdown(figures), nl=False)
    write_json(
        output_dir / "evaluation.json", {**figures, "checker": checker, "place": place, "turns": turns}
    )
    pictures = {"Instructions kept over the turns": "figures/compliance.png"}
    write_text(output_dir / "evaluation.md", compliance_markdown(figures, pictures))
    typer.echo(
        f"{output_dir / 'evaluation.md'}: tables and a figure; evaluation.json: every number", err=True
    )


def _settings(folders: Sequence[Path], gguf_file: str | None, device: str) -> list[RunSettings]:
    """For each policy settings whose base model it is; the GGUF file is the first one's."""
    from llama2_chat.models import chat_format_of
    from llama2_chat.settings import BaseModelSource, RunSettings

    found = []
    for number, folder in enumerate(folders):
        packed = gguf_file if number == 0 else None
        found.append(
            RunSettings(
                base_model=BaseModelSource(path=str(folder), gguf_file=packed),
                chat_format=chat_format_of(folder) if packed is None else "tokenizer",
                device=device,
            )
        )
    return found


def _check(folders: Sequence[Path], files: Sequence[Path], output_dir: Path) -> None:
    """What can be told without loading anything, so that nobody waits for a model to learn of a typing error."""
    from llama2_chat.pipeline.run_directory import ensure_writable

    for file in files:
        if not file.exists():
            raise MissingFileError(f"{file}: no such file")
        if file.is_dir():
            raise UserInputError(f"{file}: a folder; name a file (*.jsonl or *.jsonl.gz) in it")
    seen: set[Path] = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise UserInputError(f"{folder}: the same policy twice; name each once")
        seen.add(folder.resolve())
    # Before minutes of work rather than after; the folder itself is made only when there are results.
    ensure_writable(next(place for place in (output_dir, *output_dir.absolute().parents) if place.exists()))
