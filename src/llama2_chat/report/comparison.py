"""Two runs beside one another: settings, results with differences, curves, answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama2_chat.errors import OutputFolderError, UserInputError
from llama2_chat.files import write_text
from llama2_chat.report.charts import draw_dots
from llama2_chat.report.curves import draw_overlay, metric_names
from llama2_chat.report.markup import Html, element, figure, figures, joined, page, section, table
from llama2_chat.report.measures import (
    Estimate,
    Measure,
    difference,
    duration,
    estimates,
    flat_numbers,
    number,
    policy_measure,
    readable,
    written,
)
from llama2_chat.report.overview import facts, missing_notice
from llama2_chat.report.policies import is_drawn_alone, measure_names
from llama2_chat.report.reward_models import ACCURACY, accuracies
from llama2_chat.report.run_record import RunRecord, read_run
from llama2_chat.report.samples import SETS, Side, answer_card, chosen, prompt_block, side_by_side
from llama2_chat.report.style import STYLE

Estimates = Mapping[str, Estimate]


def write_comparison(path_a: Path, path_b: Path, output: Path | None = None) -> Path:
    """Write the comparison of two runs, by default as `A/report-vs-NAME.html`; returns its path.

    Raises:
        UserInputError: one of them is no run directory, both are the same, or `output` cannot be written.
    """
    if path_a.resolve() == path_b.resolve():
        raise UserInputError(f"{path_a}: the two runs to compare are the same folder")
    a, b = read_run(path_a), read_run(path_b)
    file = output or path_a / f"report-vs-{path_b.resolve().name}.html"
    if file.is_dir():
        raise OutputFolderError(f"{file}: is a folder; name a file")
    try:
        write_text(file, comparison_page(a, b))
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise OutputFolderError(
            f"{file}: cannot be written ({error.strerror}); choose another place"
        ) from error
    return file


def comparison_page(a: RunRecord, b: RunRecord) -> str:
    """The whole page."""
    return page(
        f"{_name(a)} against {_name(b)}",
        element("h1", "Two runs compared"),
        _head("A", a),
        _head("B", b),
        _settings(a, b),
        _policies(a, b),
        _reward_models(a, b),
        _curves(a, b),
        _samples(a, b),
        _times(a, b),
        style=STYLE,
    )


def _name(run: RunRecord) -> str:
    return f"{run.name}, seed {run.seed} ({run.path.resolve().name})"


def _head(letter: str, run: RunRecord) -> Html:
    title = joined([element("span", letter, class_=f"run-{letter.lower()}"), f": {_name(run)}"])
    return joined([element("h3", title), missing_notice(run), facts(run)])


def _settings(a: RunRecord, b: RunRecord) -> Html:
    """Recipe keys and versions that differ."""
    flat_a, flat_b = dict(_flat(a.recipe)), dict(_flat(b.recipe))
    for flat, run in ((flat_a, a), (flat_b, b)):
        flat |= {f"environment: {key}": value for key, value in _flat(run.environment)}
    keys = [key for key in {**flat_a, **flat_b} if flat_a.get(key, "–") != flat_b.get(key, "–")]
    body = (
        table(["key", "A", "B"], [[k, flat_a.get(k, "–"), flat_b.get(k, "–")] for k in keys], texts=(0, 1, 2))
        if keys
        else element("p", "None: recipes and environments are the same.")
    )
    return section("Settings that differ", body, identifier="settings")


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Leaves of a nested mapping as texts by dotted key; lists count as leaves."""
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item if isinstance(item, str) else json.dumps(item, default=str)


def _policies(a: RunRecord, b: RunRecord) -> Html:
    """Every measure of every policy that both have, with the difference, in figures and in tables."""
    names = [name for name in a.evaluation if name in b.evaluation]
    both = {name: (estimates(a.evaluation[name]), estimates(b.evaluation[name])) for name in names}
    alone = [
        element("p", f"Only {letter} has: {', '.join(rest)}.", class_="soft")
        for letter, run in (("A", a), ("B", b))
        if (rest := [name for name in run.evaluation if name not in names])
    ]
    note = element(
        "p",
        "Differences are B − A; coloured for better or worse where the 95 % interval leaves out 0. The intervals "
        "cover the choice of held-out prompts (as if the runs had different ones, so they are wide where the "
        "prompts are the same), not the chance in training: another seed alone moves every figure. Rewards, "
        "violations and win rates are the word of each run’s own reward models.",
        class_="soft",
    )
    tables = [joined([element("h3", name), _measure_table(*pair)]) for name, pair in both.items()]
    drawn = figures(figure(svg) for svg in _policy_figures(both))
    return section("Policies", note if both else "", drawn, *tables, *alone, identifier="policies")


def _policy_figures(both: Mapping[str, tuple[Estimates, Estimates]]) -> Iterator[Html]:
    for measure in measure_names(row for pair in both.values() for row in pair):
        if is_drawn_alone(measure):
            rows = [(name, [pair[0].get(measure), pair[1].get(measure)]) for name, pair in both.items()]
            known = policy_measure(measure)
            yield draw_dots(known.label, rows, known, series=("A", "B"))


def _measure_table(a: Estimates, b: Estimates) -> Html:
    return _difference_table(
        [
            (policy_measure(name).label, a.get(name), b.get(name), policy_measure(name))
            for name in measure_names([a, b])
        ]
    )


def _difference_table(rows: Sequence[tuple[str, Estimate | None, Estimate | None, Measure]]) -> Html:
    head = [
        "measure",
        element("span", "A", class_="run-a"),
        element("span", "B", class_="run-b"),
        "difference",
    ]
    return table(
        head,
        [[label, written(x, m), written(y, m), _difference_cell(x, y, m)] for label, x, y, m in rows],
    )


def _difference_cell(a: Estimate | None, b: Estimate | None, measure: Measure) -> Html:
    if a is None or b is None:
        return Html("")
    change = difference(a, b)
    text = written(change, measure, signed=True)
    clear = change.low is not None and change.high is not None and (change.low > 0 or change.high < 0)
    if not clear or measure.better is None or measure.own_scale:
        return text
    good = (change.value > 0) == (measure.better == "higher")
    return element("span", text, class_="better" if good else "worse")


def _reward_models(a: RunRecord, b: RunRecord) -> Html:
    blocks = []
    for stage in a.stages:
        other = b.stage(stage.name)
        ours, theirs = accuracies(stage), accuracies(other) if other is not None else {}
        if ours and theirs:
            rows = [(name, ours.get(name), theirs.get(name), ACCURACY) for name in {**ours, **theirs}]
            blocks.append(joined([element("h3", stage.name), _difference_table(rows)]))
    return section("Reward models: accuracy", *blocks, identifier="reward-models")


def _curves(a: RunRecord, b: RunRecord) -> Html:
    """The main curves of the stages that both have, one over the other, and their last figures."""
    blocks = []
    for stage in a.stages:
        other = b.stage(stage.name)
        if other is None:
            continue
        shown = metric_names(stage)[0] + [
            n for n in metric_names(other)[0] if n not in metric_names(stage)[0]
        ]
        drawn = [figure(svg) for name in shown if (svg := draw_overlay(name, stage.series, other.series))]
        numbers = [
            dict(flat_numbers({k: v for k, v in s.metrics.items() if k != "accuracy"}))
            for s in (stage, other)
        ]
        changed = [
            (readable(name), Estimate(numbers[0][name]), Estimate(numbers[1][name]), Measure(name))
            for name in numbers[0]
            if name in numbers[1] and numbers[0][name] != numbers[1][name]
        ]
        details = (
            element("details", element("summary", "Figures that differ"), _difference_table(changed))
            if changed
            else ""
        )
        if drawn or changed:
            blocks.append(joined([element("h3", stage.name), figures(drawn), details]))
    return section("Training", *blocks, identifier="training")


def _samples(a: RunRecord, b: RunRecord) -> Html:
    """Answers of the last policy that both have, to prompts that both were given."""
    names = [name for name in a.samples if name in b.samples and a.samples[name] and b.samples[name]]
    if not names:
        return Html("")
    blocks: list[Html] = []
    for kind, (title, count) in SETS.items():
        sides = side_by_side({"A": a.samples[names[-1]], "B": b.samples[names[-1]]}, kind)
        common = [side for side in sides if len(side.answers) == 2]
        if common:
            blocks += [element("h3", title), *(_pair(side) for side in chosen(common, count))]
    if not blocks:
        text = "The two runs were given different held-out prompts (made from other seeds), so no answers compare."
        return section("Sample answers", element("p", text, class_="soft"), identifier="samples")
    note = element("p", f"Policy: {names[-1]}.", class_="soft")
    return section("Sample answers", note, *blocks, identifier="samples")


def _pair(side: Side) -> Html:
    cards = (
        answer_card(element("span", letter, class_=f"run-{letter.lower()}"), row)
        for letter, row in side.answers.items()
    )
    return element(
        "div", prompt_block(side.prompt), element("div", *cards, class_="answers"), class_="sample"
    )


def _times(a: RunRecord, b: RunRecord) -> Html:
    rows = [
        [stage.name, duration(stage.seconds), duration(other.seconds), _ratio(stage.seconds, other.seconds)]
        for stage in a.stages
        if stage.seconds is not None
        and (other := b.stage(stage.name)) is not None
        and other.seconds is not None
    ]
    return section("Time", table(["stage", "A", "B", "B / A"], rows) if rows else "", identifier="time")


def _ratio(a: float, b: float) -> str:
    return number(b / a) if a > 0 else ""
