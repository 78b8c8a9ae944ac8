"""What was dropped from the data and why, from the counts that stages and imports keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llama2_chat.report.markup import Html, element, joined, section, table
from llama2_chat.report.measures import is_number, number, readable
from llama2_chat.report.run_record import RunRecord

REASONS = {
    "shortened": "oldest turns left out so that the rest fits the sequence length",
    "dropped": "the last turn alone is longer than the sequence length",
    "untrained": "no answer that the loss policy selects: nothing in the dialogue is trained",
    "unrated": "no rating: margin 0",
    "not_drawn": "usable, but more than the share that the mix takes of such files",
    "prompts_without_complete_answer": "no sample of the prompt ended by itself",
    "prompts_all_unsafe_dropped": "the safety model takes every answer for unsafe (when_all_unsafe)",
    "prompts_all_unsafe_kept": "the same, but the best answer is kept all the same",
    "too_long": "does not fit into a model: a question without room for an answer, or an answer with its question",
    "cut_off": "the answer reached the length limit",
    "empty": "the answer is empty",
    "chat_tag": "the answer holds a chat tag, which ends it",
    "incomplete": "an answer of the pair was cut off or is empty",
    "identical": "both variants gave the same answer",
    "seen_before": "the same prompt and answers as a pair before",
    "prefers_unsafe": "the preferred answer is the unsafe one of a safe and an unsafe one",
}
"""What the counts mean, in words."""

_NAMES = {
    "lengths": "dialogues",
    "sft lengths": "SFT dialogues mixed in",
    "selection": "prompts",
    "selection samples": "samples",
    "held out pairs": "held-out pairs",
    "held out prompts": "held-out prompts",
}
_USED = ("kept", "drawn", "complete", "imported", "read", "rows", "prompts")
_NOT_ROWS = ("accuracy", "attainable_accuracy", "controls", "gate", "intervals")


def data_account(run: RunRecord) -> Html:
    """The section; nothing if no stage counted its data."""
    rows = list(_data_rows(run))
    for stage in run.stages:
        rows += [["" if place else stage.name, *row] for place, row in enumerate(_accounts(stage.metrics))]
    if not rows:
        return Html("")
    seen = [reason for reason in REASONS if any(reason.replace("_", " ") in str(row[3]) for row in rows)]
    legend = element(
        "p",
        joined((joined([element("b", readable(reason)), f": {REASONS[reason]}"]) for reason in seen), "; "),
        ".",
        class_="soft",
    )
    return section(
        "What was dropped from the data, and why",
        table(["stage or data", "what", "used", "not used, or changed"], rows, texts=(0, 1, 3)),
        legend
        if seen
        else element("p", "Nothing was dropped, shortened or left without a rating.", class_="soft"),
        identifier="dropped",
    )


def _data_rows(run: RunRecord) -> Iterator[list[Any]]:
    """Data entries whose import or generation reports anything beside the rows it made."""
    for name, record in run.data.items():
        report = record.get("report")
        counts = dict(_counts(report)) if isinstance(report, Mapping) else {}
        rows = record.get("rows")
        if counts:
            others = {key: value for key, value in counts.items() if value and key not in _USED}
            yield [name, "data entry", number(rows) if isinstance(rows, int) else "", _listed(others)]


def _accounts(metrics: Mapping[str, Any], path: str = "") -> Iterator[list[Any]]:
    """Each mapping of metrics that counts what was kept, with everything else that it counts: name and counts."""
    for key, value in metrics.items():
        if key.startswith("dropped_") and isinstance(value, int):
            used = metrics.get(key.removeprefix("dropped_"))
            name = readable(f"{path} {key.removeprefix('dropped_')}")
            yield [
                _NAMES.get(name, name),
                number(used) if isinstance(used, int) else "",
                _listed({"dropped": value} if value else {}),
            ]
        if isinstance(value, list):
            yield from _by_file(value, path)
        if not isinstance(value, Mapping) or key in _NOT_ROWS:
            continue
        name = f"{path} {readable(key)}".strip()
        if "kept" in value or "complete" in value:
            used = value.get("drawn", value.get("kept", value.get("complete")))
            nested = {} if "kept" not in value else {k: v for k, v in value.items() if k == "samples"}
            flat = {k: v for k, v in value.items() if k not in nested}
            others = _unused(flat)
            yield [_NAMES.get(name, name), number(used) if is_number(used) else "", _listed(others)]
            yield from _accounts(nested, name)
        else:
            yield from _accounts(value, name)


def _by_file(rows: list[Any], path: str) -> Iterator[list[Any]]:
    """Of a list with a mapping for each of several files: each file's own counts."""
    for row in rows if len(rows) > 1 else ():
        if isinstance(row, Mapping) and "file" in row:
            counts = {**row.get("lengths", row), "untrained": row.get("untrained", 0)}
            used = counts.get("drawn", counts.get("kept", 0))
            yield [f"{path} of {row['file']}".strip(), number(used), _listed(_unused(counts))]


def _unused(counts: Mapping[str, Any]) -> dict[str, int]:
    """What was not used, or changed; of what was kept, a mix may have drawn a part."""
    not_drawn = counts.get("kept", 0) - counts["drawn"] if "drawn" in counts else 0
    named = dict(_counts(counts)) | {"not_drawn": not_drawn}
    return {key: value for key, value in named.items() if value and key not in _USED}


def _counts(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, int]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            # What dropped something is reason enough.
            yield from _counts(item, prefix if key == "dropped" else f"{prefix}{key}: ")
        elif isinstance(item, int) and not isinstance(item, bool):
            yield f"{prefix}{key}", item


def _listed(counts: Mapping[str, int]) -> Html:
    if not counts:
        return element("span", "nothing", class_="soft")
    lines = (f"{value:,} {key.replace('_', ' ')}" for key, value in counts.items())
    return joined(lines, ", ")
