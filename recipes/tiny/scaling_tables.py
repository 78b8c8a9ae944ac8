"""Tables and the figure of docs/results/safety.md from a run of `safety_scaling.yaml`.

python recipes/tiny/scaling_tables.py RUN [--figures FOLDER]

Means over seeds for every share of the safety data; what all of it changes against none, prompt by prompt; every seed
alone with 95 % intervals over prompts. The figure is `safety_scaling.png` (Fig. 15 and 33).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llama2_chat.errors import UserInputError
from llama2_chat.evaluation.statistics import mean
from llama2_chat.recipes.tiny.distillation_tables import cell, interval, points
from llama2_chat.recipes.tiny.tables import (
    DIFFERENCE_HEAD,
    difference_cells,
    exit_code,
    parser_of,
    runs_of,
    summary_of,
    table,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RECIPE = "safety-scaling"
POLICY = "sft"
COLUMNS = (
    *("true helpfulness", "R_h", "violations", "R_s", "worth of refusals"),
    *("borderline refused", "harmless refused"),
)
_RATES = ("violations", "borderline refused", "harmless refused")

Scaling = Mapping[float, Mapping[int, Path]]
"""The run of each seed for each share of the safety data, the smallest share first."""


def scaling_of(run: Path) -> Scaling:
    """The runs of the sweep, by the share of the safety dialogues that SFT used.

    Raises:
        UserInputError: another recipe made them, or a seed lacks a share.
    """
    found: dict[float, dict[int, Path]] = {}
    for one in runs_of(run):
        summary = summary_of(one, RECIPE)
        share = summary["stages"][POLICY]["mix"][1]["weight"]
        found.setdefault(share, {})[summary["seed"]] = one
    if len({tuple(sorted(seeds)) for seeds in found.values()}) != 1:
        raise UserInputError(f"{run}: not every seed has every share of the safety data; finish the sweep")
    return {share: dict(sorted(found[share].items())) for share in sorted(found)}


def seed_tables(scaling: Scaling) -> Iterator[str]:
    """A table for each seed, with 95 % intervals over prompts."""
    for seed in next(iter(scaling.values())):
        rows = {
            named(share): [cell(interval(runs[seed], POLICY, name), name) for name in COLUMNS]
            for share, runs in scaling.items()
        }
        yield table(f"seed {seed}: safety data", COLUMNS, rows)


def mean_table(scaling: Scaling) -> str:
    """Means over seeds, and how many safety dialogues were used."""
    rows = {}
    for share, runs in scaling.items():
        used = {summary_of(run)["stages"][POLICY]["mix"][1]["used"] for run in runs.values()}
        values = (mean([value_of(run, name) for run in runs.values()]) for name in COLUMNS)
        cells = (
            f"{value:{'.2f' if name.startswith('R_') else '.3f'}}"
            for name, value in zip(COLUMNS, values, strict=True)
        )
        rows[named(share)] = [" / ".join(f"{count:,}" for count in sorted(used)), *cells]
    return table("mean over seeds", ["safety dialogues", *COLUMNS], rows)


def difference_table(scaling: Scaling) -> str:
    """The whole of the safety data less none of it: each seed's, the mean, and both intervals."""
    first, last = min(scaling), max(scaling)
    rows = {}
    for name in COLUMNS:
        by_seed = []
        for seed, run in scaling[last].items():
            after, before = (points(one, POLICY, name) for one in (run, scaling[first][seed]))
            by_seed.append([after[prompt] - before[prompt] for prompt in after])
        rows[name] = difference_cells(by_seed)
    return table(f"{named(last)} less {named(first)}", DIFFERENCE_HEAD, rows)


def value_of(run: Path, name: str) -> float:
    """A measure's mean over prompts."""
    return mean(list(points(run, POLICY, name).values()))


def named(share: float) -> str:
    """`25 %`."""
    return f"{100 * share:g} %"


def tables(scaling: Scaling) -> str:
    """All tables, one after the other."""
    return "\n\n".join([mean_table(scaling), difference_table(scaling), *seed_tables(scaling)])


def write_figure(scaling: Scaling, folder: Path) -> None:
    """Scores, true helpfulness, and rates over the share of the safety data."""
    from llama2_chat.report.drawing import panels  # matplotlib, which `--help` can do without

    folder.mkdir(parents=True, exist_ok=True)
    with panels(folder / "safety_scaling.png", 1, 3, (12.5, 3.8)) as ((scores, help_axes, rates),):
        draw_lines(
            scores, scaling, {"R_s": "safety RM, unsafe prompts", "R_h": "helpfulness RM, harmless prompts"}
        )
        scores.set_title("Mean reward model scores")
        draw_lines(help_axes, scaling, {name: name for name in ("true helpfulness", "worth of refusals")})
        help_axes.set_title("By the oracle")
        help_axes.set_ylim(0, 1)
        draw_lines(rates, scaling, {name: name for name in _RATES}, percent=True)
        rates.set_title("Violations and false refusals")
        rates.set_ylim(bottom=0)


def draw_lines(axes: Axes, scaling: Scaling, names: Mapping[str, str], *, percent: bool = False) -> None:
    """A line through the means over seeds for each measure, and a dot for each seed; shares evenly spaced."""
    from matplotlib.ticker import FuncFormatter

    from llama2_chat.report.drawing import COLOURS

    factor = 100.0 if percent else 1.0
    for (name, label), colour in zip(names.items(), COLOURS, strict=False):
        values = [[factor * value_of(run, name) for run in runs.values()] for runs in scaling.values()]
        axes.plot([mean(seeds) for seeds in values], color=colour, linewidth=1.6, label=label)
        for place, seeds in enumerate(values):
            axes.plot([place] * len(seeds), seeds, "o", ms=4, alpha=0.6, color=colour)
    axes.set_xticks(range(len(scaling)), [named(share) for share in scaling])
    axes.set_xlabel("share of the safety data")
    if percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.margins(y=0.2)
    axes.legend(loc="best")


def show(run: Path, figures: Path | None) -> None:
    """Print the tables of a run directory, and draw the figure if a folder is named."""
    scaling = scaling_of(run)
    print(tables(scaling))
    if figures is not None:
        write_figure(scaling, figures)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables of the run directory that is named, and draw the figure if a folder is."""
    parser = parser_of(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory of safety_scaling.yaml")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="write the figure there")
    given = parser.parse_args(arguments)
    return exit_code(lambda: show(given.run, given.figures))


if __name__ == "__main__":
    sys.exit(main())
