"""RLHF versions in the report: what each one reached, its path (Fig. 11), and how reward models take new batches.

Versions are told by the `iteration` of rejection-sampling stages; what PPO and Ghost Attention make of it belongs to
the same version.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llama2_chat.report.charts import draw_against
from llama2_chat.report.markup import Html, element, figure, figures, joined, section, table
from llama2_chat.report.measures import Estimate, Measure, estimates, policy_measure, share, written
from llama2_chat.report.run_record import RunRecord, StageRecord

COLUMNS = (
    *("reward_helpfulness_mean", "reward_safety_mean", "independent_reward_mean"),
    *("oracle_helpfulness", "oracle_violation_rate", "violation_rate", "win_rate_vs_sft", "kl_to_sft_nats"),
)
"""Measures of a version's last policy."""

_AXES = (
    (
        "oracle_helpfulness",
        "oracle_violation_rate",
        "helpfulness by the oracle",
        "safe answers by the oracle",
    ),
    ("win_rate_vs_sft", "violation_rate", "win rate against SFT", "safe answers by the safety reward model"),
)
"""Helpfulness and violations, the first that are there: the truth where it is known."""

_ACCURACY = Measure("accuracy", "higher", percent=True)
_BATCH = re.compile(r"preferences:(\d+)")


@dataclass(frozen=True)
class Point:
    """One policy on the way: its name in table and figure, and its stage."""

    label: str
    policy: str


def versions(run: RunRecord) -> Html:
    """The section; nothing where there are fewer than two versions."""
    points = path_of(run)
    if sum(point.label.startswith("V") for point in points) < 2:
        return Html("")
    batches = joined(_accuracy_by_batch(run, domain) for domain in ("helpfulness", "safety"))
    return section(
        "RLHF versions",
        element(
            "p",
            "Each version's last policy, on the same held-out prompts, with 95 % intervals.",
            class_="soft",
        ),
        _table(run, points),
        _figure(run, points),
        batches,
        identifier="versions",
    )


def path_of(run: RunRecord) -> list[Point]:
    """SFT and the last policy of each version; where PPO made it, also the one that PPO started from."""
    points: list[Point] = []
    start: Point | None = None
    last: dict[int, list[StageRecord]] = {}
    number = None
    for stage in run.stages:
        iteration = stage.config.get("iteration")
        if stage.kind == "rejection_sampling" and isinstance(iteration, int):
            number = iteration
        if number is None:
            start = Point("SFT", stage.name) if stage.kind == "sft" and start is None else start
        elif stage.makes_policy and stage.kind != "context_distillation":
            last.setdefault(number, []).append(stage)
    points += [start] if start is not None else []
    for number, stages in last.items():
        kinds = [stage.kind for stage in stages]
        if "ppo" in kinds and kinds.index("ppo") > 0:
            points.append(Point(f"V{number} without PPO", stages[kinds.index("ppo") - 1].name))
        points.append(Point(f"V{number}", stages[-1].name))
    return [point for point in points if point.policy in run.evaluation]


def _table(run: RunRecord, points: list[Point]) -> Html:
    found = {point: estimates(run.evaluation[point.policy]) for point in points}
    shown = [name for name in COLUMNS if any(name in row for row in found.values())]
    rows = [
        [point.label, point.policy, *(written(row.get(name), policy_measure(name)) for name in shown)]
        for point, row in found.items()
    ]
    return table(["version", "policy", *(policy_measure(name).label for name in shown)], rows, texts=(0, 1))


def _figure(run: RunRecord, points: list[Point]) -> Html:
    """Helpfulness across, safety upwards, joined in order."""
    found = {point: estimates(run.evaluation[point.policy]) for point in points}
    for across, upwards, xlabel, ylabel in _AXES:
        placed = [
            (point.label, row[across], _complement(row[upwards]))
            for point, row in found.items()
            if across in row and upwards in row
        ]
        if len(placed) >= 2:
            svg, _ = draw_against("from SFT to the last version", placed, xlabel=xlabel, ylabel=ylabel)
            return figures([figure(svg, "The layout of Fig. 11: up and to the right is better.")])
    return Html("")


def _complement(violations: Estimate) -> Estimate:
    """The share of the others, with its interval turned over."""
    low = None if violations.high is None else 1.0 - violations.high
    high = None if violations.low is None else 1.0 - violations.low
    return Estimate(1.0 - violations.value, low, high, violations.count)


def _accuracy_by_batch(run: RunRecord, domain: str) -> Html:
    """A row for each of the domain's reward models, a column for each batch's held-out pairs; nothing without any."""
    rows = {
        stage.name: dict(_accuracies(stage))
        for stage in run.stages
        if stage.makes_reward_model and stage.config.get("domain") == domain
    }
    columns = sorted({name for row in rows.values() for name in row}, key=_batch_number)
    if not any(_batch_number(name) for name in columns):
        return Html("")
    head = [f"batch of V{number}" if (number := _batch_number(name)) else name for name in columns]
    cells = [
        [name, *(written(row.get(column), _ACCURACY) for column in columns)]
        for name, row in rows.items()
        if row
    ]
    note = (
        "Accuracy on pairs that no reward model was trained on, by where the pairs are from. A version's batch comes "
        "from the policies before it, and only later reward models could be measured on it."
    )
    return joined(
        [
            element("h3", f"{domain.capitalize()} reward models on each batch"),
            table(["reward model", *head], cells),
            element("p", note, class_="soft"),
        ]
    )


def _accuracies(stage: StageRecord) -> Iterator[tuple[str, Estimate]]:
    """Accuracy on the held-out pairs of each source."""
    sources = stage.metrics.get("by_source")
    for name, row in sources.items() if isinstance(sources, Mapping) else ():
        overall: Any = row.get("overall") if isinstance(row, Mapping) else None
        if (found := share(overall)) is not None:
            yield str(name), found


def _batch_number(source: str) -> int:
    """The version that a batch was collected for; 0 for pairs of another origin."""
    found = _BATCH.fullmatch(source)
    return int(found[1]) if found else 0
