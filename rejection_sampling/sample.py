"""Sampling answers and scoring them: rows of `samples.jsonl`."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Self

from llama2_chat.chat_format import ChatFormat
from llama2_chat.dialogue import Message, Prompt, Row, messages_to_rows
from llama2_chat.generation.answers import Answer, sample_answers
from llama2_chat.generation.backends import open_engine
from llama2_chat.generation.engine import GenerationEngine, Response
from llama2_chat.rejection_sampling.config import RejectionSamplingConfig
from llama2_chat.reward.scoring import RewardScorer, Score
from llama2_chat.settings import RunSettings

_TOO_LONG = Answer("", "too_long", Response([], [], "length"))


class Sampler:
    """The policy and the reward models of a stage, each loaded when it is first needed and kept for a `with`.

    `seconds` says what its `sample` has taken so far, the loading included: `generate` and `score`.
    """

    def __init__(self, config: RejectionSamplingConfig, settings: RunSettings) -> None:
        self.config = config
        self.settings = settings
        self.seconds: dict[str, float] = defaultdict(float)
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._opened.close()

    @cached_property
    def policy(self) -> tuple[GenerationEngine, ChatFormat]:
        """What is sampled from."""
        engine = open_engine(self.config.policy, self.settings, self.config.sampling)
        return self._opened.enter_context(engine)

    @cached_property
    def scorer(self) -> RewardScorer:
        """What scores the answers."""
        return RewardScorer.from_pretrained(
            self.config.helpfulness,
            self.config.safety,
            safety_threshold=self.config.safety_threshold,
            device=self.settings.device,
        )

    def sample(
        self, prompts: Sequence[Prompt], *, samples_per_prompt: int, temperature: float
    ) -> Iterator[Row]:
        """For each prompt, in order, `samples_per_prompt` rows with scores and status.

        An answer depends on seed, prompt and index alone, so that at two temperatures it is drawn with the same
        random numbers. A prompt that leaves no room for an answer has `samples_per_prompt` empty ones, "too_long".
        """
        started = time.perf_counter()
        answers = self._answers(prompts, samples_per_prompt, temperature)
        generated = time.perf_counter()
        flat = [
            (prompt, index, answer)
            for prompt, row in zip(prompts, answers, strict=True)
            for index, answer in enumerate(row)
        ]
        scores = score_fitting(
            self.scorer,
            [
                None if answer is _TOO_LONG else (*prompt.messages, Message("assistant", answer.text))
                for prompt, _, answer in flat
            ],
            [prompt.is_safety for prompt, _, _ in flat],
        )
        self.seconds["generate"] += generated - started
        self.seconds["score"] += time.perf_counter() - generated
        for (prompt, index, answer), score in zip(flat, scores, strict=True):
            yield {
                "prompt": messages_to_rows(prompt.messages),
                "response": answer.text,
                "scores": scores_row(score),
                "policy": Path(self.config.policy).parent.name,
                "iteration": self.config.iteration,
                "temperature": temperature,
                "sample_index": index,
                "is_safety": prompt.is_safety,
                "status": status_of(answer.status, score),
            }

    def _answers(
        self, prompts: Sequence[Prompt], samples_per_prompt: int, temperature: float
    ) -> list[list[Answer]]:
        engine, chat_format = self.policy
        sampling = self.config.sampling.model_copy(update={"temperature": temperature})
        room = _context_length(engine) - sampling.max_new_tokens
        fits = [len(chat_format.prompt_ids(prompt.messages)) <= room for prompt in prompts]
        answers = iter(
            sample_answers(
                engine,
                chat_format,
                [prompt.messages for prompt, fit in zip(prompts, fits, strict=True) if fit],
                samples_per_prompt=samples_per_prompt,
                sampling=sampling,
                seed=self.settings.seed,
            )
        )
        return [next(answers) if fit else [_TOO_LONG] * samples_per_prompt for fit in fits]


def score_fitting(
    scorer: RewardScorer, dialogues: Sequence[Sequence[Message] | None], is_safety: Sequence[bool]
) -> list[Score | None]:
    """Scores in order; None where there is no dialogue, or its last turn alone is too long for a reward model."""
    fit = [dialogue is not None and scorer.can_take(dialogue) for dialogue in dialogues]
    scores = iter(
        scorer.score(
            [dialogue for dialogue, there in zip(dialogues, fit, strict=True) if dialogue and there],
            [tag for tag, there in zip(is_safety, fit, strict=True) if there],
        )
    )
    return [next(scores) if there else None for there in fit]


def scores_row(score: Score | None) -> Row | None:
    """The `scores` object of a row."""
    if score is None:
        return None
    return {"helpfulness": score.helpfulness, "safety": score.safety, "combined": score.combined}


def status_of(status: str, score: Score | None) -> str:
    """A complete answer that no reward model could take whole cannot be selected."""
    return "too_long" if score is None and status == "complete" else status


def _context_length(engine: GenerationEngine) -> float:
    """Tokens that the policy can take; an engine that does not hold its model sees to its own limit."""
    config = getattr(getattr(engine, "model", None), "config", None)
    length: float = getattr(config, "max_position_embeddings", math.inf)
    return length
