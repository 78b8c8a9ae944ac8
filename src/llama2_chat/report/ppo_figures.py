"""PPO stages in the report: rewards on the batches and held out, KL, lengths, times, what guards found, samples."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from llama2_chat.report.curves import series_of
from llama2_chat.report.drawing import COLOURS, SOFT
from llama2_chat.report.markup import Html, element, figures, folded, joined, section
from llama2_chat.report.measures import PERCENT, duration, is_number, number
from llama2_chat.report.run_record import Row, RunRecord, StageRecord
from llama2_chat.report.samples import Side, answers_block, chosen
from llama2_chat.report.sampling_figures import Panel, on_page

_HALF_WIDTH = 1.96
_PHASES = {"sampling": "sampling", "scoring": "scoring", "logprobs": "log-probabilities", "update": "update"}
_INCOMPLETE = {
    "cut_off": ("cut off", COLOURS[4]),
    "empty": ("empty", "#9aa4ad"),
    "chat_tag": ("chat tag", COLOURS[6]),
}
_LEAST_PERCENT = 5.0
_MOST_BARS = 40
_SAMPLES = 4


def ppo(run: RunRecord) -> Html:
    """The section; nothing if no stage is one of PPO with a history."""
    blocks = []
    for stage in run.stages:
        if stage.kind != "ppo":
            continue
        drawn = [on_page(panel) for panel in panels_of(stage, _times(run, stage.name))]
        parts = [found(run, stage), figures(drawn), before_and_after(stage)]
        if any(parts):
            blocks.append(joined([element("h3", stage.name), *parts]))
    note = element(
        "p",
        "Over the iterations that were done before; a point of a batch is the policy that the batch was sampled with. "
        "Thin lines are single iterations, thick ones their moving average; dotted: the policy that was kept.",
        class_="soft",
    )
    return section("PPO", note if blocks else "", *blocks, identifier="ppo")


def found(run: RunRecord, stage: StageRecord) -> Html:
    """Why the stage stopped and what the guards found, from its metrics or, while it is not done, its events."""
    rows = stage.metrics.get("guards")
    if not isinstance(rows, list):
        rows = [e for e in run.events if e.get("event") == "guard" and e.get("stage") == stage.name]
    told = {(row.get("guard"), row.get("iteration")): row for row in rows if isinstance(row, Mapping)}
    stopped = stage.metrics.get("stopped_by")
    stopped = stopped if isinstance(stopped, Mapping) else {}
    lines = [
        f"Iteration {row.get('iteration')}, {row.get('guard')}: {row.get('reason')}."
        for row in told.values()
        if (row.get("guard"), row.get("iteration")) != (stopped.get("name"), stopped.get("iteration"))
    ]
    if stopped:
        lines.append(f"Stopped after iteration {stopped.get('iteration')}: {stopped.get('reason')}.")
    items = [element("li", line) for line in lines]
    return joined(
        [
            element("div", element("ul", *items), class_="notice") if items else "",
            _kept(stage),
        ]
    )


def _kept(stage: StageRecord) -> Html:
    """Which policy became the model, and what that one is worth."""
    names = ("kept_iteration", "held_out_score_mean_first", "held_out_score_mean_kept")
    kept, first, last = (_number(stage.metrics, name) for name in names)
    if kept is None or first is None or last is None:
        return Html("")
    text = f"Kept: the policy after {kept:.0f} of {len(stage.series):,} iterations, held-out reward "
    return element("p", f"{text}{number(last)} ({number(first)} before the first).")


def _number(metrics: Mapping[str, Any], name: str) -> float | None:
    value = metrics.get(name)
    return float(value) if value is not None and is_number(value) else None


def panels_of(stage: StageRecord, times: Sequence[Mapping[str, float]]) -> Iterator[Panel]:
    """The figures that a stage's history has numbers for."""
    rows, held_out = stage.series, stage.evaluations
    kept = _number(stage.metrics, "kept_iteration") if held_out else None

    def lines(title: str, named: Mapping[str, str], caption: str, **more: Any) -> Iterator[Panel]:
        shown = {name: label for name, label in named.items() if series_of(rows, name) is not None}
        if shown:
            yield Panel(title, title, lambda axes: _draw_lines(axes, rows, shown, kept=kept, **more), caption)

    band = "bands: 95 % intervals over the prompts" if held_out else "the score that decided, as measured"
    yield from lines(
        "combined reward",
        {"score_mean": "batches"},
        f"Raw R_c; {band}.",
        points=_points(held_out, "score_mean", "score_se"),
        points_label="held out",
    )
    models = {"helpfulness_mean": "helpfulness", "safety_mean": "safety"}
    yield from lines("reward models on the batches", models, "Mean raw scores.")
    other = _points(held_out, "independent_mean", "independent_se")
    if len(other) > 1:
        yield Panel(
            "independent",
            "independent reward model, held out",
            lambda axes: _draw_lines(axes, [], {}, kept=kept, points=other, place=3),
            "Nothing is optimised against it; falling while the others rise, it tells of an exploited reward.",
        )
    yield from lines(
        "KL to the reference",
        {"kl_nats": "batches, k1", "kl_k3_nats": "batches, k3"},
        "Nats a response; two estimates of the same quantity.",
        points=_points(held_out, "kl_nats"),
        points_label="held out",
    )
    yield from lines(
        "response length",
        {"response_tokens_mean": "mean"},
        "Tokens; the band is one standard deviation of a batch's responses.",
        spread="response_tokens_std",
    )
    if _shares(rows):
        title = "incomplete responses"
        yield Panel(title, title, lambda axes: _draw_shares(axes, rows), _complete_shares(rows))
    yield from lines("entropy", {"entropy_nats": "batches"}, "Nats a token: minus the mean log-probability.")
    yield from lines("clip fraction", {"clip_fraction": "mean"}, "Share of tokens whose ratio was clipped.")
    yield from lines(
        "explained variance",
        {"explained_variance": "mean"},
        "Of the returns by the values before the update; 1 is perfect, 0 a constant.",
    )
    if times:
        yield Panel(
            "time", "time of an iteration", lambda axes: _draw_times(axes, times), _time_shares(times)
        )


Point = tuple[float, float, float | None]
"""Iterations done, mean, standard error."""


def _points(rows: Sequence[Row], name: str, error: str | None = None) -> list[Point]:
    return [
        (float(row["step"]), float(row[name]), row.get(error) if error else None)
        for row in rows
        if is_number(row.get("step")) and is_number(row.get(name))
    ]


def _draw_lines(
    axes: Axes,
    rows: Sequence[Row],
    named: Mapping[str, str],
    *,
    kept: float | None,
    points: Sequence[Point] = (),
    points_label: str = "held out",
    spread: str | None = None,
    place: int = 1,
) -> None:
    """Metrics of the batches as lines, evaluations as points joined by a line with their intervals."""
    for number_of, (name, label) in enumerate(named.items()):
        series = series_of(rows, name)
        if series is None:
            continue
        colour = COLOURS[number_of if not points or number_of == 0 else number_of + 1]
        # A batch was sampled with the policy that the iterations before it made.
        steps = [step - 1 for step in series.steps]
        if series.window > 1:
            axes.plot(steps, series.values, color=colour, alpha=0.28, linewidth=0.8)
        axes.plot(steps, series.smooth, color=colour, linewidth=1.6, label=label)
        deviations = series_of(rows, spread) if spread else None
        if deviations is not None and deviations.steps == series.steps:
            pairs = list(zip(series.smooth, deviations.smooth, strict=True))
            axes.fill_between(
                steps, [m - d for m, d in pairs], [m + d for m, d in pairs],
                color=colour, alpha=0.13, linewidth=0,
            )  # fmt: skip
    if points:
        x, y = [step for step, _, _ in points], [mean for _, mean, _ in points]
        half = [_HALF_WIDTH * (error or 0.0) for _, _, error in points]
        if any(half):
            axes.fill_between(
                x, [m - h for m, h in zip(y, half, strict=True)], [m + h for m, h in zip(y, half, strict=True)],
                color=COLOURS[place], alpha=0.16, linewidth=0,
            )  # fmt: skip
        axes.plot(x, y, marker="o", ms=4, color=COLOURS[place], label=points_label)
    if kept is not None:
        axes.axvline(kept, color=SOFT, linestyle=":", linewidth=1)
    axes.set_xlabel("iterations done")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.margins(y=0.12)
    if len(named) + bool(points) > 1:
        axes.legend(loc="best")


def _shares(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Per cent of the responses that are not complete, by status and iteration; nothing where it was not measured."""
    names = ["complete_share", *(f"{status}_share" for status in _INCOMPLETE)]
    whole = [row for row in rows if all(is_number(row.get(name)) for name in names)]
    if len(whole) < 2:
        return {}
    return {status: [100 * row[f"{status}_share"] for row in whole] for status in _INCOMPLETE}


def _draw_shares(axes: Axes, rows: Sequence[Row]) -> None:
    shares = _shares(rows)
    shown = {status: values for status, values in shares.items() if any(values)}
    done = range(len(next(iter(shares.values()))))
    if shown:
        axes.stackplot(
            done,
            *shown.values(),
            colors=[_INCOMPLETE[status][1] for status in shown],
            labels=[_INCOMPLETE[status][0] for status in shown],
            alpha=0.75,
            linewidth=0,
        )
        axes.legend(loc="upper right")
    most = max(sum(values) for values in zip(*shares.values(), strict=True))
    axes.set_xlim(0, done[-1])
    axes.set_ylim(0, min(100.0, max(1.35 * most, _LEAST_PERCENT)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("iterations done")


def _complete_shares(rows: Sequence[Row]) -> str:
    whole = [row["complete_share"] for row in rows if is_number(row.get("complete_share"))]
    first, last = (number(share, percent=True) for share in (whole[0], whole[-1]))
    return f"{first} of the responses end by themselves at first, {last} at last."


def _times(run: RunRecord, stage: str) -> list[dict[str, float]]:
    """Seconds of the phases of each iteration; one that was done again after a kill counts as it came out last."""
    by_iteration = {
        int(event["iteration"]): {
            phase: float(event[f"{phase}_seconds"])
            for phase in _PHASES
            if is_number(event.get(f"{phase}_seconds"))
        }
        for event in run.events
        if event.get("event") == "ppo_iteration"
        and event.get("stage") == stage
        and is_number(event.get("iteration"))
    }
    return [by_iteration[iteration] for iteration in sorted(by_iteration) if by_iteration[iteration]]


def _draw_times(axes: Axes, times: Sequence[Mapping[str, float]]) -> None:
    """Stacked bars of the phases; many iterations are averaged in groups."""
    group = -(-len(times) // _MOST_BARS)
    groups = [times[start : start + group] for start in range(0, len(times), group)]
    places = [group * place + 1 + (group - 1) / 2 for place in range(len(groups))]
    floor = [0.0] * len(groups)
    for place, (phase, label) in enumerate(_PHASES.items()):
        heights = [sum(one.get(phase, 0.0) for one in some) / len(some) for some in groups]
        axes.bar(places, heights, 0.85 * group, bottom=floor, color=COLOURS[place], alpha=0.85, label=label)
        floor = [low + height for low, height in zip(floor, heights, strict=True)]
    axes.set_ylim(0, 1.35 * max(*floor, 1e-9))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("iteration")
    axes.set_ylabel("seconds")
    axes.legend(loc="upper center", ncols=2)


def _time_shares(times: Sequence[Mapping[str, float]]) -> str:
    totals = {phase: sum(one.get(phase, 0.0) for one in times) for phase in _PHASES}
    whole = max(sum(totals.values()), 1e-9)
    shares = ", ".join(
        f"{_PHASES[phase]} {100 * seconds / whole:.0f}{PERCENT}" for phase, seconds in totals.items()
    )
    return f"{duration(whole / len(times))} in the mean: {shares}."


def before_and_after(stage: StageRecord) -> Html:
    """Responses to the same prompts by the policy as it started and as it was kept, side by side."""
    by_iteration: dict[int, dict[str, Row]] = {}
    for row in stage.samples:
        if isinstance(row.get("iteration"), int) and isinstance(row.get("response"), str):
            key = json.dumps(row.get("prompt"), sort_keys=True)
            by_iteration.setdefault(row["iteration"], {}).setdefault(key, row)
    if len(by_iteration) < 2:
        return Html("")
    first, last = min(by_iteration), max(by_iteration)
    kept = stage.metrics.get("kept_iteration")
    shown = dict.fromkeys([first, kept if kept in by_iteration else last, last])
    names = {step: f"after {step} iterations" if step else "before" for step in shown}
    sides = [
        Side(row["prompt"], {names[step]: by_iteration[step][key] for step in shown})
        for key, row in by_iteration[first].items()
        if all(key in by_iteration[step] for step in shown)
    ]
    if not sides:
        return Html("")
    blocks = [answers_block(side) for side in chosen(sides, _SAMPLES)]
    return folded("Samples before and after", *blocks)
