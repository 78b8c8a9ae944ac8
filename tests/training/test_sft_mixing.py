"""Mixing files: how often each dialogue occurs, and that the metrics say what was used."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2_chat.errors import UserInputError
from llama2_chat.jsonl import write_rows
from llama2_chat.sft.config import SftConfig
from llama2_chat.sft.mixing import mix, repeated


@pytest.fixture
def files(tmp_path) -> list[str]:
    made = []
    for name, count in (("help", 10), ("safety", 4)):
        rows = [
            {"messages": [{"role": "user", "content": f"{name} {n}"}, {"role": "assistant", "content": "A."}]}
            for n in range(count)
        ]
        write_rows(tmp_path / f"{name}.jsonl", rows)
        made.append(str(tmp_path / f"{name}.jsonl"))
    return made


def questions(dialogues) -> list[str]:
    return [dialogue.messages[0].content for dialogue in dialogues]


def test_without_weights_every_dialogue_occurs_once_in_order(files) -> None:
    dialogues, parts = mix(files, None, seed=0)
    assert questions(dialogues) == [f"help {n}" for n in range(10)] + [f"safety {n}" for n in range(4)]
    assert questions(mix(files, [1, 1], seed=5)[0]) == questions(dialogues)
    assert [part.to_row() for part in parts] == [
        {"file": "help.jsonl", "dialogues": 10, "weight": 1.0, "used": 10, "share": 10 / 14},
        {"file": "safety.jsonl", "dialogues": 4, "weight": 1.0, "used": 4, "share": 4 / 14},
    ]


def test_a_half_and_two_and_a_half_times(files) -> None:
    dialogues, parts = mix(files, [0.5, 2.5], seed=1)
    counted = Counter(questions(dialogues))
    assert sorted(counted[f"help {n}"] for n in range(10)) == [0] * 5 + [1] * 5
    assert sorted(counted[f"safety {n}"] for n in range(4)) == [2, 2, 3, 3]
    assert [(part.used, part.share) for part in parts] == [(5, 5 / 15), (10, 10 / 15)]


def test_the_draw_depends_on_the_seed_alone(files) -> None:
    once, again, other = (questions(mix(files, [0.5, 0.5], seed=seed)[0]) for seed in (1, 1, 2))
    assert once == again
    assert once != other


def test_a_weight_that_leaves_nothing_is_the_users_mistake(files) -> None:
    with pytest.raises(UserInputError, match="leave none of the 14 dialogues"):
        mix(files, [0.01, 0.01], seed=0)


@given(st.integers(0, 50), st.floats(0, 5), st.integers())
def test_as_many_rows_as_the_weight_says(count: int, weight: float, seed: int) -> None:
    found = repeated(count, weight, Random(seed))
    assert found == sorted(found)
    assert len(found) == round(count * weight)
    assert set(Counter(found).values()) <= {int(weight), int(weight) + 1}


@pytest.mark.parametrize("weights", [[1.0], [0.0, 0.0], [1.0, -0.1], [1.0, 101.0], [float("nan"), 1.0]])
def test_wrong_weights_are_refused(weights) -> None:
    with pytest.raises(ValueError, match="weights"):
        SftConfig(dialogues=["a", "b"], weights=weights)
