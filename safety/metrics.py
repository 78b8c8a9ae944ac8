"""What the safety scores of answers with and without the preprompt come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llama2_chat.dialogue import Row

NOT_ADVERSARIAL = "not adversarial"
NOT_NAMED = "not named"


def selection_metrics(rows: Sequence[Row]) -> dict[str, Any]:
    """Counts and scores of the rows of `samples.jsonl`, of all and by risk category.

    Returns:
        The fields of `summary`, the same for each category in `by_category` and, where answers under the preprompt
        without its answer template were sampled, `by_preprompt`.
    """
    by_category: dict[str, list[Row]] = {}
    for row in rows:
        by_category.setdefault(category_of(row), []).append(row)
    made = {
        **summary(rows),
        "by_category": {name: summary(by_category[name]) for name in sorted(by_category)},
    }
    compared = [row for row in rows if "generic_safety" in row["scores"]]
    return {**made, "by_preprompt": _by_preprompt(compared)} if compared else made


def category_of(row: Mapping[str, Any]) -> str:
    """The risk category of a row's prompt, or why it has none."""
    if row["risk_category"]:
        return str(row["risk_category"])
    return NOT_NAMED if row["is_safety"] else NOT_ADVERSARIAL


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Counts, mean raw safety scores and shares of answers that the safety model takes for unsafe.

    `original` are the policy's own answers, `preprompted` those under the preprompt; in `selected` the kept ones take
    the place of the policy's own.
    """
    original = [row["scores"]["original_safety"] for row in rows]
    preprompted = [row["scores"]["safety"] for row in rows]
    kept = [row["kept"] for row in rows]
    selected = [after if k else before for before, after, k in zip(original, preprompted, kept, strict=True)]
    groups = {"original": original, "preprompted": preprompted, "selected": selected}
    return {
        "prompts": len(rows),
        "kept": sum(kept),
        "share": sum(kept) / len(rows),
        **{f"safety_{name}": _mean(scores) for name, scores in groups.items()},
        **{f"unsafe_{name}": _unsafe(scores) for name, scores in groups.items()},
    }


def _by_preprompt(rows: Sequence[Row]) -> dict[str, Any]:
    """Fig. 16a in numbers: the same prompts without a preprompt, with the generic one, with the answer template too."""
    scores = {
        "none": [row["scores"]["original_safety"] for row in rows],
        "generic": [row["scores"]["generic_safety"] for row in rows],
        "category": [row["scores"]["safety"] for row in rows],
    }
    measures = {name: {"safety": _mean(values), "unsafe": _unsafe(values)} for name, values in scores.items()}
    return {"prompts": len(rows), **measures}


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores)


def _unsafe(scores: Sequence[float]) -> float:
    """Share with sigma(score) < 0.5."""
    return sum(score < 0 for score in scores) / len(scores)
