"""Figures of results: dots with intervals, lines over turns, KL against reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.ticker import FuncFormatter, MaxNLocator

from llama2_chat.report.drawing import COLOURS, INK, SOFT, drawing
from llama2_chat.report.markup import Html
from llama2_chat.report.measures import Estimate, Measure

_FAR = 4.0
_LEGEND_ROW = 14
_STYLES = ("-", "--", ":")
_TIGHT: dict[str, Any] = {"handletextpad": 0.4, "columnspacing": 1.2, "labelspacing": 0.25, "borderpad": 0.2}


def draw_dots(
    title: str,
    rows: Sequence[tuple[str, Sequence[Estimate | None]]],
    measure: Measure,
    *,
    series: Sequence[str] = ("",),
    marks: Sequence[float | None] = (),
    lines: Mapping[str, float] | None = None,
) -> Html:
    """One row for each name, in it one dot with its interval for each of `series`.

    Args:
        marks: For each row a second value, drawn as a hollow mark (for example what is attainable).
        lines: Values for all rows by name, drawn as dotted verticals.
    """
    per_row = 22 if len(series) == 1 else 14 * len(series)
    extra = 20 if len(series) > 1 or marks or lines else 0
    left = 14 + 5.3 * max((len(_short(name)) for name, _ in rows), default=0)
    factor = 100.0 if measure.percent else 1.0
    arrow = {"higher": " (higher is better)", "lower": " (lower is better)", None: ""}[measure.better]
    height = 46 + per_row * len(rows) + extra
    with drawing(title + arrow, height=height, left=left, bottom=22 + extra) as made:
        axes = made.axes
        for place, name in enumerate(series):
            shift = (place - (len(series) - 1) / 2) * 0.32
            points = [(y + shift, row[1][place]) for y, row in enumerate(rows)]
            _dots(axes, [(y, e) for y, e in points if e is not None], factor, COLOURS[place], name)
        shown = [(y, mark * factor) for y, mark in enumerate(marks) if mark is not None]
        if shown:
            axes.plot(
                [x for _, x in shown],
                [y for y, _ in shown],
                "D",
                mfc="none",
                mec=SOFT,
                ms=5,
                label="attainable",
            )
        for (name, value), style in zip((lines or {}).items(), (":", "--", "-."), strict=False):
            axes.axvline(value * factor, color=SOFT, linewidth=1, linestyle=style, label=name)
        axes.set_yticks(range(len(rows)), [_short(name) for name, _ in rows])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        if measure.percent:
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axes.margins(x=0.08)
        if extra:
            made.figure.legend(loc="lower left", ncols=4, **_TIGHT)
    return made.svg


def _dots(
    axes: Axes, points: Sequence[tuple[float, Estimate]], factor: float, colour: str, label: str
) -> None:
    ends = [
        (y, e.low * factor, e.high * factor)
        for y, e in points
        if e.low is not None and e.high is not None and e.low != e.high
    ]
    for y, low, high in ends:
        axes.plot([low, high], [y, y], color=colour, linewidth=2.2, alpha=0.45, solid_capstyle="round")
    values = [e.value * factor for _, e in points]
    axes.plot(values, [y for y, _ in points], "o", color=colour, ms=5.5, label=label)


def draw_lines(
    title: str,
    lines: Sequence[tuple[str, Sequence[tuple[float, Estimate]]]],
    *,
    xlabel: str,
    percent: bool = False,
) -> Html:
    """One line with intervals for each name, over numbers such as turns."""
    factor = 100.0 if percent else 1.0
    legend = _LEGEND_ROW * -(-len(lines) // 2)
    with drawing(title, height=240 + legend, bottom=38 + legend) as made:
        axes = made.axes
        for place, (name, points) in enumerate(lines):
            colour, style = COLOURS[place % len(COLOURS)], _STYLES[place // len(COLOURS) % len(_STYLES)]
            x, y = [turn for turn, _ in points], [e.value * factor for _, e in points]
            axes.plot(x, y, marker="o", linestyle=style, color=colour, ms=4, label=_short(name))
            bounded = [(t, e.low, e.high) for t, e in points if e.low is not None and e.high is not None]
            for turn, low, high in bounded:
                axes.plot([turn, turn], [low * factor, high * factor], color=colour, linewidth=2, alpha=0.3)
        axes.set_xticks(sorted({turn for _, points in lines for turn, _ in points}))
        axes.set_xlabel(xlabel)
        if percent:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
            axes.set_ylim(-3, 103)
        made.figure.legend(loc="lower left", ncols=2, **_TIGHT)
    return made.svg


def draw_against(
    title: str, points: Sequence[tuple[str, Estimate, Estimate]], *, xlabel: str, ylabel: str
) -> tuple[Html, list[str]]:
    """One named point for each policy, joined in order; also the names of points too far off to be shown.

    A base model lies tens of nats from the rest, which would all fall on one spot beside it.
    """
    near = [point for point in points if not _is_far(point, points)]
    legend = _LEGEND_ROW * -(-len(near) // 2)
    with drawing(title, height=260 + legend, bottom=38 + legend) as made:
        axes = made.axes
        axes.plot(
            [x.value for _, x, _ in near], [y.value for _, _, y in near], color="#c9d1d9", linewidth=1.2
        )
        for place, (name, x, y) in enumerate(near):
            colour = COLOURS[place % len(COLOURS)]
            for value, low, high, across in (
                (y.value, x.low, x.high, True),
                (x.value, y.low, y.high, False),
            ):
                if low is not None and high is not None:
                    along, still = (low, high), (value, value)
                    axes.plot(
                        *((along, still) if across else (still, along)), color=colour, alpha=0.45, linewidth=2
                    )
            axes.plot(x.value, y.value, "o", color=colour, ms=6, label=f"{place + 1} {_short(name)}")
            axes.annotate(
                str(place + 1),
                (x.value, y.value),
                textcoords="offset points",
                xytext=(5, 5),
                color=colour,
                fontweight="bold",
            )
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.margins(0.1)
        made.figure.legend(loc="lower left", ncols=2, **_TIGHT)
    return made.svg, [name for name, *_ in points if name not in {n for n, *_ in near}]


def _is_far(point: tuple[str, Estimate, Estimate], points: Sequence[tuple[str, Estimate, Estimate]]) -> bool:
    others = [abs(x.value) for name, x, _ in points if name != point[0]]
    return len(others) >= 2 and abs(point[1].value) > _FAR * max(*others, 1e-9)


def draw_path(title: str, path: Sequence[tuple[float, float]], *, xlabel: str, ylabel: str) -> Html:
    """A path through two quantities over training, light where it begins and dark where it ends."""
    with drawing(title, height=276, bottom=38) as made:
        axes = made.axes
        x, y = [point[0] for point in path], [point[1] for point in path]
        axes.plot(x, y, color="#b9c9dc", linewidth=1)
        shades = [to_rgba(COLOURS[0], 0.25 + 0.75 * i / max(1, len(path) - 1)) for i in range(len(path))]
        axes.scatter(x, y, s=14, c=shades, linewidths=0)
        for place, name in ((0, "start"), (len(path) - 1, "end")):
            axes.annotate(name, path[place], textcoords="offset points", xytext=(5, 5), color=INK)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.margins(0.1)
    return made.svg


def _short(name: str, most: int = 24) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
