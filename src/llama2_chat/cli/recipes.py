"""`llama2-chat recipes` and `llama2-chat validate`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="The recipes that come with the package.", no_args_is_help=True)


@app.command("list")
def list_recipes() -> None:
    """Name and first line of each packaged recipe."""
    from llama2_chat.pipeline.recipe import packaged_recipes

    for name, file in packaged_recipes().items():
        first = file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        typer.echo(f"{name}: {first}")


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A packaged recipe, or a recipe file")],
    expanded: Annotated[
        bool, typer.Option("--expanded", help="With `iterations` written out as stages, without comments")
    ] = False,
) -> None:
    """Print a recipe."""
    from llama2_chat.pipeline.iterations import expand_iterations
    from llama2_chat.pipeline.recipe import find_recipe
    from llama2_chat.pipeline.yaml_files import dump, read_mapping

    file = find_recipe(name)
    text = (
        dump(expand_iterations(read_mapping(file), file.parent))
        if expanded
        else file.read_text(encoding="utf-8")
    )
    typer.echo(text, nl=False)


@app.command()
def copy(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="A new file")],
) -> None:
    """Copy a recipe to change it; a base model or data that comes with it is named by its full path."""
    from llama2_chat.errors import OutputFolderError
    from llama2_chat.files import write_text
    from llama2_chat.pipeline.recipe import find_recipe
    from llama2_chat.pipeline.run_directory import ensure_writable

    if destination.exists():
        raise OutputFolderError(f"{destination}: exists already; name a new file")
    ensure_writable(destination.parent)
    file = find_recipe(name)
    text = file.read_text(encoding="utf-8")

    def full(line: re.Match[str]) -> str:
        beside = (file.parent / line[2]).resolve()
        return line[1] + (str(beside) if beside.exists() else line[2])

    text = re.sub(r"^((?:base_model|  [\w.-]+): *)([^\s#{]+)", full, text, flags=re.MULTILINE)
    write_text(destination, text)
    typer.echo(f"{destination}: a copy of {name}; run it with `llama2-chat run {destination}`")


def validate(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the recipes' JSON Schema, for editors")
    ] = False,
) -> None:
    """Check a recipe and report everything that is wrong with it."""
    if schema:
        from llama2_chat.pipeline.schema import recipe_schema

        typer.echo(json.dumps(recipe_schema(), indent=2))
        return
    from llama2_chat.errors import UserInputError
    from llama2_chat.pipeline.recipe import load_recipe

    if recipe is None:
        raise UserInputError("validate: name a recipe, or give --schema")
    loaded = load_recipe(recipe, overrides or [])
    typer.echo(f"{recipe}: valid; stages {', '.join(loaded.stages)}")
