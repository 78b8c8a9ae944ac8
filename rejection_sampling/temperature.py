"""The temperature search: which one gives the best of K samples on held-out prompts (Fig. 8)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, groupby, islice
from math import nan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama2_chat.dialogue import Prompt, Row
from llama2_chat.errors import UserInputError
from llama2_chat.files import read_json, write_json
from llama2_chat.generation.sample_file import write_samples
from llama2_chat.jsonl import read_prompts, read_rows
from llama2_chat.rejection_sampling.best_of import best_of_curves, sample_counts
from llama2_chat.rejection_sampling.config import RejectionSamplingConfig
from llama2_chat.rejection_sampling.sample import Sampler
from llama2_chat.stage import StageDirectory


def search_temperature(
    config: RejectionSamplingConfig, sampler: Sampler, directory: StageDirectory
) -> dict[str, Any]:
    """Sample `temperature_prompts` at each temperature and choose; resumable in the middle.

    Writes every sample to `temperature_samples.jsonl` and the result to `temperature.json`.

    Returns:
        What `temperature.json` holds: `chosen`, `k`, number of prompts and samples, and for each temperature the
        curves of maximum and median and the samples by status.

    Raises:
        UserInputError: there is no prompt, or no temperature gives a single complete answer.
    """
    if directory.temperature.exists():
        result: dict[str, Any] = read_json(directory.temperature)
        return result
    prompts = list(
        islice(
            chain.from_iterable(read_prompts(Path(file)) for file in config.temperature_prompts),
            config.temperature_max_prompts,
        )
    )
    samples = config.temperature_samples_per_prompt or config.samples_per_prompt
    items = [(temperature, prompt) for temperature in config.temperatures for prompt in prompts]
    write_samples(
        directory.temperature_samples,
        items,
        lambda chunk: list(_sample_chunk(chunk, sampler, samples)),
        rows_per_item=samples,
        description=f"{directory.path.name}: temperatures",
        unit="prompts",
    )
    result = _result(config, directory.temperature_samples, len(prompts), samples, sampler.settings.seed)
    write_json(directory.temperature, result)
    return result


def _sample_chunk(chunk: Sequence[tuple[float, Prompt]], sampler: Sampler, samples: int) -> Iterator[Row]:
    for temperature, group in groupby(chunk, key=lambda item: item[0]):
        prompts = [prompt for _, prompt in group]
        yield from sampler.sample(prompts, samples_per_prompt=samples, temperature=temperature)


def _result(
    config: RejectionSamplingConfig, file: Path, prompts: int, samples: int, seed: int
) -> dict[str, Any]:
    k = config.samples_per_prompt
    sizes = sorted({*sample_counts(samples), k})
    rows = (row for _, row in read_rows(file))
    found: list[dict[str, Any]] = []
    for temperature in config.temperatures:
        scores_PK, status = read_scores(islice(rows, prompts * samples), samples)
        curves = best_of_curves(worth(scores_PK), sizes=sizes, seed=seed)
        found.append({"temperature": temperature, **curves, "samples": dict(sorted(status.items()))})
    if not any(one["samples"].get("complete") for one in found):
        raise UserInputError(
            f"{', '.join(config.temperature_prompts)}: no temperature of {config.temperatures} gives a complete "
            f"answer to any of {prompts} prompts ({found[0]['samples']} at {config.temperatures[0]:g}); raise "
            "sampling.max_new_tokens or name lower temperatures"
        )
    return {
        "chosen": choose(found, k),
        "k": k,
        "prompts": prompts,
        "samples_per_prompt": samples,
        "temperatures": found,
    }


def choose(found: Sequence[dict[str, Any]], k: int) -> float:
    """The temperature whose expected maximum over `k` samples is highest; the lowest of equals."""

    def rank(one: dict[str, Any]) -> tuple[float, float]:
        (best,) = (row["mean"] for row in one["maximum"] if row["n"] == k)
        return -best, one["temperature"]

    chosen: float = min(found, key=rank)["temperature"]
    return chosen


def worth(scores_PK: Tensor) -> Tensor:
    """The scores with 0, the lowest that R_c can be, for samples that may not be selected."""
    return scores_PK.nan_to_num(0.0)


def read_scores(rows: Iterator[Row], samples: int) -> tuple[Tensor, Counter[str]]:
    """Combined scores, float64 (prompts, `samples`), NaN where one may not be selected; samples by status."""
    status: Counter[str] = Counter()
    scores: list[Tensor] = []
    while group := list(islice(rows, samples)):
        status.update(row["status"] for row in group)
        values = [row["scores"]["combined"] if row["status"] == "complete" else nan for row in group]
        scores.append(torch.tensor(values, dtype=torch.float64))
    return torch.stack(scores), status
