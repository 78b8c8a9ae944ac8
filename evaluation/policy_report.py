"""A policy's figures as Markdown: all of them with their intervals, then refusals and violations by source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama2_chat.evaluation.statistics import Interval

_SETS = {
    "safety": "Unsafe prompts by source",
    "borderline": "Borderline prompts by source",
    "helpful": "Harmless prompts by source",
}
_COLUMNS = {
    "refusal_rate": "refusals",
    "violation_rate": "violations",
    "reward_safety_mean": "safety reward",
    "reward_helpfulness_mean": "helpfulness reward",
}


def policy_markdown(metrics: Mapping[str, Any]) -> str:
    """Tables of the fields of `policy_metrics` that have an interval."""
    lines = ["| measure | value | 95 % interval | count |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {row['mean']:.4f} | {row['low']:.4f} to {row['high']:.4f} | {row['count']} |"
        for name, row in metrics["intervals"].items()
    ]
    by_source = metrics.get("by_source", {})
    for name, title in _SETS.items():
        if name in by_source:
            lines += ["", f"## {title}", "", *_source_table(by_source[name])]
    return "\n".join(lines) + "\n"


def _source_table(figures: Mapping[str, Mapping[str, Interval]]) -> list[str]:
    """One row a source; the columns that any source has."""
    columns = [name for name in _COLUMNS if any(name in row for row in figures.values())]
    lines = [
        f"| source | prompts | {' | '.join(_COLUMNS[name] for name in columns)} |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for source, row in figures.items():
        cells = [_cell(row[name]) for name in columns]
        lines.append(f"| {source} | {row['refusal_rate']['count']} | {' | '.join(cells)} |")
    return lines


def _cell(interval: Interval) -> str:
    return f"{interval['mean']:.3f} ({interval['low']:.3f} to {interval['high']:.3f})"
