"""Instructions put together from lists, and lists that the policy itself is asked for (A.3.5).

A sampled list is cleaned: an item is a numbered or bulleted line, or where no line is, a line or the parts of a line
between commas. Its number, bullet, markup, quotes, final punctuation and whatever explains it after a colon, a dash
or a bracket go. Items that are repeated, longer than `MOST_WORDS` or `MOST_CHARACTERS`, without a letter, with a chat
tag or without a check that they should have are dropped and recorded with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from llama2_chat.chat_format import ChatFormat
from llama2_chat.dialogue import CHAT_TAGS, Message, Row
from llama2_chat.errors import UserInputError
from llama2_chat.generation.answers import Answer, sample_answers
from llama2_chat.generation.engine import GenerationEngine
from llama2_chat.ghost_attention.checks import parse_check
from llama2_chat.ghost_attention.config import VALUE, InstructionList
from llama2_chat.jsonl import read_rows, write_rows
from llama2_chat.settings import SamplingConfig

MOST_WORDS = 5
MOST_CHARACTERS = 40

_MARKED = re.compile(r"\s*(?:\(?\d{1,3}[.):]\)?|[-*•–+]|[A-Za-z][.)])\s+(?=\S)")
_MARKUP = re.compile(r"[*_`#]+|\[(?=[^\]]*\]\()|\]\([^)]*\)")
_EXPLANATION = re.compile(r"\s*(?::\s|:$|\s[-–—]\s|\s?[(\[]|—|(?<=[a-z]{3})\.\s)")
_OUTSIDE = " \t.,;:!?\"'“”‘’«»()[]"


def ask_lists(
    file: Path,
    lists: Mapping[str, InstructionList],
    engine: GenerationEngine,
    chat_format: ChatFormat,
    *,
    sampling: SamplingConfig,
    seed: int,
) -> None:
    """Ask the policy for every list that has a question; what it said and what is left of it goes to `file`.

    Raises:
        UserInputError: no item of a list can be used.
    """
    asked = {group: spec for group, spec in lists.items() if spec.question is not None}
    rows = []
    for group, spec in asked.items():
        assert spec.question is not None
        (answers,) = sample_answers(
            engine,
            chat_format,
            [(Message("user", spec.question),)],
            samples_per_prompt=spec.answers,
            sampling=sampling,
            seed=seed,
        )
        values, dropped = clean_items([_items_of_answer(answer) for answer in answers], spec.check)
        if not values:
            raise UserInputError(
                f'instruction_lists.{group}: no item of the policy\'s list can be used; asked "{spec.question}", it '
                f'answered "{answers[0].text[:200]}"; ask otherwise, raise answers, or write the values down'
            )
        rows.append(
            {
                "group": group,
                "question": spec.question,
                "answers": [answer.text for answer in answers],
                "statuses": [answer.status for answer in answers],
                "values": values,
                "dropped": dropped,
            }
        )
    write_rows(file, rows)


def instruction_rows(lists: Mapping[str, InstructionList], asked: Path | None) -> list[Row]:
    """Every list's instructions as rows of an instructions file.

    Args:
        asked: What `ask_lists` wrote, where a list has a question.
    """
    answered = {} if asked is None else {row["group"]: row["values"] for _, row in read_rows(asked)}
    return [
        _row(group, spec, value.strip())
        for group, spec in lists.items()
        for value in (spec.values or answered[group])
    ]


def clean_items(lists: Sequence[Sequence[str]], check: str | None = None) -> tuple[list[str], list[Row]]:
    """The items that can be used, in order, and the others with the reason: `{"item", "reason"}`.

    Args:
        lists: Items as they stand in each answer.
        check: The program that each must make sense in, with `{value}` where it stands.
    """
    values: dict[str, str] = {}
    dropped: list[Row] = []
    for raw in (item for items in lists for item in items):
        item = _without_markup(raw)
        reason = _unusable(raw, item, check)
        if reason is None and item.casefold() in values:
            reason = "repeated"
        if reason is None:
            values[item.casefold()] = item
        else:
            dropped.append({"item": raw.strip(), "reason": reason})
    return list(values.values()), dropped


def items_of(text: str) -> list[str]:
    """The items of a list as a model writes it: marked lines, else lines, else what stands between commas."""
    lines = [line for line in text.splitlines() if line.strip()]
    marked = [line for line in lines if _MARKED.match(line)]
    if marked:
        return [_MARKED.sub("", line, count=1) for line in marked]
    lines = [line for line in lines if not line.rstrip().endswith(":")]
    if len(lines) > 1 and not any("," in line for line in lines):
        return lines
    joined = " ".join(lines)
    listed = joined.split(":", 1)[1] if ":" in joined.split(",", 1)[0] else joined
    return [item for item in re.split(r",\s*(?:and\s+|or\s+)?|\s+and\s+|;", listed) if item.strip()]


def _items_of_answer(answer: Answer) -> list[str]:
    """Where an answer was cut off its last item is most likely cut too."""
    items = items_of(answer.text)
    return items[:-1] if answer.status == "cut_off" else items


def _without_markup(item: str) -> str:
    text = _MARKUP.sub("", item).strip(_OUTSIDE)
    return _EXPLANATION.split(text, maxsplit=1)[0].strip(_OUTSIDE)


def _unusable(raw: str, item: str, check: str | None) -> str | None:
    if any(tag in raw for tag in CHAT_TAGS):
        return "chat tag"
    if not any(character.isalpha() for character in item):
        return "no letter"
    if len(item.split()) > MOST_WORDS or len(item) > MOST_CHARACTERS:
        return "too long"
    if check is not None:
        try:
            parse_check(check.replace(VALUE, item))
        except ValueError:
            return "no check"
    return None


def _row(group: str, spec: InstructionList, value: str) -> Row:
    row: Row = {"instruction": spec.template.replace(VALUE, value), "group": group}
    if spec.short is not None:
        row["short"] = spec.short.replace(VALUE, value)
    if spec.check is not None:
        row["check"] = spec.check.replace(VALUE, value)
    return row
