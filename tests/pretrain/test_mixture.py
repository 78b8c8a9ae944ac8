"""Sampling proportions: how often each document is drawn, by hand and by property."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llama2_chat.pretrain.config import PretrainConfig, PretrainTraining
from llama2_chat.pretrain.mixture import draw_rounds, passes_over_rows, planned_tokens, source_records
from llama2_chat.pretrain.token_store import Source


def arrays(*lengths: list[int]) -> list[np.ndarray]:
    return [np.array(source, dtype=np.int64) for source in lengths]


def test_whole_passes_by_hand() -> None:
    # 60 tokens, two thirds and a third: 40 = 2 passes over 20, 20 = 1 pass over 20
    rounds = draw_rounds(arrays([5, 15], [10, 4, 6]), [2, 1], 60, seed=0)
    assert [r.tolist() for r in rounds] == [[0, 1, 2, 3, 4], [0, 1]]


def test_a_proportion_of_nothing_sees_nothing() -> None:
    rounds = draw_rounds(arrays([5, 15], [10, 4, 6]), [0, 1], 20, seed=0)
    assert [r.tolist() for r in rounds] == [[2, 3, 4]]


def test_the_rest_is_drawn_at_random_without_replacement() -> None:
    lengths = arrays([1] * 1000, [1] * 10)
    draws = [draw_rounds(lengths, [0.3, 0.7], 1000, seed=seed) for seed in range(200)]
    # 300 of the first, each document equally often; 700 of the second, 70 passes
    assert all(sum((r < 1000).sum() for r in rounds) == 300 for rounds in draws)
    assert all(len(rounds) == 70 for rounds in draws)
    counts = np.bincount(np.concatenate([r[r < 1000] for rounds in draws for r in rounds]), minlength=1000)
    # Of 200 draws each document is in 60 on average, with standard deviation sqrt(200 * 0.3 * 0.7) = 6.48.
    assert abs(counts.std() - 6.48) < 0.6
    assert counts.max() < 60 + 5 * 6.48


def test_the_draw_is_a_function_of_the_seed() -> None:
    lengths = arrays(list(range(1, 50)))
    one, same, other = (np.concatenate(draw_rounds(lengths, [1], 300, seed)).tolist() for seed in (1, 1, 2))
    assert one == same != other


@given(
    st.lists(st.lists(st.integers(2, 30), min_size=1, max_size=12), min_size=1, max_size=4),
    st.integers(1, 2000),
    st.integers(0, 2**32 - 1),
    st.data(),
)
def test_every_source_gets_its_tokens_and_no_round_repeats(sources, tokens: int, seed: int, data) -> None:
    shares = data.draw(st.lists(st.floats(0.01, 5), min_size=len(sources), max_size=len(sources)))
    rounds = draw_rounds(arrays(*sources), shares, tokens, seed)
    flat = np.concatenate(arrays(*sources))
    owner = np.repeat(np.arange(len(sources)), [len(s) for s in sources])
    times = np.zeros(len(flat), dtype=np.int64)
    for members in rounds:
        assert members.tolist() == sorted(set(members.tolist()))
        times[members] += 1
    for number, share in enumerate(shares):
        mine = owner == number
        wanted = round(tokens * share / sum(shares))
        got = int((times * flat)[mine].sum())
        assert max(wanted - 1, 1) <= got < wanted + 1 + max(sources[number])
        assert times[mine].max() - times[mine].min() <= 1


def test_planned_tokens() -> None:
    training = PretrainTraining(batch_size=4, sequence_length=64, epochs=1.5)
    assert planned_tokens(1000, training) == 1500
    assert planned_tokens(1000, training.model_copy(update={"max_steps": 3})) == 3 * 4 * 64
    assert planned_tokens(100, training.model_copy(update={"max_steps": 3})) == 150


def test_passes_count_short_batches() -> None:
    # 10 rows in batches of 4: 4, 4, 2
    assert [passes_over_rows(10, steps, 4) for steps in range(7)] == pytest.approx(
        [0, 0.4, 0.8, 1, 1.4, 1.8, 2], rel=1e-12
    )


def test_records_by_hand() -> None:
    sources = [Source("a", 3, 1, 400), Source("b", 2, 0, 100)]
    first, second = source_records(sources, [300, 300], 0.5)
    assert first == {
        **{"file": "a", "documents": 3, "empty": 1, "tokens": 400},
        **{"tokens_seen": 150, "share": 0.5, "epochs": 0.375},
    }
    assert (second["tokens_seen"], second["share"], second["epochs"]) == (150, 0.5, 1.5)


@pytest.mark.parametrize(
    ("text", "proportions", "message"),
    [
        (["a", "b"], [1.0], "1 proportions for 2 sources of text; give one for each"),
        ("a", [0.5, 0.5], "2 proportions for 1 sources"),
        (["a", "b"], [1.0, -0.1], r"every proportion is a number from 0.*-0\.1"),
        (["a", "b"], [1.0, float("nan")], "finite number"),
        (["a", "b"], [1.0, float("inf")], "finite number"),
        (["a", "b"], [0.0, 0.0], "at least one above 0"),
        ([], None, "at least 1 item"),
    ],
)
def test_wrong_proportions_are_refused(text, proportions, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PretrainConfig(text=text, proportions=proportions)


def test_one_source_and_a_list_of_one_are_the_same() -> None:
    assert PretrainConfig(text="a").sources == PretrainConfig(text=["a"], proportions=[7.0]).sources == ["a"]
