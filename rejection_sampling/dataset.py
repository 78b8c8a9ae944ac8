"""Selecting from the samples, or from the pool, into `dataset.jsonl`, with an account of what was kept and left out."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from llama2_chat.dialogue import Row
from llama2_chat.errors import UserInputError
from llama2_chat.jsonl import read_rows, write_rows
from llama2_chat.rejection_sampling.config import RejectionSamplingConfig
from llama2_chat.rejection_sampling.select import all_unsafe, select

Candidates = Iterable[tuple[Sequence[Row], int]]
"""For each prompt its samples, one after the other, and how often to select from them."""


def sampled_candidates(file: Path, samples_per_prompt: int) -> Iterator[tuple[Sequence[Row], int]]:
    """The prompts of `samples.jsonl`, each with its K samples."""
    rows = (row for _, row in read_rows(file))
    while group := list(islice(rows, samples_per_prompt)):
        yield group, 1


def pooled_candidates(file: Path, repeats: Sequence[int]) -> Iterator[tuple[Sequence[Row], int]]:
    """The prompts of `pool.jsonl`; one that this iteration sampled several times is selected for as often."""
    groups = groupby((row for _, row in read_rows(file)), key=lambda row: row["prompt"])
    for (_, group), times in zip(groups, repeats, strict=True):
        yield list(group), times


class Selection:
    """Selects once through all prompts and counts what came of it."""

    def __init__(self, config: RejectionSamplingConfig, seed: int) -> None:
        self.config = config
        self.rng = random.Random(seed)
        self.kept = 0
        self.without_answer = 0
        self.unsafe: Counter[str] = Counter()
        self.sources: Counter[tuple[int, str]] = Counter()
        self.sums: Counter[tuple[int, str]] = Counter()

    def write(self, file: Path, candidates: Candidates, *, status: dict[str, int]) -> None:
        """Write the kept answers as dialogues.

        Args:
            status: Samples of this iteration by status, for the message where nothing is kept.

        Raises:
            UserInputError: nothing is kept.
        """
        write_rows(file, self._dialogues(candidates, status))

    def _dialogues(self, candidates: Candidates, status: dict[str, int]) -> Iterator[Row]:
        for group, times in candidates:
            for _ in range(times):
                yield from self._of_prompt(group)
        if not self.kept:
            raise UserInputError(
                f"no answer is kept: the samples are {status}, and {self.unsafe['dropped']} prompts were left out "
                "because all their answers are unsafe; raise sampling.max_new_tokens (cut_off), lower it or shorten "
                "the prompts (too_long), lower sampling.temperature, or set when_all_unsafe: keep"
            )

    def _of_prompt(self, group: Sequence[Row]) -> Iterator[Row]:
        kept = select(group, rule=self.config.select, rng=self.rng, keep=self.config.kept_per_prompt)
        if not kept:
            self.without_answer += 1
            return
        if all_unsafe(group):
            dropped = self.config.when_all_unsafe == "drop"
            self.unsafe["dropped" if dropped else "kept"] += 1
            if dropped:
                return
        for row in (group[place] for place in kept):
            self.kept += 1
            source = (row["iteration"], row["policy"])
            self.sources[source] += 1
            self.sums[source] += row["scores"]["combined"]
            yield {
                "messages": [*row["prompt"], {"role": "assistant", "content": row["response"]}],
                "is_safety": row["is_safety"],
                "source": f"rejection_sampling:{row['iteration']}",
            }

    @property
    def combined_mean(self) -> float:
        """Mean combined score of the kept answers."""
        return sum(self.sums.values()) / self.kept

    def kept_from(self) -> list[dict[str, Any]]:
        """Where the kept answers come from, in the order of iterations."""
        return [
            {
                "iteration": source[0],
                "policy": source[1],
                "answers": self.sources[source],
                "combined_mean": self.sums[source] / self.sources[source],
            }
            for source in sorted(self.sources)
        ]
