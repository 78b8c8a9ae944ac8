"""The data mix of a reward model: how many of the other files' pairs are drawn, which ones, and what is recorded."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
from pydantic import ValidationError

from llama2_chat.dialogue import Message, Preference
from llama2_chat.reward.config import RewardConfig, number_to_draw
from llama2_chat.reward.data import EncodedPairs, PairReport
from llama2_chat.reward.mixing import Mix, mix


def pairs_file(name: str, pairs: int, dropped: int = 0) -> EncodedPairs:
    """Pairs whose chosen answer and token ids say which one they are."""
    report = PairReport(kept=pairs, dropped=Counter({"longer than 8 tokens": dropped} if dropped else {}))
    prompt = (Message("user", "q"),)
    rows = [Preference(prompt, f"{name} {number}", "no") for number in range(pairs)]
    return EncodedPairs(f"/data/{name}.jsonl", 8, rows, [([number], [0]) for number in range(pairs)], report)


def chosen(mixture: Mix) -> list[str]:
    return [pair.chosen for file in mixture.files for pair in file.pairs]


@pytest.mark.parametrize(
    ("own", "share", "drawn"),
    # The paper's two shares, then a third and two thirds.
    [(30, 0.5, 30), (90, 0.1, 10), (85, 0.1, 9), (20, 1 / 3, 10), (10, 2 / 3, 20), (1, 0.5, 1)],
)
def test_the_share_is_one_of_the_whole(own: int, share: float, drawn: int) -> None:
    mixture = mix([pairs_file("own", own)], [pairs_file("a", 17), pairs_file("b", 13)], share=share, seed=0)
    assert number_to_draw(own, share) == drawn
    assert [len(file.places) for file in mixture.own] == [own]
    assert sum(len(file.places) for file in mixture.others) == drawn
    assert mixture.size == own + drawn
    assert mixture.drawn_share == pytest.approx(drawn / (own + drawn), rel=1e-12)
    # The nearest whole number of pairs: one more or less is no nearer to the share.
    exact = Fraction(share).limit_denominator(1000) * own / (1 - Fraction(share).limit_denominator(1000))
    assert abs(exact - drawn) <= Fraction(1, 2)
    assert mixture.shortfall() is None


def test_every_own_pair_is_taken_and_no_other_twice() -> None:
    own = [pairs_file("own", 12), pairs_file("second", 8)]
    others = [pairs_file("a", 17), pairs_file("b", 13)]
    found = chosen(mix(own, others, share=0.5, seed=3))
    assert found[:20] == [*(f"own {n}" for n in range(12)), *(f"second {n}" for n in range(8))]
    drawn = found[20:]
    assert len(set(drawn)) == len(drawn) == 20
    assert set(drawn) < {*(f"a {n}" for n in range(17)), *(f"b {n}" for n in range(13))}


def test_tokens_stay_with_their_pairs() -> None:
    mixture = mix([pairs_file("own", 6)], [pairs_file("a", 20), pairs_file("b", 20)], share=0.5, seed=1)
    for file in mixture.files:
        assert [pair.chosen.split()[1] for pair in file.pairs] == [
            str(chosen[0]) for chosen, _ in file.tokens
        ]


def test_the_draw_is_a_function_of_the_seed() -> None:
    def drawn(seed: int) -> list[str]:
        return chosen(mix([pairs_file("own", 10)], [pairs_file("a", 40)], share=0.5, seed=seed))

    assert drawn(5) == drawn(5)
    assert drawn(5) != drawn(6)


def test_the_draw_is_uniform_over_all_other_pairs_together() -> None:
    """Over 2,000 seeds each of 30 pairs in two files of unequal size is drawn in a third of the mixes."""
    counts: Counter[str] = Counter()
    for seed in range(2000):
        mixture = mix(
            [pairs_file("own", 10)], [pairs_file("a", 24), pairs_file("b", 6)], share=0.5, seed=seed
        )
        counts.update(pair.chosen for file in mixture.others for pair in file.pairs)
    assert len(counts) == 30
    expected, deviation = 2000 / 3, (2000 * 1 / 3 * 2 / 3) ** 0.5
    assert all(abs(count - expected) < 4.5 * deviation for count in counts.values())
    assert sum(counts.values()) == 2000 * 10


def test_what_was_drawn_is_recorded_for_each_file() -> None:
    own, others = [pairs_file("own", 30, dropped=5)], [pairs_file("a", 20, dropped=1), pairs_file("b", 10)]
    mixture = mix(own, others, share=0.25, seed=0)  # 10 of the 30 others
    rows = [file.to_row(mixture.size) for file in mixture.files]
    assert [row["file"] for row in rows] == ["own.jsonl", "a.jsonl", "b.jsonl"]
    assert [row["kept"] for row in rows] == [30, 20, 10]
    assert [sum(row["dropped"].values()) for row in rows] == [5, 1, 0]
    assert rows[0]["drawn"] == 30
    assert rows[1]["drawn"] + rows[2]["drawn"] == 10
    assert [row["share"] for row in rows] == pytest.approx([row["drawn"] / 40 for row in rows], rel=1e-12)
    assert mixture.to_row() == {"other_share": {"asked": 0.25, "drawn": 0.25}}


def test_too_few_others_are_all_taken_and_said() -> None:
    mixture = mix([pairs_file("own", 30)], [pairs_file("a", 6), pairs_file("b", 4)], share=0.5, seed=0)
    assert mixture.size == 40
    assert mixture.to_row() == {"other_share": {"asked": 0.5, "drawn": 0.25}}
    message = mixture.shortfall()
    assert message is not None
    assert "hold 10 usable pairs, fewer than the 30 that a share of 0.5 takes; they make up 0.25 " in message


def test_too_few_own_for_a_single_other_is_said() -> None:
    mixture = mix([pairs_file("own", 4)], [pairs_file("a", 6)], share=0.1, seed=0)
    assert (mixture.size, mixture.drawn_share) == (4, 0.0)
    assert "4 own pairs are too few" in (mixture.shortfall() or "")


def test_without_others_nothing_is_drawn_or_recorded() -> None:
    mixture = mix([pairs_file("own", 4)], [], share=None, seed=0)
    assert (chosen(mixture), mixture.to_row(), mixture.shortfall()) == (
        [f"own {n}" for n in range(4)],
        {},
        None,
    )


def config(**changes) -> RewardConfig:
    return RewardConfig(**{"model": "sft", "preferences": ["own"], "domain": "helpfulness", **changes})


def test_default_shares_are_the_papers() -> None:
    assert config(other_preferences=["a"]).share_of_others == 0.5
    assert config(other_preferences=["a"], domain="safety").share_of_others == 0.1
    assert config(other_preferences=["a"], other_share=0.3).share_of_others == 0.3
    assert config().share_of_others is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"other_share": 0.5}, "name them in other_preferences"),
        ({"other_preferences": ["own", "a"]}, "own is in preferences and in other_preferences"),
        ({"other_preferences": ["a"], "other_share": 1.0}, "less than 1"),
        ({"other_preferences": ["a"], "other_share": 0.0}, "greater than 0"),
        ({"centering": -0.1}, "greater than or equal to 0"),
    ],
)
def test_mixes_that_make_no_sense_are_refused(changes: dict, told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        config(**changes)
