"""Rejection sampling in figures: the best of n samples, temperatures, where kept answers come from (Fig. 7, Fig. 8)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from llama2_chat.report.drawing import COLOURS, INK, SOFT, drawing, panels
from llama2_chat.report.markup import Html, element, figure, figures, joined, section
from llama2_chat.report.measures import is_number, number
from llama2_chat.report.run_record import RunRecord, StageRecord

FIGURES_FOLDER = "figures"
_STYLES = (("maximum", "best of n", COLOURS[0], "-"), ("median", "median of n", COLOURS[1], "--"))
_MOST_LINES = 4


@dataclass(frozen=True)
class Panel:
    """One figure of a stage: its file's name, title, and what draws it on axes."""

    name: str
    title: str
    draw: Callable[[Axes], None]
    caption: str


def rejection_sampling(run: RunRecord) -> Html:
    """The section; nothing if no stage measured its samples."""
    blocks = []
    for stage in run.stages:
        if drawn := [on_page(panel) for panel in panels_of(stage)]:
            blocks.append(joined([element("h3", stage.name), figures(drawn)]))
    return section("Rejection sampling", *blocks, identifier="rejection-sampling")


def write_panels(run: RunRecord, of: Callable[[StageRecord], Iterable[Panel]]) -> list[Path]:
    """Write the figures that `of` gives for the stages as `figures/STAGE-NAME.png` in the run directory."""
    written = []
    for stage in run.stages:
        for panel in of(stage):
            file = run.path / FIGURES_FOLDER / f"{stage.name}-{panel.name}.png"
            with panels(file, 1, 1, (6.0, 3.8)) as ((axes,),):
                panel.draw(axes)
                axes.set_title(panel.title)
            written.append(file)
    return written


def panels_of(stage: StageRecord) -> Iterator[Panel]:
    """The figures that a stage's metrics have numbers for."""
    best_of = stage.metrics.get("best_of")
    if isinstance(best_of, Mapping) and all(_curve(best_of, name) for name, *_ in _STYLES):
        yield Panel(
            "best_of",
            "Best and median of n samples",
            lambda axes: _draw_best_of(axes, best_of),
            _gain(best_of),
        )
    search = stage.metrics.get("temperature")
    if isinstance(search, Mapping) and search.get("temperatures"):
        yield Panel(
            "temperature",
            "Best of n samples by temperature",
            lambda axes: _draw_temperatures(axes, search),
            f"{search['prompts']:,} held-out prompts; dotted: the chosen temperature, {search['chosen']:g}, "
            f"by the best of {search['k']}.",
        )
    sources = stage.metrics.get("kept_from")
    if isinstance(sources, Sequence) and sources:
        yield Panel(
            "kept_from",
            "Where kept answers come from",
            lambda axes: _draw_sources(axes, sources),
            "Each kept answer by the iteration and the policy that sampled it first.",
        )


def on_page(panel: Panel) -> Html:
    """The figure with its caption, for the page."""
    with drawing(panel.title, height=240, left=64, bottom=38) as made:
        panel.draw(made.axes)
    return figure(made.svg, panel.caption)


def _curve(curves: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    rows = curves.get(name)
    return [row for row in rows if is_number(row.get("mean"))] if isinstance(rows, list) else []


def _gain(best_of: Mapping[str, Any]) -> str:
    (best, middle) = (_curve(best_of, name)[-1] for name, *_ in _STYLES)
    gap = number(best["mean"] - middle["mean"], signed=True)
    return f"At n = {best['n']} the best is {gap} above the median. Bands: 95 % intervals over prompts."


def _draw_best_of(axes: Axes, best_of: Mapping[str, Any]) -> None:
    sizes: list[int] = []
    for name, label, colour, style in _STYLES:
        rows = _curve(best_of, name)
        sizes = [row["n"] for row in rows]
        _line(axes, sizes, rows, label, colour, style)
    if len(sizes) > 1:
        axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(sizes, [f"{size}" for size in sizes])
    axes.set_xlabel("samples n (log scale)")
    axes.set_ylabel("combined reward")
    axes.legend(loc="upper left")
    axes.margins(y=0.15)


def _draw_temperatures(axes: Axes, search: Mapping[str, Any]) -> None:
    found = sorted(search["temperatures"], key=lambda one: one["temperature"])
    sizes = [row["n"] for row in _curve(found[0], "maximum")]
    temperatures = [one["temperature"] for one in found]
    for place, size in enumerate(_spread(sizes, search["k"])):
        rows = [row for one in found for row in _curve(one, "maximum") if row["n"] == size]
        _line(axes, temperatures, rows, f"best of {size}", COLOURS[place], "-")
    axes.axvline(search["chosen"], color=SOFT, linestyle=":", linewidth=1)
    axes.set_xticks(temperatures, [f"{temperature:g}" for temperature in temperatures])
    axes.set_xlabel("temperature")
    axes.set_ylabel("combined reward")
    axes.legend(loc="best")
    axes.margins(y=0.15)


def _spread(sizes: Sequence[int], k: int) -> list[int]:
    """At most four of the n, evenly spread; K is among them."""
    places = {round(i * (len(sizes) - 1) / (_MOST_LINES - 1)) for i in range(_MOST_LINES)}
    chosen = {sizes[place] for place in places}
    if k not in chosen:
        chosen = {*sorted(chosen)[: _MOST_LINES - 1], k}
    return sorted(chosen)


def _line(
    axes: Axes,
    xs: Sequence[float],
    rows: Sequence[Mapping[str, Any]],
    label: str,
    colour: str,
    style: str,
) -> None:
    axes.fill_between(
        xs, [r["low"] for r in rows], [r["high"] for r in rows], color=colour, alpha=0.18, linewidth=0
    )
    axes.plot(xs, [r["mean"] for r in rows], marker="o", ms=4, linestyle=style, color=colour, label=label)


def _draw_sources(axes: Axes, sources: Sequence[Mapping[str, Any]]) -> None:
    counts = [row["answers"] for row in sources]
    places = range(len(sources))
    bars = axes.barh(places, counts, 0.6, color=[COLOURS[row["iteration"] % len(COLOURS)] for row in sources])
    total = sum(counts)
    axes.bar_label(
        bars, [f"{count:,} ({100 * count / total:.0f} %)" for count in counts], padding=3, color=SOFT
    )
    axes.set_yticks(places, [f"V{row['iteration']} {_short(row['policy'])}" for row in sources])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(len(sources) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1.3 * max(counts))
    axes.set_xlabel("kept answers")


def _short(name: Any, most: int = 8) -> str:
    text = str(name)
    return text if len(text) <= most else f"{text[: most - 1]}…"
