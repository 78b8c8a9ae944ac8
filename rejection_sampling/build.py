"""The `rejection_sampling` stage: sample K answers a prompt, keep the best, fine-tune on them."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

from llama2_chat.errors import UserInputError
from llama2_chat.files import write_json
from llama2_chat.generation.sample_file import write_samples
from llama2_chat.jsonl import read_prompts, read_rows
from llama2_chat.model_card import model_card
from llama2_chat.rejection_sampling.best_of import best_of_curves, sample_counts
from llama2_chat.rejection_sampling.config import RejectionSamplingConfig
from llama2_chat.rejection_sampling.dataset import Selection, pooled_candidates, sampled_candidates
from llama2_chat.rejection_sampling.pool import PoolIndex, check_samples, index_pool, write_pool
from llama2_chat.rejection_sampling.rows_by_place import RowsByPlace
from llama2_chat.rejection_sampling.sample import Sampler
from llama2_chat.rejection_sampling.temperature import read_scores, search_temperature, worth
from llama2_chat.settings import RunSettings
from llama2_chat.sft.made_data import fine_tune
from llama2_chat.stage import StageDirectory


def run_stage(
    config: RejectionSamplingConfig, settings: RunSettings, directory: StageDirectory
) -> dict[str, Any]:
    """Write `samples.jsonl`, `dataset.jsonl` (the kept answers) and `model/`, fine-tuned on them.

    With a temperature search also `temperature.json` and its samples, with earlier samples also `pool.jsonl`.

    Returns:
        Metrics of the search, the samples, the selection and the fine-tuning.
    """
    metrics, index = _sample(config, settings, directory)
    metrics |= _measure(config, settings, directory)
    metrics |= _select(config, settings, directory, metrics["selection"], index)
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
    return {**metrics, **trained}


def _sample(
    config: RejectionSamplingConfig, settings: RunSettings, directory: StageDirectory
) -> tuple[dict[str, Any], PoolIndex | None]:
    """Everything that needs the policy or the reward models, which are let go at the end."""
    metrics: dict[str, Any] = {}
    temperature = config.sampling.temperature
    if config.uses_earlier and not directory.samples.exists():
        check_samples(config.earlier_samples)
    with Sampler(config, settings) as sampler:
        if config.temperatures:
            metrics["temperature"] = search_temperature(config, sampler, directory)
            temperature = metrics["temperature"]["chosen"]
            _log_time("temperatures", sampler, directory)
        if not directory.samples.exists():
            _write_samples(config, sampler, directory, temperature)
            _log_time("samples", sampler, directory)
        return metrics, _pool(config, sampler, directory) if config.uses_earlier else None


def _log_time(phase: str, sampler: Sampler, directory: StageDirectory) -> None:
    """What a phase took of this call's time; after an interruption that is the part since then."""
    if sampler.seconds:
        directory.events.write("sampling_time", phase=phase, **sampler.seconds)
        sampler.seconds.clear()


def _write_samples(
    config: RejectionSamplingConfig, sampler: Sampler, directory: StageDirectory, temperature: float
) -> None:
    prompts = list(chain.from_iterable(read_prompts(Path(file)) for file in config.prompts))
    if not prompts:
        raise UserInputError(f"{', '.join(config.prompts)}: no prompt to sample from")
    write_samples(
        directory.samples,
        prompts,
        lambda chunk: list(
            sampler.sample(chunk, samples_per_prompt=config.samples_per_prompt, temperature=temperature)
        ),
        rows_per_item=config.samples_per_prompt,
        description=f"{directory.path.name}: sampling",
        unit="prompts",
    )


def _pool(config: RejectionSamplingConfig, sampler: Sampler, directory: StageDirectory) -> PoolIndex:
    """Write `pool.jsonl` of the samples of this and of earlier iterations."""
    earlier = [Path(file) for file in config.earlier_samples]
    with RowsByPlace([*earlier, directory.samples]) as rows:
        index = index_pool(rows, own=len(earlier), samples_per_prompt=config.samples_per_prompt)
        if index.latest_earlier >= config.iteration:
            directory.warn(
                f"iteration is {config.iteration}, but among the earlier samples are some of iteration "
                f"{index.latest_earlier}: of equal answers the one with the lower number counts as the earlier"
            )
        description = f"{directory.path.name}: scoring the pool"
        write_pool(directory.pool, rows, index, sampler=sampler, description=description)
    return index


def _measure(
    config: RejectionSamplingConfig, settings: RunSettings, directory: StageDirectory
) -> dict[str, Any]:
    """What this iteration's samples are worth by their number, also written to `best_of.json`."""
    samples = config.samples_per_prompt
    scores_PK, status = read_scores((row for _, row in read_rows(directory.samples)), samples)
    curves = best_of_curves(worth(scores_PK), sizes=sample_counts(samples), seed=settings.seed)
    write_json(directory.best_of, {"prompts": len(scores_PK), "samples_per_prompt": samples, **curves})
    return {
        "best_of": curves,
        "selection": {
            "prompts": len(scores_PK),
            "samples": dict(sorted(status.items())),
            # Over prompts that have a complete answer; None where none has.
            "combined_mean": scores_PK.nanmean(1).nanmean().item() if status["complete"] else None,
        },
    }


def _select(
    config: RejectionSamplingConfig,
    settings: RunSettings,
    directory: StageDirectory,
    counted: dict[str, Any],
    index: PoolIndex | None,
) -> dict[str, Any]:
    """Write the kept answers as dialogues; what was not eligible is counted."""
    selection = Selection(config, settings.seed)
    if index is None:
        candidates = sampled_candidates(directory.samples, config.samples_per_prompt)
    else:
        candidates = pooled_candidates(directory.pool, index.repeats)
    selection.write(directory.dataset, candidates, status=counted["samples"])
    without_answer = selection.without_answer + (0 if index is None else index.without_answer)
    return {
        "selection": {
            "prompts": counted["prompts"],
            "kept": selection.kept,
            "prompts_without_complete_answer": without_answer,
            **{f"prompts_all_unsafe_{what}": selection.unsafe[what] for what in ("kept", "dropped")},
            "samples": counted["samples"],
            "combined_mean": counted["combined_mean"],
            "combined_kept": selection.combined_mean,
        },
        "kept_from": selection.kept_from(),
        **({} if index is None else {"pool": index.counts}),
    }
