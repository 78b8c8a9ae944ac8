"""Figures of `llama2-chat evaluate reward` as PNG: accuracy, calibration, scores, length; models side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from llama2_chat.dialogue import RATINGS
from llama2_chat.report.drawing import COLOURS, SOFT, panels

Models = Mapping[str, Mapping[str, Any]]
"""Each model's figures by its name, as `evaluation.reward_report.by_model` gives them."""

_MARKERS = ("o", "s", "^", "D", "v", "P")
_PANEL = (6.0, 3.8)
_SAFETY = {
    "safe_unsafe": "chosen safe,\nother unsafe",
    "both_safe": "both\nsafe",
    "both_unsafe": "both\nunsafe",
}


def draw_figures(evaluation: Mapping[str, Any], models: Models, folder: Path) -> dict[str, str]:
    """Write `accuracy.png`, `calibration.png`, `scores.png` and `length.png`; returns names by section."""
    drawn: dict[str, Callable[[Path], None]] = {
        "accuracy": lambda file: _accuracy(models, file),
        "calibration": lambda file: _calibration(models, file),
        "scores": lambda file: _scores(evaluation["score_histogram"], models, file),
        "length": lambda file: _length(models, file),
    }
    for name, draw in drawn.items():
        draw(folder / f"{name}.png")
    return {name: f"{name}.png" for name in drawn}


def _percent(axes: Axes, which: str) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "\N{MINUS SIGN}")


def _dodge(place: int, count: int) -> float:
    return (place - (count - 1) / 2) * 0.6 / max(count, 2)


def _interval_dots(
    axes: Axes,
    place: int,
    places: Sequence[float],
    rows: Sequence[Mapping[str, Any]],
    label: str,
    *,
    value: str = "accuracy",
    across: bool = False,
) -> None:
    """One model's dots with their intervals, at `places` on x (on y where `across`); uncounted rows are left out."""
    shown = [(x, row) for x, row in zip(places, rows, strict=True) if row.get(value) is not None]
    style: dict[str, Any] = {"color": COLOURS[place % len(COLOURS)]}
    for x, row in shown:
        ends = [row["low"], row["high"]]
        axes.plot(*((ends, [x, x]) if across else ([x, x], ends)), linewidth=2, alpha=0.5, **style)
    xs, ys = [x for x, _ in shown], [row[value] for _, row in shown]
    marker = _MARKERS[place % len(_MARKERS)]
    axes.plot(
        *((ys, xs) if across else (xs, ys)), linestyle="none", marker=marker, ms=6, label=label, **style
    )


def _accuracy(models: Models, file: Path) -> None:
    """Accuracy by rating, overall and by safety labels, with the number of pairs below each name."""
    first = next(iter(models.values()))
    places: list[tuple[str, tuple[str, ...]]] = [
        *((rating.removesuffix("_better"), ("by_rating", rating)) for rating in RATINGS),
        ("all pairs", ("overall",)),
        *((_SAFETY[name], ("by_safety", name)) for name in first["accuracy"]["by_safety"]),
    ]
    shown = [(name, place) for name, place in places if _at(first["accuracy"], place)["count"]]
    width = max(_PANEL[0], 1.1 * len(shown))
    with panels(file, 1, 1, (width, _PANEL[1])) as ((axes,),):
        for number, (name, one) in enumerate(models.items()):
            xs = [x + _dodge(number, len(models)) for x in range(len(shown))]
            _interval_dots(axes, number, xs, [_at(one["accuracy"], place) for _, place in shown], name)
        attainable = [_at(first.get("attainable_accuracy", {}), place).get("accuracy") for _, place in shown]
        marks = [(x, value) for x, value in enumerate(attainable) if value is not None]
        if marks:
            axes.plot(*zip(*marks, strict=True), "_", color=SOFT, ms=22, label="attainable with this noise")
        axes.axhline(0.5, color=SOFT, linestyle=":", linewidth=1)
        counts = [_at(first["accuracy"], place)["count"] for _, place in shown]
        labels = [f"{name}\nn = {count:,}" for (name, _), count in zip(shown, counts, strict=True)]
        axes.set_xticks(range(len(shown)), labels)
        axes.set_ylabel("pairs in which the preferred\nresponse scores higher")
        _percent(axes, "y")
        axes.set_title("Accuracy on held-out pairs, 95 % intervals; dotted: chance")
        _legend_below(axes)


def _at(table: Mapping[str, Any], place: Sequence[str]) -> Mapping[str, Any]:
    for key in place:
        table = table.get(key, {})
    return table


def _legend_below(axes: Axes) -> None:
    """Where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    axes.get_figure().legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)))  # type: ignore[union-attr]


def _calibration(models: Models, file: Path) -> None:
    """Observed against predicted share, and below it how many pairs (or responses) lie in each bin."""
    first = next(iter(models.values()))["calibration"]
    kinds = [
        ("preference", "σ(r_c - r_r), rows oriented at random", "first response preferred", "pairs"),
        ("safety", "σ(score)", "response labelled safe", "responses"),
    ]
    kinds = [kind for kind in kinds if first[kind[0]] is not None]
    with panels(file, 2, len(kinds), (5.2 * len(kinds), 5.2), sharex=True, height_ratios=[3, 1]) as (
        curves,
        counts,
    ):
        for column, (kind, predicted, observed, rows) in enumerate(kinds):
            above, below = curves[column], counts[column]
            above.plot([0, 1], [0, 1], color=SOFT, linestyle=":", linewidth=1, label="calibrated")
            for place, (name, one) in enumerate(models.items()):
                found = one["calibration"][kind]
                bins = [row for row in found["bins"] if row["count"]]
                xs = [row["mean_predicted"] for row in bins]
                _interval_dots(
                    above, place, xs, bins, f"{name}: error {found['error']:.3f}", value="observed"
                )
                above.plot(xs, [row["observed"] for row in bins], color=COLOURS[place % len(COLOURS)], lw=1)
                width = 0.08 / len(models)
                centres = [
                    (row["from"] + row["to"]) / 2 + (place - (len(models) - 1) / 2) * width
                    for row in found["bins"]
                ]
                below.bar(
                    centres,
                    [row["count"] for row in found["bins"]],
                    width,
                    color=COLOURS[place % len(COLOURS)],
                )
            total = sum(row["count"] for row in first[kind]["bins"])
            above.set_title(f"Calibration of {predicted.split(',')[0]}, n = {total:,} {rows}")
            above.set_ylabel(f"observed: {observed}")
            above.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
            above.set_ylim(-0.05, 1.08 + 0.09 * (1 + len(models)))  # the legend's lines lie above 100 %
            above.legend(loc="upper left")
            below.set_xlabel(f"predicted: {predicted}")
            below.set_ylabel(rows)
            _percent(above, "y")
            _percent(below, "x")


def _scores(histogram: Mapping[str, Any], models: Models, file: Path) -> None:
    """Chosen and rejected scores, one panel a model on the same axes, so that a shift shows (Figure 27)."""
    edges = histogram["edges"]
    with panels(file, len(models), 1, (_PANEL[0], 0.6 + 2.4 * len(models)), sharex=True, sharey=True) as grid:
        for (axes,), (name, counts) in zip(grid, histogram["counts"].items(), strict=True):
            spread = models[name]["score_spread"]
            for group, colour, style in (("rejected", COLOURS[1], "--"), ("chosen", COLOURS[0], "-")):
                axes.stairs(counts[group], edges, fill=True, color=colour, alpha=0.35)
                axes.stairs(
                    counts[group],
                    edges,
                    color=colour,
                    linestyle=style,
                    label=f"{group}, mean {_signed(spread[f'mean_{group}'])}",
                )
                axes.axvline(spread[f"mean_{group}"], color=colour, linestyle=style, linewidth=1)
            axes.set_title(
                f"{name}: n = {sum(counts['chosen']):,} pairs, mean gap {_signed(spread['mean_gap'])}"
            )
            axes.set_ylabel("responses")
            axes.legend(loc="best")
        grid[-1][0].set_xlabel("raw score (logit)")


def _length(models: Models, file: Path) -> None:
    """Mean lengths, and accuracies beside those of rules that know lengths alone."""
    rows: list[tuple[str, list[Mapping[str, Any] | None]]] = [
        ("all pairs", [one["accuracy"]["overall"] for one in models.values()]),
        ("tokens within 10 %", [one["matched_length"]["tokens"] for one in models.values()]),
        ("characters within 10 %", [one["matched_length"]["characters"] for one in models.values()]),
        ("chosen has more tokens", [one["length"]["tokens"]["chosen_longer"] for one in models.values()]),
        ("rejected has more tokens", [one["length"]["tokens"]["rejected_longer"] for one in models.values()]),
        ("rule: more tokens win", [one["length"]["tokens"]["longer_wins"] for one in models.values()]),
        ("rule: fewer tokens win", [one["length"]["tokens"]["shorter_wins"] for one in models.values()]),
    ]
    if all("length_rule" in one for one in models.values()):
        rows.append(
            ("best rule of the\ntraining pairs", [one["length_rule"]["evaluated"] for one in models.values()])
        )
    with panels(file, 1, 2, (9.6, 3.2 + 0.25 * len(models)), width_ratios=[2, 3]) as ((means, shares),):
        groups = ("mean_chosen", "mean_rejected", "mean_preferred")
        for place, (name, one) in enumerate(models.items()):
            width = 0.8 / len(models)
            xs = [x + (place - (len(models) - 1) / 2) * width for x in range(len(groups))]
            heights = [one["length"]["tokens"][group] for group in groups]
            bars = means.bar(xs, heights, 0.9 * width, color=COLOURS[place % len(COLOURS)], label=name)
            means.bar_label(bars, fmt="%.1f", fontsize=8, color=SOFT)
            ys = [y + _dodge(place, len(models)) for y in range(len(rows))]
            found = [row[place] or {} for _, row in rows]
            _interval_dots(shares, place, ys, found, name, across=True)
        count = next(iter(models.values()))["accuracy"]["overall"]["count"]
        means.set_xticks(range(3), ["chosen", "rejected", "preferred\nby the model"])
        means.set_ylabel("mean length (tokens)")
        means.set_title(f"Length, n = {count:,} pairs")
        shares.axvline(0.5, color=SOFT, linestyle=":", linewidth=1)
        names = [f"{name} (n = {row[0]['count']:,})" if row[0] else name for name, row in rows]
        shares.set_yticks(range(len(rows)), names)
        shares.set_ylim(len(rows) - 0.4, -0.6)
        shares.set_xlabel("accuracy, 95 % intervals; dotted: chance")
        _percent(shares, "x")
        shares.set_title("Accuracy and length")
        _legend_below(means)
