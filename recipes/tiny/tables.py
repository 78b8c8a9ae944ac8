"""What the scripts that print the tables of docs/results/ share: tables, differences over seeds, the command line."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama2_chat.errors import MissingFileError, UserInputError
from llama2_chat.evaluation.statistics import mean, mean_interval
from llama2_chat.files import read_json

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""97.5 % quantile of Student's t for the mean over so many seeds."""

DIFFERENCE_HEAD = ("each seed", "mean", "over prompts", "over seeds")
"""The columns of `difference_cells`."""


def table(first: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {first} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join(lines)


def seed_interval(values: Sequence[float], style: str) -> str:
    """Student's interval of the mean over seeds."""
    if len(values) not in T_95:
        return "-"
    centre = mean(values)
    deviation = math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))
    half = T_95[len(values)] * deviation / math.sqrt(len(values))
    return f"{centre - half:{style}} to {centre + half:{style}}"


def difference_cells(by_seed: Sequence[Sequence[float]]) -> list[str]:
    """Paired differences of every seed, prompt by prompt: each seed's mean, the mean of these, both intervals."""
    means = [mean(seed) for seed in by_seed]
    over_prompts = mean_interval([difference for seed in by_seed for difference in seed])
    return [
        " / ".join(f"{value:+.3f}" for value in means),
        f"{mean(means):+.3f}",
        f"{over_prompts['low']:+.3f} to {over_prompts['high']:+.3f}",
        seed_interval(means, "+.3f"),
    ]


def runs_of(run: Path) -> list[Path]:
    """The runs of a sweep by seed, or the one run that there is.

    Raises:
        MissingFileError: none is finished.
    """
    runs = [file.parent for file in sorted(run.glob("sweep/*/summary.json"))]
    runs = runs or [file.parent for file in run.glob("summary.json")]
    if not runs:
        raise MissingFileError(f"{run}: no summary.json there or in sweep/*/; name a finished run")
    return runs


def summary_of(run: Path, *recipes: str) -> dict[str, Any]:
    """`summary.json` of a finished run.

    Args:
        recipes: The names of the recipes that may have made it; none: any.

    Raises:
        MissingFileError: there is none.
        UserInputError: it is damaged, or another recipe's.
    """
    file = run / "summary.json"
    try:
        found: dict[str, Any] = read_json(file)
        made_by = found["recipe"]
    except FileNotFoundError:
        raise MissingFileError(f"{file}: not there; name a finished run") from None
    except (ValueError, TypeError, KeyError) as error:
        raise UserInputError(f"{file}: not as a run writes it ({error!r}); run the recipe again") from None
    if recipes and made_by not in recipes:
        wanted = " or ".join(f'"{recipe}"' for recipe in recipes)
        raise UserInputError(f'{run}: the recipe is "{made_by}", not {wanted}')
    return found


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with a script's docstring, its lines as they are."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def exit_code(command: Callable[[], int | None]) -> int:
    """Run a script's command: its own exit code, 0 if it has none; 2 and one line on stderr for a user's mistake."""
    try:
        return command() or 0
    except UserInputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
