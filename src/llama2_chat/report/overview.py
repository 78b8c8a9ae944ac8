"""The head of the report: what ran where, the results in one table, the pipeline, the time it took."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Mapping
from typing import Any

from llama2_chat.report.graph import draw_pipeline
from llama2_chat.report.markup import Html, element, folded, joined, section, table
from llama2_chat.report.measures import (
    HEADLINE,
    duration,
    estimates,
    is_number,
    number,
    policy_measure,
    written,
)
from llama2_chat.report.run_record import RunRecord

_VERSIONS_SHOWN = ("torch", "transformers", "trl")


def heading(run: RunRecord) -> Html:
    """Title, facts and, if the run is not whole, what is missing."""
    return joined(
        [
            element("h1", f"{run.name}, seed {run.seed}"),
            element("p", _sentence(run), class_="soft"),
            missing_notice(run),
            _warnings(run),
            facts(run),
        ]
    )


def _warnings(run: RunRecord) -> Html:
    """What stages warned of, and what PPO's guards found."""
    said = dict.fromkeys(
        f"{event.get('stage', 'run')}: {event['message']}"
        if event.get("event") == "warning"
        else f"{event.get('stage', 'run')}: iteration {event.get('iteration')}: {event['reason']}"
        for event in run.events
        if (event.get("event") == "warning" and event.get("message"))
        or (event.get("event") == "guard" and event.get("reason"))
    )
    if not said:
        return Html("")
    return element("div", element("ul", *(element("li", line) for line in said)), class_="notice")


def missing_notice(run: RunRecord, label: str = "") -> Html:
    """What an unfinished or damaged run lacks."""
    if not run.missing:
        return Html("")
    items = (element("li", f"{label}{sentence}") for sentence in run.missing)
    return element("div", element("ul", *items), class_="notice")


def _sentence(run: RunRecord) -> str:
    done = sum(stage.done for stage in run.stages)
    count = f"{done} of {len(run.stages)} stages done" if done < len(run.stages) else f"{done} stages"
    policies = len(run.evaluation)
    judged = f", {policies} policies evaluated on the same held-out prompts" if policies else ""
    return f"Llama 2-Chat recipe “{run.name}”: {count}{judged}. Intervals are 95 %."


def facts(run: RunRecord) -> Html:
    """Date, hardware and versions; a fact that is not known is left out."""
    environment = run.environment
    pairs: list[tuple[str, Any]] = []
    ended = finished_at(run)
    if ended is not None:
        pairs.append(("Date", f"{ended.day} {ended:%B %Y, %H:%M} UTC"))
    if run.stages and any(stage.seconds is not None for stage in run.stages):
        total = sum(stage.seconds or 0.0 for stage in run.stages)
        evaluation = sum(evaluation_seconds(run).values())
        rest = f" and {duration(evaluation)} of evaluation" if evaluation else ""
        pairs.append(("Time", f"{duration(total)} of stages{rest}"))
    if environment.get("processor"):
        pairs.append(("Hardware", _hardware(environment)))
    packages = environment.get("packages")
    packages = packages if isinstance(packages, Mapping) else {}
    versions = [f"llama2-chat {environment['llama2_chat']}"] if environment.get("llama2_chat") else []
    versions += [f"{name} {packages[name]}" for name in _VERSIONS_SHOWN if name in packages]
    if environment.get("python"):
        versions.append(f"Python {environment['python']}")
    if versions:
        pairs.append(("Versions", ", ".join(versions)))
    if environment.get("git"):
        pairs.append(("Commit", element("code", environment["git"])))
    settings = [
        f"{key.replace('_', ' ')} {run.recipe[key]}"
        for key in ("chat_format", "precision", "device")
        if key in run.recipe
    ]
    if settings:
        pairs.append(("Settings", ", ".join(settings)))
    return element("dl", *(joined([element("dt", k), element("dd", v)]) for k, v in pairs), class_="facts")


def _hardware(environment: Mapping[str, Any]) -> str:
    text = str(environment["processor"])
    if is_number(environment.get("cores")):
        text += f", {environment['cores']} cores"
    if is_number(environment.get("memory_bytes")):
        text += f", {environment['memory_bytes'] / 2**30:.0f} GiB"
    gpus = environment.get("gpus")
    return "; ".join([text, *map(str, gpus if isinstance(gpus, list) else [])])


def finished_at(run: RunRecord) -> datetime.datetime | None:
    """When the last result was made; a later call that found nothing to do does not count."""
    for event in reversed(run.events):
        if event.get("event") in ("stage_finished", "policy_evaluated"):
            try:
                return datetime.datetime.fromisoformat(str(event.get("time"))).astimezone(datetime.UTC)
            except ValueError:
                continue
    return None


def _was_interrupted(run: RunRecord) -> bool:
    """Whether a stage that is done was started more than once for it."""
    starts: Counter[str] = Counter()
    for event in run.events:
        stage = str(event.get("stage"))
        if event.get("event") == "stage_started":
            starts[stage] += 1
        elif event.get("event") == "stage_finished":
            if starts[stage] > 1:
                return True
            starts[stage] = 0
    return False


def results(run: RunRecord) -> Html:
    """One row for each policy: the headline measures that there are."""
    by_policy = {name: estimates(metrics) for name, metrics in run.evaluation.items()}
    shown = [name for name in HEADLINE if any(name in found for found in by_policy.values())]
    if not shown:
        return Html("")
    measures = {name: policy_measure(name) for name in shown}
    rows = [
        [policy, *(written(found.get(name), measures[name]) for name in shown)]
        for policy, found in by_policy.items()
    ]
    return section(
        "Results",
        table(["policy", *(measures[name].label for name in shown)], rows),
        identifier="results",
    )


def pipeline(run: RunRecord) -> Html:
    """The graph of stages."""
    if not run.stages:
        return Html("")
    note = (
        "Each lane is a model, from the stage that makes it to the stages that use it; "
        "blue are policies, orange reward models, grey boxes make data alone. The second line of a box: data → output."
    )
    return section(
        "The pipeline as run",
        element("div", draw_pipeline(run), class_="wide"),
        element("p", note, class_="soft"),
        identifier="pipeline",
    )


def times(run: RunRecord) -> Html:
    """Time of each stage as bars, with the rates that the events hold."""
    seconds = {stage.name: stage.seconds for stage in run.stages if stage.seconds is not None}
    seconds |= {f"evaluation of {name}": value for name, value in evaluation_seconds(run).items()}
    if not seconds:
        return Html("")
    total, longest = sum(seconds.values()), max(seconds.values())
    rates = _rates(run)
    rows = [
        [
            name,
            element("span", class_="bar", style=f"width:{max(0.5, 100 * value / max(longest, 1e-9)):.1f}%"),
            duration(value),
            f"{100 * value / max(total, 1e-9):.0f} %",
            rates.get(name, ""),
        ]
        for name, value in seconds.items()
    ]
    head = ["stage", "", "time", "share", "rate"]
    body = table([*head[: 4 + bool(rates)]], (row[: 4 + bool(rates)] for row in rows), texts=(0, 1))
    note = "A stage that was interrupted counts from its last start." if _was_interrupted(run) else ""
    return section(
        "Time",
        element("div", body, class_="bars"),
        element("p", note, class_="soft") if note else "",
        identifier="time",
    )


def evaluation_seconds(run: RunRecord) -> dict[str, float]:
    """Seconds of each policy's last evaluation."""
    return {
        str(event["policy"]): float(event["seconds"])
        for event in run.events
        if event.get("event") == "policy_evaluated"
        and event.get("policy") in run.evaluation
        and is_number(event.get("seconds"))
    }


def _rates(run: RunRecord) -> dict[str, Html]:
    """What the events say was done per second, by stage.

    A `…_rate` event counts things beside its `seconds`; others may have `NAME_tokens` with `NAME_seconds`.
    """
    rates: dict[str, dict[str, float]] = {}
    for event in run.events:
        found = rates.setdefault(str(event.get("stage")), {})
        numbers = {name: value for name, value in event.items() if is_number(value)}
        if str(event.get("event", "")).endswith("_rate") and numbers.get("seconds", 0) > 0:
            found |= {n: v / numbers["seconds"] for n, v in numbers.items() if n != "seconds"}
        for name, value in numbers.items():
            seconds = numbers.get(name.removesuffix("_tokens") + "_seconds", 0)
            if name.endswith("_tokens") and seconds > 0:
                found[name] = value / seconds
    return {
        stage: joined(
            (f"{number(round(value))} {name.replace('_', ' ')}/s" for name, value in found.items()),
            element("br"),
        )
        for stage, found in rates.items()
        if found
    }


def resolved_recipe(run: RunRecord) -> Html:
    """The whole recipe as it ran, folded."""
    text = (run.path / "recipe.yaml").read_text(encoding="utf-8", errors="replace")
    packages = run.environment.get("packages")
    versions = "\n".join(f"{k} {v}" for k, v in packages.items()) if isinstance(packages, Mapping) else ""
    return section(
        "The recipe",
        folded("recipe.yaml, every default written out", element("pre", text)),
        folded("versions of the packages", element("pre", versions)) if versions else "",
        identifier="recipe",
    )
