"""Reward models in the report: accuracy by rating, beside what noise allows and what trivial scorers reach."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama2_chat.dialogue import RATINGS
from llama2_chat.report.charts import draw_dots
from llama2_chat.report.markup import Html, element, figure, section, table
from llama2_chat.report.measures import Estimate, Measure, is_number, number, readable, share, written
from llama2_chat.report.run_record import RunRecord, StageRecord

ACCURACY = Measure("accuracy", "higher", percent=True)


def reward_models(run: RunRecord) -> Html:
    """The section: a figure and a table for each stage that reports accuracy by rating."""
    judges = [stage for stage in run.stages if accuracies(stage)]
    if not judges:
        return Html("")
    note = (
        "Share of held-out pairs in which the preferred answer scores higher, by how clearly it was preferred. "
        "Hollow marks: what annotation noise leaves attainable. Verticals: scorers that know nothing of content."
    )
    return section(
        "Reward models",
        element("p", note, class_="soft"),
        element("div", *(_judge(stage) for stage in judges), class_="columns"),
        identifier="reward-models",
    )


def accuracies(stage: StageRecord) -> dict[str, Estimate]:
    """Accuracy by rating (clear to negligible), overall and by safety class; only rows that were counted."""
    accuracy = _mapping(stage.metrics.get("accuracy"))
    by_rating = _mapping(accuracy.get("by_rating"))
    names = [name for name in RATINGS if name in by_rating] + [n for n in by_rating if n not in RATINGS]
    rows = {readable(name): share(by_rating[name]) for name in names}
    rows["overall"] = share(accuracy.get("overall"))
    rows |= {readable(name): share(row) for name, row in _mapping(accuracy.get("by_safety")).items()}
    return {name: row for name, row in rows.items() if row is not None}


def _by_source(stage: StageRecord) -> dict[str, Estimate]:
    """Accuracy of each source's pairs, where there are several sources."""
    sources = _mapping(stage.metrics.get("by_source"))
    rows = {f"source {name}": share(_mapping(row).get("overall")) for name, row in sources.items()}
    return {name: row for name, row in rows.items() if row is not None} if len(rows) > 1 else {}


def _attainable(stage: StageRecord) -> dict[str, float]:
    table_of = _mapping(stage.metrics.get("attainable_accuracy"))
    rows = {readable(name): share(row) for name, row in _mapping(table_of.get("by_rating")).items()}
    rows["overall"] = share(table_of.get("overall"))
    return {name: row.value for name, row in rows.items() if row is not None}


def _figure(stage: StageRecord) -> Html:
    found, attainable = accuracies(stage), _attainable(stage)
    controls = {
        readable(name): row.value
        for name, value in _mapping(stage.metrics.get("controls")).items()
        if (row := share(value)) is not None
    }
    return figure(
        draw_dots(
            "accuracy",
            [(name, [row]) for name, row in found.items()],
            ACCURACY,
            marks=[attainable.get(name) for name in found] if attainable else (),
            lines=controls,
        )
    )


def _judge(stage: StageRecord) -> Html:
    """One reward model's figure, table and other numbers, as a column."""
    attainable = _attainable(stage)
    rows = [
        [
            name,
            written(row, ACCURACY),
            *([number(attainable[name], percent=True) if name in attainable else ""] if attainable else []),
            number(row.count) if row.count is not None else "",
        ]
        for name, row in (accuracies(stage) | _by_source(stage)).items()
    ]
    head = ["pairs", "accuracy", *(["attainable"] if attainable else []), "count"]
    return element(
        "div",
        element("h3", stage.name),
        _figure(stage),
        table(head, rows),
        _other_numbers(stage.metrics),
    )


def _other_numbers(metrics: Mapping[str, Any]) -> Html:
    """Calibration, recall of unsafe answers, the gate and what length explains, as a sentence each."""
    sentences = []
    if is_number(metrics.get("calibration_error")):
        sentences.append(f"Calibration error (10 bins): {number(metrics['calibration_error'])}.")
    if is_number(metrics.get("unsafe_recall")):
        sentences.append(
            f"Recall of unsafe answers at 0.5: {number(metrics['unsafe_recall'], percent=True)}."
        )
    gate = _mapping(metrics.get("gate"))
    if gate.get("unsafe") and is_number(gate.get("precision")) and is_number(gate.get("recall")):
        sentences.append(
            f"Gate at 0.15: precision {number(gate['precision'], percent=True)}, "
            f"recall {number(gate['recall'], percent=True)}."
        )
    matched = _mapping(_mapping(metrics.get("matched_length")).get("tokens"))
    if (at_one_length := share(matched)) is not None:
        needed = matched.get("pairs_needed")
        sentences.append(
            f"Where lengths differ by at most 10 %, in tokens: {_with_interval(at_one_length)}"
            + (f"; to tell it from chance takes {needed:,} pairs." if isinstance(needed, int) else ".")
        )
    rule = _mapping(metrics.get("length_rule"))
    if (by_length := share(rule.get("evaluated"))) is not None:
        sentences.append(
            f"Best length rule of the training pairs ({rule.get('rule')}): {_with_interval(by_length)}."
        )
    controls = _mapping(metrics.get("controls"))
    sentences += [
        f"Control, {readable(name)}: {number(row.value, percent=True)}."
        for name, value in controls.items()
        if (row := share(value)) is not None
    ]
    return element("p", " ".join(sentences), class_="soft") if sentences else Html("")


def _with_interval(row: Estimate) -> str:
    text = number(row.value, percent=True)
    if row.low is not None and row.high is not None:
        text += f" ({number(row.low, percent=True)} to {number(row.high, percent=True)}"
        text += f", {number(row.count)} pairs)" if row.count is not None else ")"
    return text


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
