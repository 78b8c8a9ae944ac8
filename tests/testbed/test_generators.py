"""Generated rows: formats, determinism, speed, and the qualities promised."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import time
from collections import Counter
from random import Random

import pytest

from llama2_chat.dialogue import Dialogue, Preference, Prompt
from llama2_chat.errors import UserInputError
from llama2_chat.testbed.attributes import ATTRIBUTES
from llama2_chat.testbed.family import fill
from llama2_chat.testbed.generators import GENERATORS
from llama2_chat.testbed.oracle import grade
from llama2_chat.testbed.request import read_request
from llama2_chat.testbed.wording import ANSWER_TEMPLATES, POLITE_REFUSALS

SPLITS = ("train", "held_out")
NAMES = sorted(GENERATORS)


def test_names() -> None:
    assert [
        *("attribute_dialogues", "borderline_prompts", "demonstrations", "instruction_dialogues"),
        *("instructions", "preferences", "pretraining_text", "prompts", "safety_prompts"),
    ] == NAMES


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_of_the_documented_format(name: str, split: str) -> None:
    rows = list(GENERATORS[name](rows=300, seed=1, split=split))
    assert len(rows) == 300
    for row in rows:
        if name == "pretraining_text":
            assert set(row) == {"text"}
            continue
        assert row["source"] == "testbed"
        if name == "instructions":
            statement = ATTRIBUTES[row["group"]].read(row["instruction"])
            assert statement is not None
            assert ATTRIBUTES[row["group"]].read(row["short"]) == statement
            continue
        if name == "instruction_dialogues":
            Dialogue.from_row(row)
            assert row["messages"][-1]["role"] == "user"
            continue
        if "messages" in row:
            Dialogue.from_row(row)
            request = read_request(row["messages"][:-1])
        elif "chosen" in row:
            Preference.from_row(row)
            request = read_request(row["prompt"])
        else:
            Prompt.from_row(row)
            request = read_request(row["prompt"])
            assert row.get("risk_category") == request.family.risk_category
            assert row["is_safety"] == (request.family.risk_category is not None)


@pytest.mark.parametrize("name", NAMES)
def test_rows_depend_on_the_seed_alone(name: str) -> None:
    first = list(GENERATORS[name](rows=200, seed=7))
    Random(3).random()
    assert list(GENERATORS[name](rows=200, seed=7)) == first
    assert list(GENERATORS[name](rows=60, seed=7)) == first[:60]
    assert list(GENERATORS[name](rows=200, seed=8)) != first


def test_rows_are_the_same_in_another_process_with_another_hash_seed() -> None:
    program = (
        "import hashlib, json; from llama2_chat.testbed.generators import GENERATORS\n"
        "rows = [r for n in sorted(GENERATORS) for r in GENERATORS[n](rows=40, seed=9)]\n"
        "print(hashlib.sha256(json.dumps(rows).encode()).hexdigest())"
    )
    rows = [row for name in NAMES for row in GENERATORS[name](rows=40, seed=9)]
    expected = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    for hash_seed in ("1", "2"):
        environment = {"PYTHONHASHSEED": hash_seed, "PATH": ""}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == expected


def test_thousands_of_rows_in_seconds() -> None:
    started = time.perf_counter()
    for name in NAMES:
        assert sum(1 for _ in GENERATORS[name](rows=2000, seed=10)) == 2000
    assert time.perf_counter() - started < 20


def test_importing_the_testbed_needs_only_the_standard_library() -> None:
    program = (
        "import sys; import llama2_chat.testbed.generators, llama2_chat.testbed.oracle\n"
        "heavy = {'torch', 'numpy', 'transformers', 'tokenizers', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# What the demonstrations are like


def test_demonstrations_are_as_imperfect_as_promised() -> None:
    """Good 25 %, plain 30, terse 15, wrong 15, sloppy 10 (3/4 right), refusing 5: right in 77.5 %."""
    rows = list(
        GENERATORS["demonstrations"](rows=4000, seed=11, borderline=0.0, multi_turn=0.0, preprompt=0.0)
    )
    graded = [(row, grade(row["messages"][:-1], row["messages"][-1]["content"])) for row in rows]
    harmless = [g for _, g in graded if not g.unsafe_request]
    unsafe = [g for _, g in graded if g.unsafe_request]
    correct = sum(bool(g.correct) for g in harmless) / len(harmless)
    assert correct == pytest.approx(0.775, abs=0.03)
    assert sum(g.refused for g in harmless) / len(harmless) == pytest.approx(0.05, abs=0.015)
    assert sum(not g.safe for g in unsafe) / len(unsafe) == pytest.approx(0.5, abs=0.07)
    assert len(unsafe) / len(rows) == pytest.approx(0.17, abs=0.03)
    assert all(row["is_safety"] == g.unsafe_request for row, g in graded)


def test_clean_demonstrations_have_no_fault() -> None:
    rows = GENERATORS["demonstrations"](rows=1500, seed=11, clean=True, long=0.1)
    for row in rows:
        for place, message in enumerate(row["messages"]):
            if message["role"] == "assistant":
                graded = grade(row["messages"][:place], message["content"])
                assert graded.refused == graded.unsafe_request
                assert graded.unsafe_request or graded.correct, message["content"]


def test_demonstrators_refuse_what_only_sounds_unsafe() -> None:
    rows = GENERATORS["demonstrations"](rows=1500, seed=12, unsafe=0.0, borderline=1.0, preprompt=0.0)
    graded = [grade(row["messages"][:-1], row["messages"][-1]["content"]) for row in rows]
    assert all(g.borderline and g.safe for g in graded)
    refused = sum(g.refused for g in graded) / len(graded)
    assert refused == pytest.approx(0.3 + 0.7 * 0.05, abs=0.05)


def test_under_a_safety_preprompt_nothing_unsafe_is_answered() -> None:
    rows = list(GENERATORS["demonstrations"](rows=300, seed=13, unsafe=1.0, multi_turn=0.0, preprompt=1.0))
    assert all(row["messages"][0]["role"] == "system" for row in rows)
    assert all(grade(row["messages"][:-1], row["messages"][-1]["content"]).safe for row in rows)


def test_an_overcautious_demonstrator_refuses_anything_under_the_preprompt() -> None:
    """A share of all answers, without a reason; without the preprompt nothing changes."""
    options = {"unsafe": 0.3, "multi_turn": 0.0, "attributes": 0.0, "long": 0.0, "clean": True}
    rows = list(GENERATORS["demonstrations"](rows=3000, seed=15, preprompt=0.5, overcautious=0.4, **options))
    careful = [row for row in rows if row["messages"][0]["role"] == "system"]
    harmless = [row for row in careful if not row["is_safety"]]
    refused = [grade(row["messages"][:-1], row["messages"][-1]["content"]).refused for row in harmless]
    assert sum(refused) / len(refused) == pytest.approx(0.4, abs=0.05)
    unsafe = [row["messages"][-1]["content"] for row in careful if row["is_safety"]]
    # A reference answer refuses without a reason in three of ten cases.
    bare = sum(answer in POLITE_REFUSALS for answer in unsafe) / len(unsafe)
    assert bare == pytest.approx(0.4 + 0.6 * 0.3, abs=0.07)
    for row in rows:
        if row["messages"][0]["role"] != "system" and not row["is_safety"]:
            assert not grade(row["messages"][:-1], row["messages"][-1]["content"]).refused


def test_under_an_answer_template_a_refusal_names_its_reason() -> None:
    """In the shown share of unsafe requests, each category with its own; overcaution does not touch them."""
    generator = GENERATORS["demonstrations"]
    shares = {"unsafe": 0.7, "preprompt": 1.0, "overcautious": 0.9, "answer_templates": 0.6}
    unsafe = 0
    seen = Counter[str]()
    for row in generator(rows=1200, seed=16, multi_turn=0.0, long=0.0, **shares):
        unsafe += row["is_safety"]
        system, *prompt, answer = row["messages"]
        found = [name for name, template in ANSWER_TEMPLATES.items() if system["content"].endswith(template)]
        if found:
            graded = grade(prompt, answer["content"])
            assert [graded.risk_category] == found
            assert graded.helpfulness >= 0.65  # with a reason; 0.6 is the most without one
            seen.update(found)
    assert seen.total() / unsafe == pytest.approx(0.6, abs=0.06)
    assert set(seen) == set(ANSWER_TEMPLATES)


@pytest.mark.parametrize("turns", [1, 2, 6, 20])
def test_attribute_dialogues_state_first_and_ask_last(turns: int) -> None:
    kept = Counter[str]()
    for row in GENERATORS["attribute_dialogues"](rows=150, seed=14, turns=turns):
        assert sum(message["role"] == "user" for message in row["messages"]) == turns
        result = grade(row["messages"][:-1], row["messages"][-1]["content"])
        assert result.attribute_kept is True
        assert result.attribute is not None
        kept[result.attribute] += 1
    assert set(kept) == {"name", "persona", "hobby", "language"}


def test_held_out_dialogues_may_state_what_training_shows() -> None:
    """Values and statements of the training side, questions of the other."""
    for row in GENERATORS["attribute_dialogues"](100, 3, "held_out", turns=3, stated="train"):
        first, *_, last = [m["content"] for m in row["messages"] if m["role"] == "user"]
        stated = [
            (attribute, value)
            for attribute in ATTRIBUTES.values()
            for sentence in re.findall(r"[^.]+\.", first)
            if (value := attribute.read(sentence.strip())) is not None
        ]
        assert stated
        for attribute, value in stated:
            assert attribute.recall is None or not attribute.recall.is_held_out({"value": value})
        request = read_request(row["messages"][:-1])
        wordings = [fill(wording, request.arguments) for wording in request.family.held_out_questions]
        assert any(last.endswith(wording) for wording in wordings)


def test_instruction_dialogues_wait_for_their_group() -> None:
    """With a statement of the group put first, the last question asks for just that; without, for nothing."""
    stated = {row["group"]: row["instruction"] for row in GENERATORS["instructions"](rows=100, seed=1)}
    assert set(stated) == set(ATTRIBUTES)
    seen: Counter[str | None] = Counter()
    turns: Counter[int] = Counter()
    for row in GENERATORS["instruction_dialogues"](rows=600, seed=14, min_turns=3, max_turns=12):
        group, (first, *others) = row.get("group"), row["messages"]
        turns[sum(message["role"] == "user" for message in row["messages"])] += 1
        seen[group] += 1
        instruction = stated.get(group, "You are Captain Rex.")
        put_first = {"role": "user", "content": f"{instruction} {first['content']}"}
        assert read_request([put_first, *others]).attribute == group
    assert set(seen) == {*ATTRIBUTES, None}
    assert seen[None] / 600 == pytest.approx(0.25, abs=0.06)
    assert (min(turns), max(turns)) == (3, 12)


def test_attributes_can_be_left_out_of_instructions_and_their_dialogues() -> None:
    for name in ("instructions", "instruction_dialogues"):
        all_but = list(GENERATORS[name](rows=200, seed=3, leave_out=["hobby", "language"]))
        assert {row["group"] for row in all_but if "group" in row} == {"name", "persona"}
        assert list(GENERATORS[name](rows=200, seed=3, leave_out=[])) == list(
            GENERATORS[name](rows=200, seed=3)
        )


@pytest.mark.parametrize(
    ("leave_out", "message"),
    [
        (["hobbies"], "leave_out: no attribute hobbies; one of name, persona, hobby, language"),
        (list(ATTRIBUTES), "leave_out: nothing is left of name, persona, hobby, language; leave one in"),
    ],
)
def test_what_cannot_be_left_out_is_told(leave_out, message) -> None:
    for name in ("instructions", "instruction_dialogues"):
        with pytest.raises(UserInputError, match=re.escape(message)):
            next(GENERATORS[name](rows=1, seed=0, leave_out=leave_out))


def test_two_turn_recall_is_demonstrated() -> None:
    """Without it the recall of a model before Ghost Attention would be zero by construction."""
    recalled = 0
    for row in GENERATORS["demonstrations"](rows=4000, seed=15):
        messages = row["messages"]
        if sum(message["role"] == "user" for message in messages) == 2:
            recalled += read_request(messages[:-1]).attribute in ("name", "persona", "hobby")
    assert recalled > 150


def test_pairs_hold_different_answers_and_few_near_ties() -> None:
    rows = list(GENERATORS["preferences"](rows=2000, seed=16))
    assert all(row["chosen"] != row["rejected"] for row in rows)
    scores = [
        [grade(row["prompt"], row[side][0]["content"]).helpfulness for side in ("chosen", "rejected")]
        for row in rows
    ]
    assert sum(abs(a - b) < 0.04 for a, b in scores) / len(rows) < 0.1
    wrong = sum(grade(row["prompt"], row["rejected"][0]["content"]).correct is False for row in rows)
    assert 0.3 < wrong / len(rows) < 0.8


def families_asked(rows) -> Counter[str]:
    return Counter(read_request(row["prompt"]).family.name for row in rows)


def test_rare_families_leave_their_places_to_the_others() -> None:
    options = {"unsafe": 0.0, "borderline": 0.0, "attributes": 0.0}
    usual = families_asked(GENERATORS["prompts"](3000, 1, **options))
    rare = families_asked(GENERATORS["prompts"](3000, 1, rare={"backwards": 0.1, "add": 0.0}, **options))
    assert sum(rare.values()) == 3000
    assert rare["add"] == 0
    # 3,000 of 14 families: 214 each, so 21 or a few more of a tenth; five standard deviations are 23.
    assert 0 < rare["backwards"] < 48 < 150 < usual["backwards"]
    assert min(rare[name] for name in usual if name not in ("backwards", "add")) > 150


@pytest.mark.parametrize(
    ("rare", "message"),
    [
        ({"rhymes": 0.1}, "no task family rhymes; one of add, backwards"),
        ({"add": 1.5}, "add: 1.5; a share lies"),
    ],
)
def test_a_share_of_no_family_or_outside_0_and_1_is_refused(rare, message) -> None:
    with pytest.raises(UserInputError, match=message):
        list(GENERATORS["prompts"](1, 0, rare=rare))
