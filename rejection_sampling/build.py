"""The `rejection_sampling` stage: sample K answers a prompt, keep the best, fine-tune on them."""

from __future__ import annotations

import random
from collections import Counter
from itertools import chain, islice
from pathlib import Path
from typing import Any

from llama2_chat.errors import UserInputError
from llama2_chat.generation.backends import open_engine
from llama2_chat.jsonl import read_prompts, read_rows, write_rows
from llama2_chat.model_card import model_card
from llama2_chat.rejection_sampling.config import RejectionSamplingConfig
from llama2_chat.rejection_sampling.sample import sample_and_score
from llama2_chat.rejection_sampling.select import select
from llama2_chat.reward.scoring import RewardScorer
from llama2_chat.settings import RunSettings
from llama2_chat.sft.made_data import fine_tune
from llama2_chat.stage import StageDirectory


def run_stage(
    config: RejectionSamplingConfig, settings: RunSettings, directory: StageDirectory
) -> dict[str, Any]:
    """Write `samples.jsonl`, `dataset.jsonl` (the kept answers) and `model/`, fine-tuned on them.

    Returns:
        Metrics of the selection and of the fine-tuning.
    """
    _sample(config, settings, directory)
    selection = _select(config, settings, directory)
    trained = fine_tune(
        config.base if config.start_from == "base" else config.policy,
        settings,
        directory,
        training=config.training,
        loss_policy="last_answer",
        sft_dialogues=config.sft_dialogues,
        sft_fraction=config.sft_fraction,
        card=model_card("rejection_sampling", config, settings),
    )
    return {"selection": selection, **trained}


def _sample(config: RejectionSamplingConfig, settings: RunSettings, directory: StageDirectory) -> None:
    if directory.samples.exists():
        return
    prompts = list(chain.from_iterable(read_prompts(Path(file)) for file in config.prompts))
    if not prompts:
        raise UserInputError(f"{', '.join(config.prompts)}: no prompt to sample from")
    with open_engine(config.policy, settings, config.sampling) as (engine, chat_format):
        scorer = RewardScorer.from_pretrained(
            config.helpfulness,
            config.safety,
            safety_threshold=config.safety_threshold,
            device=settings.device,
        )
        sample_and_score(
            prompts,
            engine=engine,
            chat_format=chat_format,
            scorer=scorer,
            config=config,
            seed=settings.seed,
            file=directory.samples,
            description=f"{directory.path.name}: sampling",
        )


def _select(
    config: RejectionSamplingConfig, settings: RunSettings, directory: StageDirectory
) -> dict[str, Any]:
    """Write the kept answers as dialogues; what was not eligible is counted."""
    rng = random.Random(settings.seed)
    status: Counter[str] = Counter()
    kept: list[dict[str, Any]] = []
    prompts, best, mean = 0, 0.0, 0.0
    rows = (row for _, row in read_rows(directory.samples))
    while group := list(islice(rows, config.samples_per_prompt)):
        prompts += 1
        status.update(row["status"] for row in group)
        index = select(group, rule=config.select, rng=rng)
        if index is None:
            continue
        row = group[index]
        best += row["scores"]["combined"]
        complete = [r["scores"]["combined"] for r in group if r["status"] == "complete"]
        mean += sum(complete) / len(complete)
        kept.append(
            {
                "messages": [*row["prompt"], {"role": "assistant", "content": row["response"]}],
                "is_safety": row["is_safety"],
                "source": f"rejection_sampling:{config.iteration}",
            }
        )
    if not kept:
        raise UserInputError(
            f"none of the samples for {prompts} prompts is a complete answer ({dict(status)}); "
            "raise sampling.max_new_tokens or lower sampling.temperature"
        )
    write_rows(directory.dataset, kept)
    return {
        "prompts": prompts,
        "kept": len(kept),
        "prompts_without_complete_answer": prompts - len(kept),
        "samples": dict(sorted(status.items())),
        "combined_mean": mean / len(kept),
        "combined_kept": best / len(kept),
    }
