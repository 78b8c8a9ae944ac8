"""Sample answers in the report: the same prompts, every policy's answer side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama2_chat.report.markup import Html, element, joined, section
from llama2_chat.report.measures import is_number
from llama2_chat.report.run_record import Row, RunRecord

SETS = {
    "greedy": ("Helpful prompts, greedy answers", 6),
    "safety": ("Safety prompts", 4),
    "borderline": ("Harmless prompts that look unsafe", 3),
}
"""What is shown of each set of prompts: title and number of prompts."""

_LONGEST = 1500


@dataclass(frozen=True)
class Side:
    """One prompt with each policy's answer to it."""

    prompt: Any
    answers: Mapping[str, Row]

    @property
    def disagreement(self) -> float:
        """Range of the oracle's grades, or of the combined scores where there are none; without the base model.

        The base always lies far from the rest.
        """
        rows = [row for policy, row in self.answers.items() if policy != "base"]
        for score in (oracle_of, combined_of):
            values = [value for row in rows if (value := score(row)) is not None]
            if len(values) > 1:
                return max(values) - min(values)
        return 0.0


def samples(run: RunRecord) -> Html:
    """The section; nothing if no answers were kept."""
    blocks = []
    for name, (title, count) in SETS.items():
        sides = side_by_side(run.samples, name)
        if sides:
            blocks += [element("h3", title), *(answers_block(side) for side in chosen(sides, count))]
    if not blocks:
        return Html("")
    note = (
        "The first half of each group are the prompts on which the trained policies' answers differ most in "
        "quality; the rest are spread evenly over the held-out set."
    )
    return section("Sample answers", element("p", note, class_="soft"), *blocks, identifier="samples")


def side_by_side(by_policy: Mapping[str, Sequence[Row]], name: str) -> list[Side]:
    """The prompts of a set in order, each with the first answer of every policy that has one."""
    prompts: dict[str, Any] = {}
    answers: dict[str, dict[str, Row]] = {}
    for policy, rows in by_policy.items():
        for row in rows:
            if row.get("set") != name or not isinstance(row.get("response"), str):
                continue
            key = json.dumps(row.get("prompt"), sort_keys=True)
            prompts.setdefault(key, row.get("prompt"))
            answers.setdefault(key, {}).setdefault(policy, row)
    return [Side(prompt, answers[key]) for key, prompt in prompts.items()]


def chosen(sides: Sequence[Side], count: int) -> list[Side]:
    """Half where the answers differ most, half evenly spread; the same ones every time."""
    whole = max(len(side.answers) for side in sides)
    sides = [side for side in sides if len(side.answers) == whole]
    if len(sides) <= count:
        return list(sides)
    places = sorted(range(len(sides)), key=lambda place: (-sides[place].disagreement, place))
    picked = places[: (count + 1) // 2] if sides[places[0]].disagreement > 0 else []
    rest = [place for place in range(len(sides)) if place not in picked]
    wanted = count - len(picked)
    picked += [rest[(2 * k + 1) * len(rest) // (2 * wanted)] for k in range(wanted)]
    return [sides[place] for place in picked]


def answers_block(side: Side) -> Html:
    """The prompt above, the answers as cards beside one another; policies with one and the same share a card."""
    groups: dict[str, list[str]] = {}
    for policy, row in side.answers.items():
        groups.setdefault(json.dumps([row["response"], row.get("scores")]), []).append(policy)
    order = list(side.answers)
    cards = (answer_card(_joint_name(same, order), side.answers[same[0]]) for same in groups.values())
    return element(
        "div", prompt_block(side.prompt), element("div", *cards, class_="answers"), class_="sample"
    )


def _joint_name(same: Sequence[str], order: Sequence[str]) -> str:
    """`first to last` for three or more policies in a row, else all names."""
    places = [order.index(policy) for policy in same]
    in_a_row = places == list(range(places[0], places[0] + len(places)))
    return f"{same[0]} to {same[-1]}" if in_a_row and len(same) > 2 else ", ".join(same)


def answer_card(title: Any, row: Row) -> Html:
    """One answer with its scores."""
    text = str(row["response"])
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}… ({len(text):,} characters)"
    notes: list[str] = []
    if (combined := combined_of(row)) is not None:
        notes.append(joined(["R", element("sub", "c"), f" {combined:.2f}"]))
    if (graded := oracle_of(row)) is not None and row.get("set") != "safety":
        notes.append(f"oracle {graded:.2f}")
    if row.get("oracle_safe") is False:
        notes.append(element("span", "unsafe", class_="worse"))
    elif row.get("oracle_safe") is True and row.get("set") == "safety":
        notes.append("safe")
    if row.get("refused") is True:
        notes.append("refused")
    if row.get("status") not in (None, "complete"):
        notes.append(str(row["status"]).replace("_", " "))
    return element(
        "div",
        element("h4", title),
        element("p", text or element("span", "(empty)", class_="soft")),
        element("div", joined(notes, " · "), class_="scores") if notes else "",
        class_="answer",
    )


def combined_of(row: Row) -> float | None:
    """R_c of an answer."""
    scores = row.get("scores")
    value = scores.get("combined") if isinstance(scores, dict) else None
    return float(value) if is_number(value) and value is not None else None


def oracle_of(row: Row) -> float | None:
    """What the testbed's oracle grades an answer: its safety on safety prompts, else its helpfulness."""
    if row.get("set") == "safety":
        safe = row.get("oracle_safe")
        return float(safe) if isinstance(safe, bool) else None
    value = row.get("oracle_helpfulness")
    return float(value) if is_number(value) and value is not None else None


def prompt_block(messages: Any) -> Html:
    """The prompt's turns."""
    if not isinstance(messages, list):
        return element("div", messages, class_="prompt")
    turns = [message if isinstance(message, dict) else {"content": message} for message in messages]
    several = len(turns) > 1
    return element(
        "div",
        joined(
            (
                joined(
                    [
                        element("span", turn.get("role", ""), class_="role") if several else "",
                        turn.get("content", ""),
                    ]
                )
                for turn in turns
            ),
            "\n",
        ),
        class_="prompt",
    )
