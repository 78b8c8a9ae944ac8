"""A batch's prompts, responses and scores are functions of seed and iteration, and unfit answers earn nothing."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llama2_chat.dialogue import Message, Prompt
from llama2_chat.generation.answers import Answer
from llama2_chat.generation.engine import Response
from llama2_chat.generation.transformers_engine import TransformersEngine
from llama2_chat.ppo.config import PpoConfig
from llama2_chat.ppo.rollout import EncodedPrompt, prompt_order, sample_batch, scores_to_learn
from llama2_chat.reward.scoring import Score
from llama2_chat.settings import SamplingConfig


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 5))
def test_prompts_come_in_whole_shuffled_epochs(count: int, batch_size: int, seed: int) -> None:
    drawn = [
        index
        for iteration in range(6)
        for index in prompt_order(count, batch_size=batch_size, iteration=iteration, seed=seed)
    ]
    assert len(drawn) == 6 * batch_size
    epochs = [drawn[start : start + count] for start in range(0, len(drawn), count)]
    assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
    times = Counter(drawn)
    assert max(times.values()) - min(times.get(index, 0) for index in range(count)) <= 1


def test_the_order_differs_by_epoch_and_seed() -> None:
    def order(iteration: int, seed: int) -> list[int]:
        return prompt_order(50, batch_size=50, iteration=iteration, seed=seed)

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(iteration, seed)) for iteration in range(3) for seed in range(3)}) == 9


def test_equal_prompts_and_later_iterations_get_samples_of_their_own(tiny_llama) -> None:
    engine = TransformersEngine(tiny_llama(), stop_id=2, padding_id=0)
    chat_format = SimpleNamespace(
        decode_response=lambda ids: " ".join(map(str, ids)), first_control=lambda _: None
    )
    prompt = EncodedPrompt(Prompt((Message("user", "Hi"),)), [1, 5, 6])
    other = EncodedPrompt(Prompt((Message("user", "Ho"),)), [1, 7])

    def sample(prompts: list[EncodedPrompt], iteration: int) -> list[list[int]]:
        answers = sample_batch(
            engine, chat_format, prompts, sampling=SamplingConfig(max_new_tokens=8), iteration=iteration, seed=0
        )  # fmt: skip
        return [answer.response.token_ids for answer in answers]

    batch = [prompt, other, prompt, prompt]
    first, again, later = sample(batch, 0), sample(batch, 0), sample(batch, 1)
    assert first == again
    assert len({tuple(ids) for ids in [*first, *later]}) == 8
    assert sample([other, prompt], 0) == [first[1], first[0]]


def answer(status: str) -> Answer:
    return Answer("text", status, Response([5, 2], [-1.0, -1.0], "stop"))  # type: ignore[arg-type]


def score(helpfulness: float, safety: float | None = None, branch: str = "helpfulness") -> Score:
    return Score(helpfulness, safety, 0.5, None, branch, 0.5)  # type: ignore[arg-type]


def config(**changes) -> PpoConfig:
    return PpoConfig(policy="p", helpfulness="h", prompts=["f"], **changes)


SCORES = [score(3.0), score(9.0, -1.0, "safety"), score(1.0), score(7.0), score(-4.0)]
ANSWERS = [answer(s) for s in ("complete", "complete", "complete", "cut_off", "empty")]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        # The lowest complete score is the second's safety score; the cut-off answer's 7 counts for nothing.
        ("lowest", [3.0, -1.0, 1.0, -1.0, -1.0]),
        ("own", [3.0, -1.0, 1.0, 7.0, -4.0]),
    ],
)
def test_unfit_answers_score_as_the_lowest_complete_one(rule: str, expected: list[float]) -> None:
    assert scores_to_learn(SCORES, ANSWERS, config(incomplete=rule)).tolist() == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"whiten_scores": True}, "write batch for true, none for false"),
        ({"whiten_scores": "always"}, "'batch', 'running' or 'none'"),
        ({"kl_target": 1.0, "kl_coefficient": 0.0}, "which 0 can never leave"),
        ({"kl_target": 1.0, "kl_horizon": 102}, "more than a fifth of the batch"),  # of 512
        ({"kl_target": 0.0}, "greater than 0"),
    ],
)
def test_settings_that_cannot_be_meant(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**changes)


def test_a_part_of_the_batch_gets_the_same_answers(tiny_llama) -> None:
    engine = TransformersEngine(tiny_llama(), stop_id=2, padding_id=0)
    chat_format = SimpleNamespace(
        decode_response=lambda ids: " ".join(map(str, ids)), first_control=lambda _: None
    )
    ids = [[1, 5, 6], [1, 7], [1, 5, 6], [1, 8, 9, 10], [1, 5, 6]]
    prompts = [EncodedPrompt(Prompt((Message("user", "Hi"),)), each) for each in ids]

    def sample(members: list[int] | None) -> list[list[int]]:
        answers = sample_batch(
            engine, chat_format, prompts, sampling=SamplingConfig(max_new_tokens=8), iteration=0, seed=0,
            members=members,
        )  # fmt: skip
        return [answer.response.token_ids for answer in answers]

    asked: list[int] = []
    generate = engine.generate

    def watched(prompts, **rest):
        asked.append(len(prompts))
        return generate(prompts, **rest)

    engine.generate = watched  # type: ignore[method-assign]
    whole = sample(None)
    assert asked == [3, 1, 1]  # first, second and third occurrences
    assert sample([4, 1]) == [whole[4], whole[1]]
    assert asked[3:] == [1, 1]
    assert sample([0, 2, 3]) == [whole[0], whole[2], whole[3]]
    assert sample([]) == []


def test_without_a_complete_answer_all_are_equally_bad() -> None:
    assert scores_to_learn(SCORES[3:], ANSWERS[3:], config()).tolist() == [-4.0, -4.0]
