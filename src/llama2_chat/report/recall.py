"""What policies keep over the turns of a dialogue: figures, and Ghost Attention in the layout of Table 30."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from llama2_chat.report.charts import draw_lines
from llama2_chat.report.markup import Html, element, figure, figures, joined, table
from llama2_chat.report.measures import Estimate, Measure, estimates, written
from llama2_chat.report.run_record import RunRecord

RECALL, SHOWN = "attribute_recall.", "attribute_shown."
"""What is asked for at a turn, and what shows in every answer without being asked for."""

_TITLES = {
    RECALL: ("attribute recall", "turn at which it is asked for"),
    SHOWN: ("language of the answers kept", "turn"),
}
_SHARE = Measure("share", "higher", percent=True)


def recall(run: RunRecord) -> Html:
    """A figure for either measure, a line for each policy, and a table for each Ghost Attention stage."""
    by_policy = {name: estimates(metrics) for name, metrics in run.evaluation.items()}
    drawn = []
    for prefix, (title, xlabel) in _TITLES.items():
        lines = [(name, _points(found, prefix)) for name, found in by_policy.items()]
        lines = [(name, points) for name, points in lines if points]
        if lines:
            drawn.append(figure(draw_lines(title, lines, xlabel=xlabel, percent=True)))
    return joined([figures(drawn), *_tables(run, by_policy)])


def _points(found: Mapping[str, Estimate], prefix: str) -> list[tuple[float, Estimate]]:
    """A measure by turn, in order."""
    turns = {name.removeprefix(prefix): row for name, row in found.items() if name.startswith(prefix)}
    return sorted((float(turn), row) for turn, row in turns.items() if turn.isdigit())


def _tables(run: RunRecord, by_policy: Mapping[str, Mapping[str, Estimate]]) -> Iterator[Html]:
    """Turns down, what the stage started from and what came of it across, as in Table 30."""
    for stage in run.stages:
        before = str(stage.config.get("policy"))
        if stage.kind != "ghost_attention" or not {before, stage.name} <= set(by_policy):
            continue
        for prefix, (title, _) in _TITLES.items():
            left, right = (dict(_points(by_policy[name], prefix)) for name in (before, stage.name))
            turns = [turn for turn in left if turn in right]
            if turns:
                head = ["turn", f"baseline ({before})", f"+ GAtt ({stage.name})"]
                yield element("h3", f"{stage.name}: {title} (layout of Table 30)")
                yield table(
                    head,
                    (
                        [f"{turn:g}", written(left[turn], _SHARE), written(right[turn], _SHARE)]
                        for turn in turns
                    ),
                )
