"""Nothing held out, neither item nor wording nor value, stands in anything that is trained on."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from llama2_chat.testbed.attributes import ATTRIBUTES
from llama2_chat.testbed.family import HELD_OUT_ONE_IN, Family, fill
from llama2_chat.testbed.generators import GENERATORS
from llama2_chat.testbed.lexicon import LEGS, OPPOSITES
from llama2_chat.testbed.request import FAMILIES, read_request
from llama2_chat.testbed.risky_families import BORDERLINE_FAMILIES, UNSAFE_FAMILIES
from llama2_chat.testbed.wording import HELD_OUT_JAILBREAKS, JAILBREAKS


def texts_of(row: dict[str, Any]) -> Iterator[str]:
    """Every text in a row of whatever format."""
    if "text" in row:
        yield row["text"]
    for key in ("instruction", "short"):
        if key in row:
            yield row[key]
    for key in ("messages", "prompt", "chosen", "rejected"):
        for message in row.get(key, ()):
            yield message["content"]


@pytest.fixture(scope="module")
def training_text() -> str:
    """Thousands of rows of everything that is trained on, one text a line."""
    rows = itertools.chain(
        GENERATORS["pretraining_text"](rows=4000, seed=0),
        GENERATORS["demonstrations"](rows=3000, seed=1),
        GENERATORS["demonstrations"](rows=500, seed=2, unsafe=1.0),
        GENERATORS["preferences"](rows=500, seed=3),
        GENERATORS["preferences"](rows=500, seed=4, domain="safety"),
        GENERATORS["prompts"](rows=1000, seed=5),
        GENERATORS["attribute_dialogues"](rows=500, seed=6),
        GENERATORS["instructions"](rows=1000, seed=7),
        GENERATORS["instruction_dialogues"](rows=500, seed=8),
    )
    return "\n".join(text.lower() for row in rows for text in texts_of(row))


def items(family: Family) -> Iterator[dict[str, str]]:
    """Every item of a family whose arguments are few enough to be listed."""
    numbers = {"add": (range(10, 70), range(2, 10)), "subtract": (range(12, 80), range(2, 10))}
    if family.name in numbers:
        for a, b in itertools.product(*numbers[family.name]):
            yield {"a": str(a), "b": str(b)}
    elif family.name == "neighbour":
        for side, a in itertools.product(("after", "before"), range(11, 150)):
            yield {"side": side, "a": str(a)}
    elif family.name in ("legs", "opposites"):
        for a, b in itertools.permutations(LEGS if family.name == "legs" else OPPOSITES, 2):
            yield {"a": a, "b": b}
    else:
        names = list(family.slots)
        for values in itertools.product(*(slot.split("|") for slot in family.slots.values())):
            yield dict(zip(names, (value.replace(r"\s", " ") for value in values), strict=True))


LISTED = [
    family for family in FAMILIES if family.name in ("add", "subtract", "neighbour", "legs", "opposites")
]
LISTED += [family for family in FAMILIES if family.name == "translate"]
LISTED += [*UNSAFE_FAMILIES, *BORDERLINE_FAMILIES]


@pytest.mark.parametrize("family", LISTED, ids=lambda family: family.name)
def test_no_held_out_item_occurs_in_training_text(family: Family, training_text: str) -> None:
    """Every question and every statement about every held-out item, searched for word by word."""
    held_out = [item for item in items(family) if family.is_held_out(item)]
    training = [item for item in items(family) if not family.is_held_out(item)]
    assert len(held_out) >= 4
    assert not found_in(training_text, family, held_out)
    # The same search finds training items, so it would have found these.
    assert len(found_in(training_text, family, training[:40])) > 10


def found_in(text: str, family: Family, some: list[dict[str, str]]) -> set[str]:
    """Every question and every telling statement about `some` items that stands in `text`."""
    wordings = (*family.questions, *family.held_out_questions)
    phrases = {fill(wording, item).lower() for item in some for wording in wordings}
    telling = [text for text in family.statements if all(f"{{{slot}}}" in text for slot in family.slots)]
    assert telling
    for item in some:
        phrases |= {fill(wording, {**item, "value": family.solve(item)}).lower() for wording in telling}
    # The plain search is quick; the pattern then rules out that "3 plus 4" was found in "13 plus 4".
    found = {phrase for phrase in phrases if phrase in text}
    return {phrase for phrase in found if re.search(rf"(?<!\w){re.escape(phrase)}", text)}


def test_no_prompt_in_training_is_held_out() -> None:
    """Read back from the text of every kind of training row: items and wordings are training ones."""
    seen: Counter[str] = Counter()
    for name in ("demonstrations", "prompts", "safety_prompts", "borderline_prompts", "preferences"):
        for row in GENERATORS[name](rows=1500, seed=20):
            prompt = row["messages"][:-1] if "messages" in row else row["prompt"]
            request = read_request(prompt)
            assert not request.family.is_held_out(request.arguments)
            seen[request.family.name] += 1
    assert len(seen) == len(FAMILIES) + 3  # and the three attributes that can be asked for


def test_held_out_prompts_are_held_out_in_item_and_wording() -> None:
    seen: Counter[str] = Counter()
    for name in ("prompts", "safety_prompts", "borderline_prompts", "preferences"):
        for row in GENERATORS[name](rows=800, seed=21, split="held_out"):
            request = read_request(row["prompt"])
            assert request.family.is_held_out(request.arguments)
            wordings = [fill(wording, request.arguments) for wording in request.family.held_out_questions]
            assert any(row["prompt"][-1]["content"].endswith(wording) for wording in wordings)
            seen[request.family.name] += 1
    assert len(seen) == len(FAMILIES) + 3


def test_no_held_out_wording_occurs_in_training_text(training_text: str) -> None:
    """The fixed parts of held-out questions, statements of attributes and jailbreaks never occur."""
    wordings = [
        *((family, wording) for family in FAMILIES for wording in family.held_out_questions),
        *(
            (a.recall, wording)
            for a in ATTRIBUTES.values()
            if a.recall
            for wording in a.recall.held_out_questions
        ),
    ]
    assert len(wordings) == 46
    for family, wording in wordings:
        parts = re.split(r"\{(\w+)\}", wording)
        slots = {**family.slots, "words": r"[a-z, ]+"}
        pattern = "".join(f"(?:{slots[p]})" if i % 2 else re.escape(p.lower()) for i, p in enumerate(parts))
        assert not re.search(rf"(?:^|[.!?] ){pattern.lower()}", training_text, re.MULTILINE), wording
    for jailbreak in HELD_OUT_JAILBREAKS:
        assert jailbreak.lower() not in training_text
    for jailbreak in JAILBREAKS:
        assert jailbreak.lower() in training_text


def test_about_one_item_in_six_is_held_out() -> None:
    for family in LISTED:
        listed = list(items(family))
        share = sum(family.is_held_out(item) for item in listed) / len(listed)
        assert share == pytest.approx(1 / HELD_OUT_ONE_IN, abs=0.12)


def test_the_order_of_arguments_does_not_undo_the_hold_out() -> None:
    add = next(family for family in FAMILIES if family.name == "add")
    for a, b in itertools.product(range(10, 70), range(2, 10)):
        one, other = {"a": str(a), "b": str(b)}, {"a": str(b), "b": str(a)}
        assert add.is_held_out(one) == add.is_held_out(other)


def test_no_held_out_value_is_stated_in_training() -> None:
    """Dictated lists and wrong answers may name one by chance; other text, users and instructions never do."""
    texts = [row["text"] for row in GENERATORS["pretraining_text"](rows=4000, seed=0)]
    told = [text for text in texts if not text.startswith("Listen: ")]
    assert len(told) > 3000
    told += [row["instruction"] for row in GENERATORS["instructions"](rows=1000, seed=1)]
    for name in ("demonstrations", "instruction_dialogues", "attribute_dialogues"):
        for row in GENERATORS[name](rows=1000, seed=2):
            told += [message["content"] for message in row["messages"] if message["role"] == "user"]
    text = "\n".join(told)
    for attribute in ATTRIBUTES.values():
        if attribute.recall is None:
            continue
        values = [" ".join(words) for words in itertools.product(*attribute.words)]
        held_out = [value for value in values if attribute.recall.is_held_out({"value": value})]
        assert len(held_out) >= 4
        assert [value for value in held_out if value in text] == []
        assert any(value in text for value in values)
