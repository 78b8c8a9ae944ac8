"""Curves over a stage's steps: loss, accuracy, rewards, KL, whatever its `metrics.jsonl` holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from llama2_chat.report.drawing import COLOURS, drawing
from llama2_chat.report.markup import Html
from llama2_chat.report.measures import is_number, readable
from llama2_chat.report.run_record import Row, StageRecord

MAX_POINTS = 240
"""Longer series are averaged in groups: a figure of 400 pixels shows no more."""

_STEP_NAMES = ("step", "iteration", "global_step")
_NOT_DRAWN = (*_STEP_NAMES, "epoch")
_FIRST = ("loss", "accuracy", "mean_token_accuracy")
_THEN = ("helpfulness", "reward", "score", "safety", "kl", "clip_fraction", "value_loss", "policy_loss")
"""Order of the metrics: those of the first names, then those in whose names these words are, then the rest."""

_SHOWN_FOLDED = ("grad_norm", "learning_rate", "kl_coefficient")
_DETAILS = ("held_out_", "whitened", "penalty", "k3", "update", "ratio", "difference", "_std", "_share")
"""Words in the names of metrics that come after all others."""

_MOST_SHOWN = 6
_MOST_DRAWN = 18


@dataclass(frozen=True)
class Series:
    """One metric over steps, at most `MAX_POINTS` points; `smooth` averages over `window` steps."""

    steps: list[float]
    values: list[float]
    smooth: list[float]
    window: int


def series_of(rows: Sequence[Row], name: str) -> Series | None:
    """A metric's series; None if it has fewer than two finite values."""
    by_step: dict[float, float] = {}
    for place, row in enumerate(rows, start=1):
        if is_number(row.get(name)):
            # A step that was run again after a kill counts as it came out last.
            by_step[_step(row, place)] = float(row[name])
    if len(by_step) < 2:
        return None
    steps, values = map(list, zip(*sorted(by_step.items()), strict=True))
    group = -(-len(values) // MAX_POINTS)
    steps, values = ([_mean(c[i : i + group]) for i in range(0, len(c), group)] for c in (steps, values))
    half = len(values) // 30
    smooth = [_mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    return Series(steps, values, smooth, window=(2 * half + 1) * group)


def metric_names(stage: StageRecord) -> tuple[list[str], list[str]]:
    """Names of the metrics to draw: the ones to show, and the ones to fold away."""
    names: dict[str, None] = {}
    for row in stage.series:
        names |= dict.fromkeys(k for k, v in row.items() if is_number(v) and k not in _NOT_DRAWN)

    def rank(name: str) -> tuple[bool, int, int]:
        places = [
            place
            for place, word in enumerate((*_FIRST, *_THEN))
            if word == name or (word in _THEN and word in name)
        ]
        detail = any(word in name for word in _DETAILS)
        return detail, min(places, default=len(_FIRST) + len(_THEN)), list(names).index(name)

    ordered = sorted(names, key=rank)
    shown = [name for name in ordered if name not in _SHOWN_FOLDED][:_MOST_SHOWN]
    return shown, [name for name in ordered if name not in shown][: _MOST_DRAWN - len(shown)]


def draw_curve(rows: Sequence[Row], name: str) -> Html | None:
    """One metric of one stage: raw values faint, their moving average on top."""
    series = series_of(rows, name)
    if series is None:
        return None
    with drawing(readable(name), height=180) as made:
        _draw(made.axes, series, COLOURS[0], None)
        made.axes.set_xlabel(_axis(series))
    return made.svg


def draw_overlay(name: str, a: Sequence[Row], b: Sequence[Row]) -> Html | None:
    """The same metric of two runs."""
    both = [series_of(rows, name) for rows in (a, b)]
    if not any(both):
        return None
    with drawing(readable(name), height=200) as made:
        for series, colour, label in zip(both, COLOURS, ("A", "B"), strict=False):
            if series is not None:
                _draw(made.axes, series, colour, label)
        made.axes.set_xlabel(_axis(next(series for series in both if series is not None)))
        made.axes.legend()
    return made.svg


def _draw(axes: Axes, series: Series, colour: str, label: str | None) -> None:
    if series.window > 1:
        axes.plot(series.steps, series.values, color=colour, alpha=0.28, linewidth=0.8)
    axes.plot(series.steps, series.smooth, color=colour, linewidth=1.6, label=label)
    # A few wild first steps would flatten the rest; the faint line then runs out of the figure.
    drawn = sorted((*series.smooth, *series.values[len(series.values) // 50 :]))
    low, high = drawn[len(drawn) // 200], drawn[-1 - len(drawn) // 200]
    room = 0.06 * (high - low) or max(abs(high), 1e-12) * 0.1
    if label is None:
        axes.set_ylim(low - room, high + room)


def _axis(series: Series) -> str:
    return f"step (thick line: mean of {series.window} steps)" if series.window > 1 else "step"


def _step(row: Row, place: int) -> float:
    found = next((row[name] for name in _STEP_NAMES if is_number(row.get(name))), place)
    return float(found)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
