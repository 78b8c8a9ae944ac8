"""`llama2-chat run`: a whole recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

_WIDTH = 200


def run(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a packaged one")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example seed=1")
    ] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Run directory; default runs/NAME")] = None,
    first: Annotated[str | None, typer.Option("--from", metavar="STAGE", help="Start at this stage")] = None,
    last: Annotated[
        str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage")
    ] = None,
    force: Annotated[
        list[str] | None, typer.Option(metavar="STAGE", help="Run it again though it is done")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop")] = False,
    write_configs: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With --dry-run: write each stage's own configuration")
    ] = None,
) -> None:
    """Run a recipe, or continue it: what is done and unchanged is not run again."""
    from llama2_chat import interruption
    from llama2_chat.errors import UserInputError
    from llama2_chat.pipeline.run import Selection, run_recipe

    selection = Selection(first, last, tuple(force or ()))
    if write_configs is not None and not dry_run:
        raise UserInputError("--write-configs goes with --dry-run")
    if dry_run:
        _plan(recipe, overrides or [], output_dir, selection, write_configs)
        return
    interruption.install_handlers()
    for folder in run_recipe(recipe, overrides or [], output_dir, selection):
        typer.echo(f"{folder}: done; see {folder / 'summary.json'}")


def _plan(
    recipe_name: str, overrides: list[str], output_dir: Path | None, selection: object, folder: Path | None
) -> None:
    from rich.console import Console
    from rich.table import Table

    from llama2_chat.pipeline.plan import make_plan, write_configs
    from llama2_chat.pipeline.recipe import load_recipe
    from llama2_chat.pipeline.run import Selection
    from llama2_chat.pipeline.run_directory import ensure_writable

    assert isinstance(selection, Selection)
    recipe = load_recipe(recipe_name, overrides)
    selection.check(recipe)
    root = output_dir or Path("runs") / recipe.head.name
    plan = make_plan(recipe, root, selection)
    table = Table(*plan.rows[0], title=f"{recipe.head.name} into {root}", title_justify="left")
    for row in plan.rows:
        table.add_row(*row.values())
    # Where there is no terminal the table gets the room that it needs.
    console = Console(markup=False, width=None if sys.stdout.isatty() else _WIDTH)
    console.print(table)
    if plan.flops is not None:
        console.print(
            f"times are lower bounds, at the {plan.flops / 1e9:,.0f} GFLOP/s that a matrix product reaches here"
        )
    for note in plan.notes:
        console.print(note)
    count = 1
    for values in recipe.head.sweep.values():
        count *= len(values)
    if recipe.head.sweep:
        console.print(f"sweep: {count} runs")
    if folder is not None:
        ensure_writable(folder)
        for file in write_configs(recipe, root, folder):
            typer.echo(str(file))
