"""A reward model's held-out metrics as a Markdown table in the layout of Table 8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama2_chat.dialogue import RATINGS


def accuracy_markdown(metrics: Mapping[str, Any]) -> str:
    """Accuracy by rating, overall and by safety labels, with counts, intervals and what noise allows."""
    accuracy, attainable = metrics["accuracy"], metrics.get("attainable_accuracy")
    lines = [
        "| pairs | accuracy | 95 % interval | count |" + (" attainable |" if attainable else ""),
        "|---|---|---|---|" + ("---|" if attainable else ""),
    ]
    rows: list[tuple[str, Any, tuple[str, ...]]] = [
        (rating, accuracy["by_rating"][rating], ("by_rating", rating)) for rating in RATINGS
    ]
    rows.append(("overall", accuracy["overall"], ("overall",)))
    rows += [(name, row, ()) for name, row in accuracy["by_safety"].items()]
    for name, row, place in rows:
        if row["count"] == 0:
            continue
        line = (
            f"| {name.replace('_', ' ')} | {row['accuracy']:.3f} | "
            f"{row['low']:.3f} to {row['high']:.3f} | {row['count']} |"
        )
        if attainable:
            line += f" {_at(attainable, place)} |"
        lines.append(line)
    lines.append("")
    for name, row in metrics["controls"].items():
        lines.append(f"Control, {name.replace('_', ' ')}: {row['accuracy']:.3f}  ")
    if metrics["unsafe_recall"] is not None:
        lines.append(f"Recall of unsafe responses at 0.5: {metrics['unsafe_recall']:.3f}  ")
    lines.append(f"Calibration error: {metrics['calibration_error']:.3f}")
    return "\n".join(lines) + "\n"


def _at(table: Mapping[str, Any], place: tuple[str, ...]) -> str:
    value: Any = table if place else None
    for key in place:
        value = value.get(key) if isinstance(value, Mapping) else None
    if isinstance(value, Mapping):
        value = value.get("accuracy")
    return "" if value is None else f"{value:.3f}"
