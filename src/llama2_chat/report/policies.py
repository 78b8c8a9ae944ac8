"""Policies in the report: every measure over the stages in order, KL against reward, recall over turns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from llama2_chat.report.charts import draw_against, draw_dots, draw_path
from llama2_chat.report.curves import series_of
from llama2_chat.report.markup import Html, element, figure, figures, folded, section, table
from llama2_chat.report.measures import (
    Estimate,
    estimates,
    is_number,
    number,
    policy_measure,
    readable,
    written,
)
from llama2_chat.report.recall import RECALL, SHOWN, recall
from llama2_chat.report.run_record import RunRecord, StageRecord

KL, REWARD = "kl_to_sft_nats", "reward_helpfulness_mean"
BREAKDOWN = "_by_"
"""In the name of a figure for each attribute or family."""


def policies(run: RunRecord) -> Html:
    """The section; nothing if no policy was evaluated."""
    by_policy = {name: estimates(metrics) for name, metrics in run.evaluation.items()}
    names = measure_names(by_policy.values())
    if not names:
        return Html("")
    drawn = [
        draw_dots(
            policy_measure(name).label,
            [(policy, [found.get(name)]) for policy, found in by_policy.items()],
            policy_measure(name),
        )
        for name in names
        if is_drawn_alone(name)
    ]
    return section(
        "Policies",
        element(
            "p", "One row for each policy, in the order of the stages, with 95 % intervals.", class_="soft"
        ),
        figures(figure(svg) for svg in drawn),
        recall(run),
        folded("All figures as a table", _table(by_policy, names)),
        identifier="policies",
    )


def is_drawn_alone(name: str) -> bool:
    """Whether a figure has a drawing of its own: recall is drawn over the turns, breakdowns stand in the table."""
    return not name.startswith((RECALL, SHOWN)) and BREAKDOWN not in name


def measure_names(found: Iterable[Mapping[str, Estimate]]) -> list[str]:
    """Names of all measures that any policy has, in order."""
    names: dict[str, None] = {}
    for row in found:
        names |= dict.fromkeys(row)
    return list(names)


def _table(by_policy: Mapping[str, Mapping[str, Estimate]], names: list[str]) -> Html:
    rows = [
        [
            policy_measure(name).label,
            *(written(row.get(name), policy_measure(name)) for row in by_policy.values()),
        ]
        for name in names
    ]
    return table(["measure", *by_policy], rows)


def kl_against_reward(run: RunRecord) -> Html:
    """How far each policy has moved from SFT and what reward that bought; the path of every PPO stage."""
    drawn = []
    points = [
        (policy, found[KL], found[REWARD])
        for policy, metrics in run.evaluation.items()
        if KL in (found := estimates(metrics)) and REWARD in found
    ]
    if len(points) >= 2:
        svg, far = draw_against(
            "policies", points, xlabel="KL to SFT, nats", ylabel="helpfulness reward, mean"
        )
        outside = "; ".join(
            f"{policy} at {number(x.value)} nats, reward {number(y.value)}"
            for policy, x, y in points
            if policy in far
        )
        drawn.append(figure(svg, f"Outside the figure: {outside}." if outside else None))
    for stage in run.stages:
        path = _path(stage)
        if path is not None:
            kl, reward, way = path
            drawn.append(
                figure(
                    draw_path(
                        f"{stage.name}, step by step", way, xlabel=readable(kl), ylabel=readable(reward)
                    ),
                    "Averages over a few steps; light where training begins, dark where it ends.",
                )
            )
    return section("KL against reward", figures(drawn), identifier="kl")


def _path(stage: StageRecord) -> tuple[str, str, list[tuple[float, float]]] | None:
    """KL and reward over a stage's steps, if it logs both."""
    keys: dict[str, None] = {}
    for row in stage.series:
        keys |= dict.fromkeys(key for key, value in row.items() if is_number(value))
    kl = next((key for key in keys if key == "kl_nats"), None) or next(
        (key for key in keys if key.startswith("kl") and "coefficient" not in key), None
    )
    words = ("helpfulness", "reward", "score", "combined")
    reward = next((key for word in words for key in keys if word in key and "std" not in key), None)
    if kl is None or reward is None:
        return None
    x, y = series_of(stage.series, kl), series_of(stage.series, reward)
    if x is None or y is None or x.steps != y.steps:
        return None
    return kl, reward, list(zip(x.smooth, y.smooth, strict=True))
