"""Sampling and scoring all candidates of all prompts into `samples.jsonl`, resumable in the middle."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from llama2_chat import interruption
from llama2_chat.chat_format import ChatFormat
from llama2_chat.dialogue import Message, Prompt
from llama2_chat.files import remove
from llama2_chat.generation.answers import sample_answers
from llama2_chat.generation.engine import GenerationEngine
from llama2_chat.progress import track
from llama2_chat.rejection_sampling.config import RejectionSamplingConfig
from llama2_chat.reward.scoring import RewardScorer

PROMPTS_PER_CHUNK = 128
"""Sampling resumes at multiples of this many prompts: what a kill can lose."""


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
    """Write `file`: for each prompt, in order, `samples_per_prompt` rows with scores and status.

    A killed call leaves `<file>.partial`; the next one continues after its last whole chunk and ends
    with the same bytes, since a chunk is always the same batch of work.
    """
    if file.exists():
        return
    partial = file.with_name(file.name + ".partial")
    chunk_rows = PROMPTS_PER_CHUNK * config.samples_per_prompt
    done = keep_whole_chunks(partial, chunk_rows) // config.samples_per_prompt
    with track(description, total=len(prompts), unit="prompts", done=done) as progress:
        for start in range(done, len(prompts), PROMPTS_PER_CHUNK):
            interruption.raise_if_requested()
            chunk = prompts[start : start + PROMPTS_PER_CHUNK]
            rows = _sample_chunk(chunk, engine, chat_format, scorer, config, seed)
            with partial.open("a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                stream.flush()
                os.fsync(stream.fileno())
            progress.advance(len(chunk))
    partial.replace(file)


def keep_whole_chunks(partial: Path, chunk_rows: int) -> int:
    """Cut a partial file after its last whole chunk; returns the rows that stay."""
    if not partial.exists():
        return 0
    with partial.open("rb") as stream:
        whole_lines = sum(1 for line in stream if line.endswith(b"\n"))
    rows = whole_lines - whole_lines % chunk_rows
    if rows == 0:
        remove(partial)
        return 0
    with partial.open("rb+") as stream:
        kept = sum(len(line) for line in islice(stream, rows))
        stream.truncate(kept)
    return rows


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
