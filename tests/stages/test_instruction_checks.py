"""The programs that say whether an answer keeps an instruction: by hand, and by properties."""

from __future__ import annotations

import pytest

from llama2_chat.ghost_attention.checks import LANGUAGES, language_shares, parse_check, sentences_of
from llama2_chat.ghost_attention.instructions import Instruction

TEXTS = {
    "en": "The house is old, but it has a garden with apple trees that you can see from the road.",
    "de": "Das Haus ist alt, aber es hat einen Garten mit Apfelbäumen, die man von der Straße sehen kann.",
    "fr": "La maison est vieille, mais elle a un jardin avec des pommiers que vous pouvez voir de la route.",
    "es": "La casa es vieja, pero tiene un jardín con manzanos que se ven desde el camino.",
    "it": "La casa è vecchia, ma ha un giardino con dei meli che si vedono dalla strada.",
}


@pytest.mark.parametrize(
    ("spec", "kept", "broken"),
    [
        ("upper_case", ["YES.", "2 PLUS 2 IS 4!", "ÉTÉ", "  OK\n"], ["YES, sir.", "Yes", "2 + 2 = 4", "", "STRAßE"]),
        ("lower_case", ["yes.", "2 plus 2 is 4!", "été"], ["Yes", "yES", "4", "", "?"]),
        (
            "ends_with:over",
            ["Roger, over", "Roger. OVER!", "It is over.", 'He said "over."', "over", "Roger – over\n"],
            ["Roger, over and out", "moreover", "Overture", "over there", "", "..."],
        ),
        ("ends_with:Over and out!", ["Yes. Over and out.", "over AND out"], ["over", "and out", "Over and out, sir"]),
        ("ends_with:?", ["Why?", "Why not? "], ["Why?!", "No.", "?", ""]),
        ("starts_with:Ahoy", ["Ahoy!", '"Ahoy", he said', "ahoy there"], ["Well, ahoy", "Ahoyo", "", "!"]),
        ("starts_with:- ", ["- one\n- two"], ["one - two", "– one"]),
        ("contains:old maps", ["I like OLD maps.", "old\nmaps"], ["old, worn maps", "bold maps", "maps old", ""]),
        ("contains:don't", ["I don’t know", "Don't!"], ["I do not", "dont"]),
        ("max_words:3", ["One, two, three.", "it's two", "1 2 3"], ["one two three four", "", "--"]),
        ("max_sentences:1", ["It is 3.5.", "Yes", "What?!", "Wait..."], ["Yes. No.", "One\nTwo", "", "Hm… No"]),
        ("max_sentences:2", ['He said "No." Then left.', "A! B? ...", "1.5 and 2.5. Yes"], ["A. B. C", "Mr. Fox. Hi."]),
        ("one_line", ["Yes. No.", "Yes\n"], ["Yes.\nNo.", "\n", ""]),
    ],
)  # fmt: skip
def test_by_hand(spec: str, kept: list[str], broken: list[str]) -> None:
    check = parse_check(spec)
    assert [check.kept(answer) for answer in kept] == [True] * len(kept)
    assert [check.kept(answer) for answer in broken] == [False] * len(broken)


def test_the_same_text_in_two_normal_forms_is_the_same() -> None:
    assert parse_check("ends_with:été").kept("Cet e\u0301te\u0301!")
    assert parse_check("ends_with:e\u0301te\u0301").kept("C'est un été.")


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_text_is_of_one_language(language: str) -> None:
    text = TEXTS[language]
    assert [parse_check(f"language:{other}").kept(text) for other in LANGUAGES] == [
        other == language for other in LANGUAGES
    ]
    assert parse_check(f"language:{language}").kept(text.upper())
    names = {"en": "English", "de": "german", "fr": "French", "es": "SPANISH", "it": "Italian"}
    assert parse_check(f"language:{names[language]}") == parse_check(f"language:{language}")


def test_language_shares_are_counted() -> None:
    # the, is (English); die (German); 6 words
    shares = language_shares("The house is Die Blume! Xyz")
    assert (shares["en"], shares["de"], shares["fr"]) == (2 / 6, 1 / 6, 0.0)
    assert language_shares("") == dict.fromkeys(LANGUAGES, 0.0)
    # No language without words of it, nor on a tie ("la" and "no" are words of Spanish and Italian).
    for answer in ("", "42", "Napoleon Bonaparte", "la no"):
        assert not any(parse_check(f"language:{language}").kept(answer) for language in LANGUAGES)
    # One stop word among 7 is less than 0.15, among 6 it is more.
    seven, six = "Napoleon Bonaparte the Blume Xyz Abc Def", "Napoleon Bonaparte the Blume Xyz Abc"
    assert [parse_check("language:en").kept(answer) for answer in (seven, six)] == [False, True]


def test_sentences() -> None:
    assert sentences_of('One. "Two!" (Three?) 4.5 …\n\n- ') == ["One.", '"Two!', "(Three?", "4.5 …"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("upercase", r'check "upercase" unknown \(did you mean "upper_case"\?\); one of upper_case, lower_c'),
        ("", 'check "" unknown; one of'),
        ("upper_case:yes", "upper_case takes no argument; write upper_case"),
        ("max_words", "max_words takes a whole number from 1, as in max_words:10"),
        ("max_words:0", "a whole number from 1"),
        ("max_words:²", "a whole number from 1"),
        ("max_sentences:-1", "a whole number from 1"),
        ("ends_with: ", "ends_with takes a text, as in ends_with:over"),
        ("language:klingon", 'language "klingon" unknown; one of en, de, fr, es, it, as in language:fr'),
    ],
)  # fmt: skip
def test_what_is_no_check(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_check(spec)


def test_a_row_may_carry_checks() -> None:
    row = {"instruction": "Answer in capitals."}
    assert Instruction.from_row(row).checks == ()
    assert Instruction.from_row({**row, "check": "upper_case"}).checks == (parse_check("upper_case"),)
    both = Instruction.from_row({**row, "check": ["upper_case", "max_words: 10"]}).checks
    assert [check.spec for check in both] == ["upper_case", "max_words:10"]
    assert both[1] == parse_check("max_words:10")
    for value, message in (
        (5, "found a number"),
        ([5], "check must be a string, found a number"),
        ("x", "unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            Instruction.from_row({**row, "check": value})
