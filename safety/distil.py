"""Answers with and without the preprompt, scored as answers to the prompt without it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama2_chat.chat_format import ChatFormat
from llama2_chat.dialogue import Message, Prompt, Row, messages_to_rows
from llama2_chat.generation.answers import Answer, sample_answers
from llama2_chat.generation.engine import GenerationEngine
from llama2_chat.reward.custom import Reward
from llama2_chat.reward.scoring import RewardModel
from llama2_chat.safety.config import ContextDistillationConfig
from llama2_chat.safety.preprompt import Preprompt, with_preprompt


@dataclass(frozen=True, slots=True)
class PrepromptedPrompt:
    """A prompt and the preprompt that it is answered under."""

    prompt: Prompt
    preprompt: Preprompt


@dataclass(frozen=True, slots=True)
class Scored:
    """An answer and its raw safety score."""

    answer: Answer
    score: float


def fits(
    item: PrepromptedPrompt,
    engine: GenerationEngine,
    chat_format: ChatFormat,
    safety: Reward,
    *,
    max_new_tokens: int,
) -> bool:
    """Whether the policy's context has room for an answer under the preprompt, and the reward model's for both."""
    messages = item.prompt.messages
    config = getattr(getattr(engine, "model", None), "config", None)
    context = getattr(config, "max_position_embeddings", math.inf)
    if len(chat_format.prompt_ids(with_preprompt(messages, item.preprompt.text))) + max_new_tokens > context:
        return False
    if not isinstance(safety, RewardModel):
        return True
    # Of a long dialogue it takes the system message and the last turn, at the least.
    kept = [message for message in messages[:-1] if message.role == "system"] + [messages[-1]]
    return len(safety.chat_format.prompt_ids(kept)) + max_new_tokens <= safety.max_tokens


def distil(
    prompts: Sequence[PrepromptedPrompt],
    engine: GenerationEngine,
    chat_format: ChatFormat,
    safety: Reward,
    config: ContextDistillationConfig,
    seed: int,
) -> list[Row]:
    """One row of `samples.jsonl` for each prompt: its answers, their safety scores, whether it is kept."""

    def answered(asked: Sequence[Sequence[Message]], judged: Sequence[Sequence[Message]]) -> list[Scored]:
        """Answers to what is asked, scored as answers to the same without the preprompt."""
        rows = sample_answers(
            engine, chat_format, asked, samples_per_prompt=1, sampling=config.sampling, seed=seed
        )
        answers = [answer for (answer,) in rows]
        dialogues = [
            (*messages, Message("assistant", answer.text))
            for messages, answer in zip(judged, answers, strict=True)
        ]
        scores = safety.score_messages(dialogues).tolist()
        return [Scored(answer, score) for answer, score in zip(answers, scores, strict=True)]

    plain = [item.prompt.messages for item in prompts]
    careful = [with_preprompt(item.prompt.messages, item.preprompt.text) for item in prompts]
    scored = answered([*plain, *careful], [*plain, *plain])
    compared = [config.compare_preprompts and item.preprompt.template is not None for item in prompts]
    chosen = [item for item, wanted in zip(prompts, compared, strict=True) if wanted]
    # By themselves, so that no batch of the others becomes another one.
    generic = iter(
        answered(
            [with_preprompt(item.prompt.messages, item.preprompt.generic) for item in chosen],
            [item.prompt.messages for item in chosen],
        )
        if chosen
        else ()
    )
    return [
        _row(item, original, distilled, next(generic) if wanted else None, config)
        for item, original, distilled, wanted in zip(
            prompts, scored[: len(prompts)], scored[len(prompts) :], compared, strict=True
        )
    ]


def _row(
    item: PrepromptedPrompt,
    original: Scored,
    distilled: Scored,
    generic: Scored | None,
    config: ContextDistillationConfig,
) -> Row:
    rises = config.keep == "all" or distilled.score - original.score > config.min_rise
    row: Row = {
        "prompt": messages_to_rows(item.prompt.messages),
        "preprompt": item.preprompt.text,
        "response": distilled.answer.text,
        "original_response": original.answer.text,
        "scores": {"safety": distilled.score, "original_safety": original.score},
        "status": distilled.answer.status,
        "original_status": original.answer.status,
        "kept": distilled.answer.status == "complete" and rises,
        "policy": Path(config.policy).parent.name,
        "temperature": config.sampling.temperature,
        "is_safety": item.prompt.is_safety,
        "risk_category": item.prompt.risk_category,
        "source": item.prompt.source,
    }
    if generic is not None:
        row |= {"generic_response": generic.answer.text, "generic_status": generic.answer.status}
        row["scores"]["generic_safety"] = generic.score
    return row
