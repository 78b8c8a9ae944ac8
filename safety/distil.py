"""Answers with and without the preprompt, scored as answers to the prompt without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from llama2_chat.chat_format import ChatFormat
from llama2_chat.dialogue import Message, Prompt, Row, messages_to_rows
from llama2_chat.generation.answers import Answer, sample_answers
from llama2_chat.generation.engine import GenerationEngine
from llama2_chat.reward.custom import Reward
from llama2_chat.safety.config import ContextDistillationConfig
from llama2_chat.safety.preprompt import with_preprompt

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class PrepromptedPrompt:
    """An adversarial prompt and the preprompt that it is answered under."""

    prompt: Prompt
    preprompt: str


def distil(
    prompts: Sequence[PrepromptedPrompt],
    engine: GenerationEngine,
    chat_format: ChatFormat,
    safety: Reward,
    config: ContextDistillationConfig,
    seed: int,
) -> list[Row]:
    """One row of `samples.jsonl` for each prompt: both answers, their safety scores, whether it is kept."""
    plain = [item.prompt.messages for item in prompts]
    careful = [with_preprompt(item.prompt.messages, item.preprompt) for item in prompts]
    answers = sample_answers(
        engine, chat_format, [*plain, *careful], samples_per_prompt=1, sampling=config.sampling, seed=seed
    )
    originals, distilled = ([answer for (answer,) in part] for part in _halves(answers))
    scores = safety.score_messages(
        [
            (*messages, Message("assistant", answer.text))
            for messages, answer in zip(plain * 2, [*originals, *distilled], strict=True)
        ]
    ).tolist()
    original_scores, distilled_scores = _halves(scores)
    return [
        _row(*columns, config)
        for columns in zip(prompts, originals, distilled, original_scores, distilled_scores, strict=True)
    ]


def _halves(values: list[_T]) -> tuple[list[_T], list[_T]]:
    return values[: len(values) // 2], values[len(values) // 2 :]


def _row(
    item: PrepromptedPrompt,
    original: Answer,
    distilled: Answer,
    original_score: float,
    distilled_score: float,
    config: ContextDistillationConfig,
) -> Row:
    better = config.keep == "all" or distilled_score > original_score
    return {
        "prompt": messages_to_rows(item.prompt.messages),
        "preprompt": item.preprompt,
        "response": distilled.text,
        "original_response": original.text,
        "scores": {"safety": distilled_score, "original_safety": original_score},
        "status": distilled.status,
        "original_status": original.status,
        "kept": distilled.status == "complete" and better,
        "policy": Path(config.policy).parent.name,
        "temperature": config.sampling.temperature,
        "risk_category": item.prompt.risk_category,
        "source": item.prompt.source,
    }
