"""Sampling and scoring all candidates of all prompts into `samples.jsonl`, resumable in the middle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama2_chat.chat_format import ChatFormat
from llama2_chat.dialogue import Message, Prompt
from llama2_chat.generation.answers import sample_answers
from llama2_chat.generation.engine import GenerationEngine
from llama2_chat.generation.sample_file import write_samples
from llama2_chat.rejection_sampling.config import RejectionSamplingConfig
from llama2_chat.reward.scoring import RewardScorer


def sample_and_score(
    prompts: Sequence[Prompt],
    *,
    engine: GenerationEngine,
    chat_format: ChatFormat,
    scorer: RewardScorer,
    config: RejectionSamplingConfig,
    seed: int,
    file: Path,
    description: str,
) -> None:
    """Write `file`: for each prompt, in order, `samples_per_prompt` rows with scores and status; resumable."""
    write_samples(
        file,
        prompts,
        lambda chunk: _sample_chunk(chunk, engine, chat_format, scorer, config, seed),
        rows_per_item=config.samples_per_prompt,
        description=description,
        unit="prompts",
    )


def _sample_chunk(
    prompts: Sequence[Prompt],
    engine: GenerationEngine,
    chat_format: ChatFormat,
    scorer: RewardScorer,
    config: RejectionSamplingConfig,
    seed: int,
) -> list[dict[str, Any]]:
    answers = sample_answers(
        engine,
        chat_format,
        [prompt.messages for prompt in prompts],
        samples_per_prompt=config.samples_per_prompt,
        sampling=config.sampling,
        seed=seed,
    )
    flat = [
        (prompt, index, answer)
        for prompt, row in zip(prompts, answers, strict=True)
        for index, answer in enumerate(row)
    ]
    scores = scorer.score(
        [(*prompt.messages, Message("assistant", answer.text)) for prompt, _, answer in flat],
        [prompt.is_safety for prompt, _, _ in flat],
    )
    return [
        {
            "prompt": [{"role": m.role, "content": m.content} for m in prompt.messages],
            "response": answer.text,
            "scores": {"helpfulness": s.helpfulness, "safety": s.safety, "combined": s.combined},
            "policy": Path(config.policy).parent.name,
            "iteration": config.iteration,
            "temperature": config.sampling.temperature,
            "sample_index": index,
            "is_safety": prompt.is_safety,
            "status": answer.status,
        }
        for (prompt, index, answer), s in zip(flat, scores, strict=True)
    ]
