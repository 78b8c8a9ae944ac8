"""Pictures of what policies attend to in a dialogue (Fig. 10), as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm

from llama2_chat.report.drawing import COLOURS, INK, panels

_WIDTH = 9.0
_ROW_HEIGHT = 0.14
_MARK = COLOURS[1]
_SHADES = PowerNorm(0.5, vmin=0.0, vmax=1.0)
"""The square root: what lies turns back is weak beside an answer's own turn, and would be white."""


def draw_attention(row: Mapping[str, Any], titles: Mapping[str, str], file: Path) -> None:
    """One dialogue: a panel for each policy, a row for each answer, a column for each bin of tokens.

    Args:
        row: As `evaluation.attention_evaluation` gives it.
        titles: Each policy's title by its name; these policies are drawn, in this order.
    """
    answers = len(next(iter(row["binned"].values())))
    height = 0.5 + len(titles) * (0.55 + _ROW_HEIGHT * max(answers, 6))
    with panels(file, len(titles), 1, (_WIDTH, height), sharex=True) as grid:
        image: Any = None
        for (axes,), (name, title) in zip(grid, titles.items(), strict=True):
            values = np.array(row["binned"][name], dtype=float)  # None becomes NaN, which stays white
            image = axes.imshow(values, aspect="auto", cmap="Blues", norm=_SHADES, interpolation="nearest")
            axes.set_title(title)
            axes.set_ylabel("turn of the answer")
            _mark(axes, row["bins"], answers)
        grid[-1][0].set_xlabel("turn of the tokens that are attended to; orange: the instruction")
        colours = image.figure.colorbar(image, ax=list(grid[:, 0]), fraction=0.03, pad=0.01)
        colours.set_label("maximum attention activation")
        colours.outline.set_visible(False)


def _mark(axes: Axes, bins: Sequence[Mapping[str, Any]], answers: int) -> None:
    """Turns along both axes, the instruction's bins framed."""
    starts = [place for place, one in enumerate(bins) if place == 0 or one["turn"] != bins[place - 1]["turn"]]
    every = -(-len(starts) // 20)
    shown = starts[::every]
    axes.set_xticks([start - 0.5 for start in shown], [str(bins[start]["turn"]) for start in shown])
    axes.tick_params(axis="x", labelbottom=True, length=3, color=INK)
    axes.set_yticks(range(0, answers, every), [str(number + 1) for number in range(0, answers, every)])
    axes.grid(visible=False)
    marked = [place for place, one in enumerate(bins) if one["role"] == "instruction"]
    if marked:
        ends = (marked[0] - 0.5, marked[-1] + 0.5)
        axes.axvspan(*ends, fill=False, edgecolor=_MARK, linewidth=1.4)
        axes.plot(ends, [-0.5, -0.5], color=_MARK, linewidth=5, solid_capstyle="butt", clip_on=False)


def draw_attention_to_instruction(
    found: Mapping[str, Mapping[str, Mapping[str, float]]], titles: Mapping[str, str], file: Path
) -> None:
    """Attention to the instruction over the turns, a line with intervals for each policy."""
    with panels(file, 1, 1, (6.0, 3.4)) as ((axes,),):
        for colour, (name, title) in zip(COLOURS, titles.items(), strict=False):
            turns = [int(turn) for turn in found[name]]
            rows = list(found[name].values())
            axes.plot(turns, [row["mean"] for row in rows], marker="o", ms=4, color=colour, label=title)
            if all(row["count"] > 1 for row in rows):
                axes.fill_between(
                    turns,
                    [row["low"] for row in rows],
                    [row["high"] for row in rows],
                    color=colour,
                    alpha=0.2,
                    lw=0,
                )
        axes.set_ylim(0, None)
        axes.set_xticks(turns if len(turns) <= 20 else turns[:: -(-len(turns) // 20)])
        axes.set_xlabel("turn of the answer")
        axes.set_ylabel("attention to the instruction")
        axes.legend()
