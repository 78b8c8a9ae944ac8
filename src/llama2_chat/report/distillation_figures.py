"""Context distillation in the report: safety scores before and after, preprompts compared, what was kept (Fig. 16).

Scores are raw (logits). An answer is judged as one to the prompt without the preprompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from llama2_chat.report.drawing import COLOURS, INK, SOFT
from llama2_chat.report.markup import Html, element, figures, folded, joined, section, table
from llama2_chat.report.measures import (
    Measure,
    difference,
    estimates,
    is_number,
    number,
    policy_measure,
    readable,
    written,
)
from llama2_chat.report.run_record import Row, RunRecord, StageRecord
from llama2_chat.report.samples import Side, answers_block
from llama2_chat.report.sampling_figures import Panel, on_page

EFFECTS = (
    *("violation_rate", "oracle_violation_rate", "reward_safety_mean", "reward_helpfulness_mean"),
    *("oracle_helpfulness", "false_refusal_rate.helpful", "false_refusal_rate.borderline"),
)
"""Measures of the policy before and after."""

_LEFT_OUT = "#9aa4ad"
_MOST_POINTS = 800
_BINS = 24
_SAMPLES = 6


def context_distillation(run: RunRecord) -> Html:
    """The section; nothing if no stage distilled a context."""
    blocks = []
    for stage in run.stages:
        if stage.kind != "context_distillation":
            continue
        parts = [
            figures(on_page(panel) for panel in panels_of(stage)),
            _categories(stage),
            _effect(run, stage),
            _before_and_after(stage),
        ]
        if any(parts):
            blocks.append(joined([element("h3", stage.name), *parts]))
    note = element(
        "p",
        "Raw scores of the safety reward model; every answer is judged as one to the prompt without the preprompt.",
        class_="soft",
    )
    return section("Context distillation", note if blocks else "", *blocks, identifier="context-distillation")


def panels_of(stage: StageRecord) -> Iterator[Panel]:
    """The figures that a stage's samples have scores for; none for other kinds of stages."""
    if stage.kind != "context_distillation":
        return
    rows = _scored(stage, "original_safety", "safety")
    if rows:
        kept = sum(row.get("kept") is True for row in rows)
        shown = _spread(rows)
        part = f" {len(shown):,} of {len(rows):,} prompts are drawn." if len(shown) < len(rows) else ""
        yield Panel(
            "before_and_after",
            "Safety score without and with the preprompt",
            lambda axes: _draw_scatter(axes, shown),
            f"{kept:,} of {len(rows):,} answers are kept; on the line nothing changes.{part}",
        )
        compared = _scored(stage, "original_safety", "generic_safety", "safety")
        yield Panel(
            "preprompts",
            "Safety scores by preprompt",
            lambda axes: _draw_scores(axes, columns_of(compared or rows, compared=bool(compared))),
            f"{len(compared or rows):,} prompts, each answered once in each way; dashed: means.",
        )
    shares = _shares(stage)
    if shares:
        yield Panel(
            "kept",
            "Kept by risk category",
            lambda axes: _draw_shares(axes, shares),
            "Share of the prompts whose answer under the preprompt is kept.",
        )


def columns_of(rows: Sequence[Row], *, compared: bool) -> dict[str, list[float]]:
    """Scores by preprompt, in the order of Fig. 16a; the generic one apart where it was sampled by itself."""
    names = {"without preprompt": "original_safety"}
    if compared:
        names |= {"generic preprompt": "generic_safety", "with answer template": "safety"}
    else:
        names |= {"with preprompt": "safety"}
    return {label: [float(row["scores"][name]) for row in rows] for label, name in names.items()}


def _scored(stage: StageRecord, *names: str) -> list[Row]:
    return [
        row
        for row in stage.samples
        if isinstance(row.get("scores"), Mapping)
        and all(is_number(row["scores"].get(name)) for name in names)
    ]


def _spread(rows: Sequence[Row]) -> list[Row]:
    """At most so many rows as a figure can show, evenly spread."""
    count = min(len(rows), _MOST_POINTS)
    return [rows[(2 * k + 1) * len(rows) // (2 * count)] for k in range(count)]


def _draw_scatter(axes: Axes, rows: Sequence[Row]) -> None:
    points = [
        (row["scores"]["original_safety"], row["scores"]["safety"], row.get("kept") is True) for row in rows
    ]
    ends = [min(min(x, y) for x, y, _ in points), max(max(x, y) for x, y, _ in points)]
    axes.plot(ends, ends, color=SOFT, linestyle=":", linewidth=1)
    for kept, label, colour in ((False, "left out", _LEFT_OUT), (True, "kept", COLOURS[0])):
        some = [(x, y) for x, y, is_kept in points if is_kept is kept]
        if some:
            xs, ys = zip(*some, strict=True)
            axes.scatter(xs, ys, s=11, color=colour, alpha=0.6, linewidths=0, label=label)
    axes.set_xlabel("score without the preprompt")
    axes.set_ylabel("with the preprompt")
    axes.legend(loc="best")


def _draw_scores(axes: Axes, columns: Mapping[str, Sequence[float]]) -> None:
    """A histogram of each as an outline, all with the same bins, and their means."""
    low, high = min(map(min, columns.values())), max(map(max, columns.values()))
    width = (high - low) / _BINS or 1.0
    edges = [low + width * place for place in range(_BINS + 1)]
    for (label, scores), colour in zip(columns.items(), COLOURS, strict=False):
        counts = [0] * _BINS
        for score in scores:
            counts[min(_BINS - 1, int((score - low) / width))] += 1
        shares = [100 * count / len(scores) for count in counts]
        axes.stairs(shares, edges, color=colour, linewidth=1.6, label=label)
        axes.axvline(sum(scores) / len(scores), color=colour, linestyle="--", linewidth=1)
    axes.set_xlabel("safety score")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.margins(y=0.2)
    axes.legend(loc="upper left")


def _by_category(stage: StageRecord) -> dict[str, Mapping[str, Any]]:
    selection = stage.metrics.get("selection")
    found = selection.get("by_category") if isinstance(selection, Mapping) else None
    rows = found.items() if isinstance(found, Mapping) else ()
    return {str(name): row for name, row in rows if isinstance(row, Mapping) and is_number(row.get("share"))}


def _shares(stage: StageRecord) -> dict[str, tuple[float, int, int]]:
    """Share kept, kept and all of each category."""
    return {
        name: (row["share"], row.get("kept", 0), row.get("prompts", 0))
        for name, row in _by_category(stage).items()
    }


def _draw_shares(axes: Axes, shares: Mapping[str, tuple[float, int, int]]) -> None:
    places = range(len(shares))
    bars = axes.barh(places, [100 * share for share, _, _ in shares.values()], 0.6, color=COLOURS[0])
    labels = [f"{100 * share:.0f} % ({kept:,} of {count:,})" for share, kept, count in shares.values()]
    axes.bar_label(bars, labels, padding=3, color=SOFT)
    axes.set_yticks(places, [readable(name).replace(" ", "\n") for name in shares])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(len(shares) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 150)
    axes.set_xticks(range(0, 101, 25))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))


_COLUMNS = {"original": "without preprompt", "preprompted": "with it", "selected": "kept ones in place"}


def _categories(stage: StageRecord) -> Html:
    """Mean scores and shares of unsafe answers, of all prompts and by category."""
    selection = stage.metrics.get("selection")
    if not isinstance(selection, Mapping) or not is_number(selection.get("share")):
        return Html("")
    by_category = _by_category(stage)
    rows = {"all prompts": selection, **(by_category if len(by_category) > 1 else {})}
    names = [name for name in _COLUMNS if all(is_number(row.get(f"safety_{name}")) for row in rows.values())]
    cells = [
        [
            readable(title),
            number(row["prompts"]),
            number(row["share"], percent=True),
            *(_score(row, name) for name in names),
        ]
        for title, row in rows.items()
    ]
    note = "Below a mean score: the share that the safety reward model takes for unsafe."
    head = ["", "prompts", "kept", *(_COLUMNS[name] for name in names)]
    return joined([table(head, cells), element("p", note, class_="soft")])


def _score(row: Mapping[str, Any], name: str) -> Html:
    unsafe = row.get(f"unsafe_{name}")
    below = f"{number(unsafe, percent=True)} unsafe" if unsafe is not None and is_number(unsafe) else ""
    return joined([number(row[f"safety_{name}"]), element("span", below, class_="interval") if below else ""])


def _effect(run: RunRecord, stage: StageRecord) -> Html:
    """The evaluation of the policy before and after, where both were evaluated."""
    before, after = (run.evaluation.get(str(name)) for name in (stage.config.get("policy"), stage.name))
    if before is None or after is None:
        return Html("")
    first, last = estimates(before), estimates(after)
    rows = []
    for name in EFFECTS:
        if name in first and name in last:
            measure: Measure = policy_measure(name)
            change = difference(first[name], last[name])
            cells = [written(first[name], measure), written(last[name], measure)]
            rows.append([measure.label, *cells, written(change, measure, signed=True)])
    return table(["held out", "before", "after", "change"], rows) if rows else Html("")


def _before_and_after(stage: StageRecord) -> Html:
    """Answers with and without the preprompt: kept ones from the largest rise to the smallest, and some left out."""
    rows = [
        row
        for row in _scored(stage, "original_safety", "safety")
        if isinstance(row.get("response"), str) and isinstance(row.get("original_response"), str)
    ]
    rows.sort(key=lambda row: row["scores"]["original_safety"] - row["scores"]["safety"])
    groups = (("Kept", True), ("Left out", False))
    blocks: list[Html] = []
    for title, kept in groups:
        some = [row for row in rows if (row.get("kept") is True) is kept]
        count = min(_SAMPLES // 2, len(some))
        picked = [some[(2 * k + 1) * len(some) // (2 * count)] for k in range(count)]
        blocks += [element("h4", title), *(_side(row) for row in picked)] if picked else []
    return folded("Samples before and after", *blocks) if blocks else Html("")


def _side(row: Row) -> Html:
    scores = row["scores"]
    answers: dict[str, Row] = {
        f"without preprompt: {number(scores['original_safety'])}": {
            "response": row["original_response"],
            "status": row.get("original_status"),
        },
        f"with preprompt: {number(scores['safety'])}": {
            "response": row["response"],
            "status": row.get("status"),
        },
    }
    return joined(
        [
            answers_block(Side(row.get("prompt"), answers)),
            element("p", f"Preprompt: {row.get('preprompt', '')}", class_="soft"),
        ]
    )
