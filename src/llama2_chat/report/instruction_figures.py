"""How long instructions are kept, as PNG: overall and for each constraint, policies side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from llama2_chat.report.drawing import COLOURS, panels

_MARKERS = ("o", "s", "^", "D", "v", "P")
_COLUMNS = 3
_PANEL = (3.6, 2.6)


def draw_compliance(figures: Mapping[str, Any], file: Path) -> None:
    """A panel for all instructions together and one for each constraint: share kept over the turns.

    Args:
        figures: As `evaluation.instruction_report.compliance_figures` gives them.
    """
    models = figures["models"]
    names = list(figures["compliance"][models[0]])
    if len(names) == 2:
        names = names[:1]  # one constraint alone is the same as all
    columns = min(_COLUMNS, len(names))
    rows = -(-len(names) // columns)
    size = (max(columns * _PANEL[0], 5.5), rows * _PANEL[1] + 0.4)
    with panels(file, rows, columns, size, sharex=True, sharey=True) as grid:
        places = [axes for row in grid for axes in row]
        for axes, name in zip(places, names, strict=False):
            for number, model in enumerate(models):
                _line(axes, figures["compliance"][model][name], number, model)
            axes.set_title(name)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
            axes.set_ylim(-0.03, 1.03)
        for axes in places[len(names) :]:
            axes.set_visible(False)
        for axes in grid[-1]:
            axes.set_xlabel("turn")
        places[0].legend(loc="best")


def _line(axes: Axes, by_turn: Mapping[str, Mapping[str, float]], number: int, label: str) -> None:
    turns, rows = [int(turn) for turn in by_turn], list(by_turn.values())
    colour = COLOURS[number % len(COLOURS)]
    marker = _MARKERS[number % len(_MARKERS)]
    axes.plot(turns, [row["mean"] for row in rows], color=colour, marker=marker, ms=3.5, label=label)
    axes.fill_between(
        turns, [row["low"] for row in rows], [row["high"] for row in rows], color=colour, alpha=0.15, lw=0
    )
