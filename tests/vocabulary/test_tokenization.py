"""Loss masks and the length policy, against masks written out by hand.

The tokenizer gives one id for each character, so lengths can be counted in the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from llama2_chat.chat_format import Llama2ChatFormat, Segment
from llama2_chat.dialogue import Dialogue, Message
from llama2_chat.tokenization import (
    LengthReport,
    LossPolicy,
    fit_to_length,
    tokenize_dialogue,
    tokenize_dialogues,
)

SYSTEM, USER, ANSWER = (Message("system", "s"), Message("user", "u"), Message("assistant", "a"))


class CharacterTokenizer:
    """Ids are code points; "<" and ">" stand for BOS and EOS, and never occur in these texts."""

    bos_id = ord("<")
    eos_id = ord(">")
    padding_id = 0
    vocab_size = 128
    control_ids = frozenset({bos_id, eos_id})
    hf = None
    chat_template: str | None = None

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: Sequence[int], *, keep_control: bool = False) -> str:
        return "".join(map(chr, ids))

    def save(self, folder: Path) -> None:
        raise AssertionError("not saved here")


FORMAT = Llama2ChatFormat(CharacterTokenizer())


def masked(messages: Sequence[Message], policy: LossPolicy) -> str:
    """The dialogue's text, with a dot for each token that is not trained."""
    tokenized = tokenize_dialogue(messages, FORMAT, policy)
    assert len(tokenized.input_ids) == len(tokenized.loss_mask)
    assert set(map(type, tokenized.loss_mask)) == {bool}
    pairs = zip(tokenized.input_ids, tokenized.loss_mask, strict=True)
    return "".join(chr(token) if trained else "." for token, trained in pairs)


def text_of(messages: Sequence[Message]) -> str:
    return "".join(map(chr, tokenize_dialogue(messages, FORMAT, "all_answers").input_ids))


def test_mask_of_one_turn() -> None:
    """Text and mask of each loss policy against strings written by hand."""
    messages = (USER, ANSWER)
    assert text_of(messages) == "<[INST] u [/INST] a >"
    assert masked(messages, "all_answers") == "................." + " a >"
    assert masked(messages, "last_answer") == "................." + " a >"
    assert masked(messages, "all_tokens") == "<[INST] u [/INST] a >"


def test_mask_is_true_on_the_answer() -> None:
    """The mask's booleans against a count of the characters by hand."""
    # 17 = BOS and the 16 characters of "[INST] u [/INST]"; then space, answer, space, EOS.
    assert tokenize_dialogue((USER, ANSWER), FORMAT, "all_answers").loss_mask == [False] * 17 + [True] * 4


def test_mask_of_two_turns() -> None:
    """Text and mask of each loss policy against strings written by hand: two answers, or the last one."""
    messages = (USER, ANSWER, Message("user", "uv"), Message("assistant", "bc"))
    assert text_of(messages) == "<[INST] u [/INST] a ><[INST] uv [/INST] bc >"
    assert masked(messages, "all_answers") == "." * 17 + " a >" + "." * 18 + " bc >"
    assert masked(messages, "last_answer") == "." * 17 + "...." + "." * 18 + " bc >"
    assert masked(messages, "all_tokens") == text_of(messages)


def test_mask_of_an_empty_answer() -> None:
    """An empty answer's mask against a string by hand: its two spaces and its EOS are trained."""
    assert masked((USER, Message("assistant", "")), "last_answer") == "." * 17 + "  >"


@pytest.mark.parametrize("policy", ["all_answers", "last_answer", "all_tokens"])
def test_mask_of_a_dialogue_that_ends_with_the_user(policy: LossPolicy) -> None:
    """Whatever the policy, the mask against a string of dots: nothing is trained."""
    messages = (USER, ANSWER, USER)
    assert text_of(messages) == "<[INST] u [/INST] a ><[INST] u [/INST]"
    assert masked(messages, policy) == "." * (21 + 17)
    assert masked((USER,), policy) == "." * 17


# One turn is 21 tokens; "<<SYS>>\n", "s" and "\n<</SYS>>\n\n" add 8 + 1 + 11 = 20.
THREE_TURNS = (USER, ANSWER) * 3


@pytest.mark.parametrize(
    ("messages", "max_tokens", "fitted"),
    [
        (THREE_TURNS, 63, THREE_TURNS),
        (THREE_TURNS, 62, THREE_TURNS[2:]),
        (THREE_TURNS, 42, THREE_TURNS[2:]),
        (THREE_TURNS, 41, THREE_TURNS[4:]),
        (THREE_TURNS, 21, THREE_TURNS[4:]),
        (THREE_TURNS, 20, None),
        ((SYSTEM, *THREE_TURNS), 83, (SYSTEM, *THREE_TURNS)),
        ((SYSTEM, *THREE_TURNS), 82, (SYSTEM, *THREE_TURNS[2:])),
        ((SYSTEM, *THREE_TURNS), 41, (SYSTEM, USER, ANSWER)),
        ((SYSTEM, *THREE_TURNS), 40, None),
        ((*THREE_TURNS, USER), 80, (*THREE_TURNS, USER)),
        ((*THREE_TURNS, USER), 79, (*THREE_TURNS[2:], USER)),
        ((*THREE_TURNS, USER), 17, (USER,)),
        ((*THREE_TURNS, USER), 16, None),
        ((SYSTEM, USER), 37, (SYSTEM, USER)),
        ((SYSTEM, USER), 36, None),
    ],
)
def test_oldest_whole_turns_go_first(
    messages: tuple[Message, ...], max_tokens: int, fitted: tuple[Message, ...] | None
) -> None:
    assert fit_to_length(messages, FORMAT, max_tokens) == fitted


def test_the_latest_turns_stay() -> None:
    turns = [(Message("user", f"u{n}"), Message("assistant", f"a{n}")) for n in range(3)]
    first, second, third = turns
    assert fit_to_length((*first, *second, *third), FORMAT, 2 * 23) == (*second, *third)


def test_what_the_length_policy_did_is_counted() -> None:
    dialogues = [
        Dialogue((USER, ANSWER)),
        Dialogue(THREE_TURNS),
        Dialogue((USER, Message("assistant", "a" * 40))),
        Dialogue((USER, ANSWER, USER, ANSWER)),
    ]
    tokenized, report = tokenize_dialogues(dialogues, FORMAT, "all_answers", max_tokens=42)
    assert report == LengthReport(kept=2, shortened=1, dropped=1)
    assert report.to_row() == {"kept": 2, "shortened": 1, "dropped": 1}
    assert [len(t.input_ids) for t in tokenized] == [21, 42, 42]
    assert tokenized[1] == tokenized[2]


def test_halving_leaves_out_what_one_turn_after_the_other_would() -> None:
    """Against the slow loop from the definition, for every length and both ends; with few encodings."""
    calls = 0

    class Counting(Llama2ChatFormat):
        def segments(self, messages: Sequence[Message]) -> list[Segment]:
            nonlocal calls
            calls += 1
            return super().segments(messages)

    counting = Counting(CharacterTokenizer())
    turns = [Message("user" if n % 2 == 0 else "assistant", "x" * (n * 7 % 11)) for n in range(80)]
    dropped = set()
    for head in ([], [SYSTEM]):
        for end in (1, 2, 3, 4, 7, 8, 79, 80):
            messages = (*head, *turns[:end])
            whole = len(text_of(messages))
            for max_tokens in range(0, whole + 20, 1 + whole // 40):
                kept = list(turns[:end])
                while len(text_of([*head, *kept])) > max_tokens and len(kept) > 2:
                    kept = kept[2:]
                expected = (*head, *kept) if len(text_of([*head, *kept])) <= max_tokens else None
                calls = 0
                assert fit_to_length(messages, counting, max_tokens) == expected
                assert calls <= 7
                dropped.add(None if expected is None else len(messages) - len(expected))
    assert len(dropped) > 30
