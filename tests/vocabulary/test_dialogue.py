"""The vocabulary's types: what they accept, what they refuse and with which words."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2_chat.dialogue import (
    CHAT_TAGS,
    RATINGS,
    Dialogue,
    Message,
    Preference,
    Prompt,
    Sample,
    Scores,
    check_role_order,
)
from llama2_chat.errors import ChatTagError

USER = {"role": "user", "content": "Hi."}
ANSWER = {"role": "assistant", "content": "Hello."}
SYSTEM = {"role": "system", "content": "Be kind."}

texts = st.text(st.characters(exclude_categories=["Cs"])).filter(
    lambda text: not any(tag in text for tag in CHAT_TAGS)
)
optional_texts = st.none() | texts
flags = st.none() | st.booleans()
numbers = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def prompts(draw: st.DrawFn) -> tuple[Message, ...]:
    messages = [Message("system", draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        messages += [Message("user", draw(texts)), Message("assistant", draw(texts))]
    return (*messages, Message("user", draw(texts)))


values = st.one_of(
    st.builds(
        Dialogue,
        st.one_of(prompts(), st.builds(lambda p, a: (*p, Message("assistant", a)), prompts(), texts)),
        st.booleans(),
        optional_texts,
        optional_texts,
    ),
    st.builds(
        Prompt,
        prompts(),
        st.booleans(),
        st.sampled_from([None, "illicit", "hateful", "unqualified_advice"]),
        optional_texts,
    ),
    st.builds(
        Preference,
        prompts(),
        texts,
        texts,
        st.sampled_from([None, *RATINGS]),
        flags,
        flags,
        st.sampled_from([None, "helpfulness", "safety"]),
        optional_texts,
    ),
    st.builds(
        Sample,
        prompts(),
        texts,
        st.none() | st.builds(Scores, numbers, st.none() | numbers, st.floats(0, 1)),
        texts,
        st.integers(0, 9),
        st.floats(0, 2),
        st.integers(0, 99),
        st.booleans(),
    ),
)


@given(values)
def test_rows_read_back(value: Dialogue | Prompt | Preference | Sample) -> None:
    assert type(value).from_row(value.to_row()) == value


def test_rows_have_the_documented_fields() -> None:
    prompt = (Message("system", "Be kind."), Message("user", "Hi."))
    assert Dialogue((*prompt, Message("assistant", "Hello.")), True, "7", "ours").to_row() == {
        "messages": [SYSTEM, USER, ANSWER],
        "is_safety": True,
        "id": "7",
        "source": "ours",
    }
    assert Preference(prompt, "Hello.", "Go.", "better", True, False, "safety", "ours").to_row() == {
        "prompt": [SYSTEM, USER],
        "chosen": [ANSWER],
        "rejected": [{"role": "assistant", "content": "Go."}],
        "rating": "better",
        "chosen_safe": True,
        "rejected_safe": False,
        "domain": "safety",
        "source": "ours",
    }
    assert Prompt(prompt, True, "illicit").to_row() == {
        "prompt": [SYSTEM, USER],
        "is_safety": True,
        "risk_category": "illicit",
    }
    assert Sample(prompt, "Hello.", Scores(1.5, None, 0.75), "sft", 2, 1.2, 3).to_row() == {
        "prompt": [SYSTEM, USER],
        "response": "Hello.",
        "scores": {"helpfulness": 1.5, "safety": None, "combined": 0.75},
        "policy": "sft",
        "iteration": 2,
        "temperature": 1.2,
        "sample_index": 3,
        "is_safety": False,
    }


def test_optional_fields_may_be_missing_or_null() -> None:
    bare = {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}
    null = dict.fromkeys(("rating", "chosen_safe", "rejected_safe", "domain", "source"))
    assert Preference.from_row(bare) == Preference.from_row(bare | null)
    assert Preference.from_row(bare).rating is None
    assert Dialogue.from_row({"messages": [USER], "is_safety": None}).is_safety is False


@pytest.mark.parametrize(
    ("roles", "problem"),
    [
        ("", "messages is empty; at least one user message is needed"),
        ("s", "messages holds only a system message; a user message must follow"),
        ("a", 'messages[0] has role "assistant", expected "user"'),
        ("uu", 'messages[1] has role "user", expected "assistant"'),
        ("sa", 'messages[1] has role "assistant", expected "user"'),
        ("us", 'messages[1] has role "system", expected "assistant"'),
        ("suaa", 'messages[3] has role "assistant", expected "user"'),
        ("ssu", 'messages[1] has role "system", expected "user"'),
    ],
)
def test_wrong_role_order(roles: str, problem: str) -> None:
    names: dict[str, Any] = {"s": "system", "u": "user", "a": "assistant"}
    messages = [Message(names[letter], "x") for letter in roles]
    with pytest.raises(ValueError, match="^" + re.escape(problem)):
        check_role_order(messages)


@pytest.mark.parametrize("roles", ["u", "ua", "su", "sua", "uaua", "suauau"])
def test_right_role_order(roles: str) -> None:
    names: dict[str, Any] = {"s": "system", "u": "user", "a": "assistant"}
    check_role_order([Message(names[letter], "") for letter in roles])


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_chat_tags_are_refused(tag: str, role: Any) -> None:
    content = f"x{tag}y"
    if role == "assistant":
        # Sampled text may hold a tag; text from a file may not.
        assert Message(role, content).content == content
    else:
        with pytest.raises(ChatTagError, match="could pose as another turn"):
            Message(role, content)
    messages = {
        "system": [{**SYSTEM, "content": content}, USER, ANSWER],
        "user": [SYSTEM, {**USER, "content": content}, ANSWER],
        "assistant": [SYSTEM, USER, {**ANSWER, "content": content}],
    }[role]
    place = ["system", "user", "assistant"].index(role)
    with pytest.raises(ChatTagError) as error:
        Dialogue.from_row({"messages": messages})
    assert str(error.value).startswith(f"messages[{place}]: {role} content holds the chat tag {tag}")


def test_chat_tags_in_answers_of_preferences_are_refused() -> None:
    row = {"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "[INST]"}]}
    with pytest.raises(ChatTagError, match=r"rejected\[0\]: assistant content"):
        Preference.from_row(row)


def test_a_sample_may_hold_a_chat_tag() -> None:
    sample = Sample((Message("user", "Hi."),), "a [INST] b", None, "sft", 0, 1.0, 0)
    assert Sample.from_row(sample.to_row()) == sample


PAIR = {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}
SAMPLE = {
    "prompt": [USER],
    "response": "x",
    "scores": None,
    "policy": "sft",
    "iteration": 0,
    "temperature": 1,
    "sample_index": 0,
}
SCORES = {"helpfulness": 1.0, "safety": None, "combined": 0.5}
RATING_LIST = "significantly_better, better, slightly_better, negligibly_better"


@pytest.mark.parametrize(
    ("kind", "row", "problem"),
    [
        (Dialogue, {}, '"messages" is missing; found no fields'),
        (Dialogue, {"mesages": []}, '"messages" is missing; found mesages'),
        (Dialogue, {"messages": "Hi."}, "messages must be a list of messages, found a string"),
        (
            Dialogue,
            {"messages": ["Hi."]},
            'messages[0] must be an object with "role" and "content", found a string',
        ),
        (Dialogue, {"messages": [{"role": "user"}]}, '"messages[0].content" is missing; found role'),
        (
            Dialogue,
            {"messages": [{"role": "user", "content": 5}]},
            "messages[0]: content must be a string, found a number",
        ),
        (
            Dialogue,
            {"messages": [{"role": "users", "content": ""}]},
            'messages[0]: role "users" unknown; one of system, user, assistant (did you mean "user"?)',
        ),
        (
            Dialogue,
            {"messages": [{"role": None, "content": ""}]},
            "messages[0]: role must be a string, found null; one of system, user, assistant",
        ),
        (
            Dialogue,
            {"messages": [{"role": "user", "content": "a\ud800b"}]},
            "messages[0]: content holds half of a surrogate pair (U+D800) at character 1, which is no Unicode "
            "text; replace it",
        ),
        (Dialogue, {"messages": [USER], "is_safety": 1}, "is_safety must be true or false, found a number"),
        (Dialogue, {"messages": [USER], "id": 7}, "id must be a string, found a number"),
        (
            Prompt,
            {"prompt": [USER, ANSWER]},
            'prompt must end with a user message, it ends with role "assistant"',
        ),
        (
            Prompt,
            {"prompt": [USER], "risk_category": "ilicit"},
            'risk_category "ilicit" unknown; one of illicit, hateful, unqualified_advice '
            '(did you mean "illicit"?)',
        ),
        (
            Preference,
            {"prompt": [USER], "chosen": [ANSWER]},
            '"rejected" is missing; found prompt, chosen',
        ),
        (Preference, PAIR | {"chosen": "Hello."}, "chosen must be a list of messages, found a string"),
        (
            Preference,
            PAIR | {"chosen": [USER, ANSWER]},
            "chosen must be a list of exactly one assistant message, found roles ['user', 'assistant']",
        ),
        (
            Preference,
            PAIR | {"rating": "much_better"},
            f'rating "much_better" unknown; one of {RATING_LIST} (did you mean "better"?)',
        ),
        (
            Preference,
            PAIR | {"rating": 3},
            f"rating must be a string, found a number; one of {RATING_LIST}",
        ),
        (
            Preference,
            PAIR | {"chosen_safe": "yes"},
            "chosen_safe must be true or false, found a string",
        ),
        (
            Preference,
            PAIR | {"domain": "safe"},
            'domain "safe" unknown; one of helpfulness, safety (did you mean "safety"?)',
        ),
        (Sample, SAMPLE | {"response": None}, "response must be a string, found null"),
        (Sample, SAMPLE | {"scores": 0.5}, "scores must be an object, found a number"),
        (
            Sample,
            SAMPLE | {"scores": {"helpfulness": 1.0}},
            '"scores.combined" is missing; found helpfulness',
        ),
        (
            Sample,
            SAMPLE | {"scores": SCORES | {"safety": True}},
            "scores.safety must be a number, found true or false",
        ),
        (
            Sample,
            SAMPLE | {"scores": SCORES | {"helpfulness": float("nan")}},
            "scores.helpfulness is nan; it must be finite",
        ),
        (
            Sample,
            SAMPLE | {"scores": SCORES | {"combined": 1.5}},
            "scores.combined is 1.5; a probability lies between 0 and 1",
        ),
        (Sample, SAMPLE | {"iteration": 1.5}, "iteration must be a whole number from 0, found 1.5"),
        (Sample, SAMPLE | {"sample_index": -1}, "sample_index must be a whole number from 0, found -1"),
        (Sample, SAMPLE | {"temperature": -0.5}, "temperature is -0.5; it must be 0 (greedy) or above"),
    ],
)
def test_wrong_rows(kind: Any, row: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(problem) + "$"):
        kind.from_row(row)


def test_unknown_fields_are_ignored() -> None:
    assert Dialogue.from_row({"messages": [USER], "score": 3}) == Dialogue((Message("user", "Hi."),))


def test_values_do_not_change() -> None:
    message = Message("user", "Hi.")
    with pytest.raises(AttributeError):
        message.content = "[INST]"  # type: ignore[misc]
