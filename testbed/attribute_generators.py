"""Generators of what is stated once and kept: attributes, instructions, and dialogues that wait for one.

As in `generators.py`, rows are a function of the arguments alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llama2_chat.testbed.attributes import attributes_without
from llama2_chat.testbed.dialogues import (
    SOURCE,
    attribute_questions,
    prompt_of,
    reference_answer,
    rng_of,
    waiting_questions,
)
from llama2_chat.testbed.family import Split

Row = dict[str, Any]


def attribute_dialogues(
    rows: int, seed: int, split: Split = "train", *, turns: int = 2, stated: Split | None = None
) -> Iterator[Row]:
    """Dialogues of exactly `turns` turns: attributes stated in the first, asked for (or kept) in the last.

    Every answer is a good one, the last included. With `stated` "train", held-out dialogues state values that
    training shows, in wordings that it shows: then what they ask for is memory alone.
    """
    rng = rng_of(f"attribute_dialogues {turns}", seed, split)
    for _ in range(rows):
        questions = attribute_questions(rng, split, turns, stated=stated)
        answer = {"role": "assistant", "content": reference_answer(questions[-1].request, rng)}
        yield {"messages": [*prompt_of(questions, rng), answer], "is_safety": False, "source": SOURCE}


def instructions(
    rows: int, seed: int, split: Split = "train", *, leave_out: Sequence[str] = ()
) -> Iterator[Row]:
    """Things to be kept throughout a dialogue, as Ghost Attention takes them, each with its short form.

    None is of an attribute that `leave_out` names.

    Raises:
        UserInputError: `leave_out` names no attribute, or all of them.
    """
    attributes = attributes_without(leave_out)
    rng = rng_of("instructions", seed, split)
    for _ in range(rows):
        attribute = rng.choice(attributes)
        value = attribute.draw(rng, split)
        yield {
            "instruction": attribute.instruct(value, rng, split),
            "short": attribute.instruct(value, rng, split, short=True),
            "group": attribute.name,
            "source": SOURCE,
        }


def instruction_dialogues(
    rows: int,
    seed: int,
    split: Split = "train",
    *,
    min_turns: int = 2,
    max_turns: int = 20,
    recalls: float = 0.75,
    leave_out: Sequence[str] = (),
) -> Iterator[Row]:
    """Dialogues that wait for an instruction: questions with answers, and a last question without.

    A share of `recalls` ends with a question that only its `group` of instructions answers, none of them of an
    attribute that `leave_out` names. The number of turns is uniform.

    Raises:
        UserInputError: `leave_out` names no attribute, or all of them.
    """
    attributes = attributes_without(leave_out)
    rng = rng_of("instruction_dialogues", seed, split)
    for _ in range(rows):
        turns = rng.randint(min_turns, max_turns)
        attribute = rng.choice(attributes) if rng.random() < recalls else None
        questions = waiting_questions(rng, split, turns, attribute)
        row: Row = {"messages": prompt_of(questions, rng), "is_safety": False, "source": SOURCE}
        yield row if attribute is None else {**row, "group": attribute.name}
