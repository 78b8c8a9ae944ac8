"""The pool: samples of this and of earlier iterations, scored alike, each answer of a prompt once.

Scores of different reward models cannot be compared, so those of earlier iterations are scored again. An index of
places stands for the samples: of their text one chunk is in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np

from llama2_chat.dialogue import CHAT_TAGS, Message, Row, Sample
from llama2_chat.fields import optional_choice
from llama2_chat.generation.answers import Answer
from llama2_chat.generation.sample_file import write_samples
from llama2_chat.jsonl import read_as
from llama2_chat.rejection_sampling.rows_by_place import RowsByPlace
from llama2_chat.rejection_sampling.sample import Sampler, score_fitting, scores_row, status_of

STATUSES: tuple[str, ...] = get_args(get_type_hints(Answer)["status"])
_NOT_SCORED = -1


@dataclass
class PoolIndex:
    """Which samples are in the pool, as places; in the order of `pool.jsonl`."""

    origins: Sequence[int]
    """Place of each answer's earliest sample."""
    scored: Sequence[int]
    """Place of a sample of this iteration with the same answer, whose scores hold; -1 where there is none."""
    is_safety: Sequence[bool]
    """The prompt's tag: of this iteration where it sampled the prompt, else of the earliest sample."""
    repeats: list[int]
    """For each prompt how often this iteration sampled it; 1 for a prompt of earlier iterations only."""
    without_answer: int
    """Prompts that this iteration sampled, none of which has a complete answer in the pool; with repetitions."""
    latest_earlier: int
    """Highest iteration among the earlier samples."""
    counts: dict[str, Any] = field(default_factory=dict)


def check_samples(files: Iterable[str]) -> None:
    """Read files of earlier samples for their mistakes, which are better told before hours of sampling.

    Raises:
        UserInputError: a row is no sample; the message names file and line.
    """
    for file in files:
        for _ in read_as(file, _read_sample):
            pass


def index_pool(rows: RowsByPlace, *, own: int, samples_per_prompt: int) -> PoolIndex:
    """Read all samples once and say which make up the pool.

    Prompts are in the order in which this iteration sampled them, then those of earlier iterations only; the
    answers of a prompt in the order of iterations. Only complete answers are in the pool; of equal ones to the same
    prompt the earliest.

    Args:
        rows: Files of earlier iterations and of this one.
        own: Number of the latter.
        samples_per_prompt: K of this iteration.

    Raises:
        UserInputError: a row is no sample; the message names file and line.
    """
    table = _Table()
    for number in range(len(rows.files)):
        for place, (sample, status) in rows.read(number, _read_sample):
            table.add(place, sample, status, is_own=number == own)
    return table.index(samples_per_prompt)


def write_pool(
    file: Path, rows: RowsByPlace, index: PoolIndex, *, sampler: Sampler, description: str
) -> None:
    """Write `file`: the pool as rows of the samples format with this stage's scores; resumable."""

    def score(entries: Sequence[int]) -> list[Row]:
        return list(_scored(rows, index, entries, sampler))

    write_samples(file, range(len(index.origins)), score, description=description, unit="samples")


def _scored(rows: RowsByPlace, index: PoolIndex, entries: Sequence[int], sampler: Sampler) -> Iterator[Row]:
    found = [rows[index.origins[entry]] for entry in entries]
    known = [None if index.scored[entry] == _NOT_SCORED else rows[index.scored[entry]] for entry in entries]
    scores = score_fitting(
        sampler.scorer,
        [_dialogue(row) if scored is None else None for row, scored in zip(found, known, strict=True)],
        [index.is_safety[entry] for entry in entries],
    )
    for entry, row, scored, score in zip(entries, found, known, scores, strict=True):
        yield {
            **{name: row[name] for name in ("prompt", "response")},
            "scores": scores_row(score) if scored is None else scored["scores"],
            **{name: row[name] for name in ("policy", "iteration", "temperature", "sample_index")},
            "is_safety": bool(index.is_safety[entry]),
            "status": status_of("complete", score) if scored is None else scored["status"],
        }


def _dialogue(row: Row) -> tuple[Message, ...]:
    prompt = (Message(message["role"], message["content"]) for message in row["prompt"])
    return (*prompt, Message("assistant", row["response"]))


def _read_sample(row: Row) -> tuple[Sample, str]:
    """A sample and its status; where the row has none, what the response itself tells."""
    sample = Sample.from_row(row)
    status = optional_choice(row, "status", STATUSES)
    if status is None:
        tagged = any(tag in sample.response for tag in CHAT_TAGS)
        status = "chat_tag" if tagged else "complete" if sample.response else "empty"
    return sample, status


class _Table:
    """Prompts and answers by digest, while the samples are read."""

    def __init__(self) -> None:
        self.prompts: dict[bytes, int] = {}
        self.answers: dict[bytes, int] = {}
        # By prompt: its tag, where this iteration first sampled it (-1: never), and how many samples it drew.
        self.is_safety, self.own_place, self.own_samples = array("b"), array("q"), array("q")
        # By answer.
        self.prompt_of, self.origin, self.iteration, self.scored = (array("q") for _ in range(4))
        self.ineligible: Counter[str] = Counter()
        self.read: Counter[str] = Counter()
        self.latest_earlier = 0

    def add(self, place: int, sample: Sample, status: str, *, is_own: bool) -> None:
        """One sample; those of this iteration come last."""
        if not is_own:
            self.read["earlier"] += 1
            self.latest_earlier = max(self.latest_earlier, sample.iteration)
        digest = _digest([[message.role, message.content] for message in sample.prompt])
        prompt = self.prompts.setdefault(digest, len(self.prompts))
        if prompt == len(self.own_place):
            self.is_safety.append(sample.is_safety)
            self.own_place.append(-1)
            self.own_samples.append(0)
        if is_own:
            if self.own_place[prompt] == -1:
                self.own_place[prompt] = place
                self.is_safety[prompt] = sample.is_safety
            self.own_samples[prompt] += 1
        if status != "complete":
            if not is_own:
                self.ineligible[status] += 1
            return
        digest = _digest([digest.hex(), sample.response])
        answer = self.answers.setdefault(digest, len(self.answers))
        if answer == len(self.origin):
            self.prompt_of.append(prompt)
            self.origin.append(place)
            self.iteration.append(sample.iteration)
            self.scored.append(place if is_own else _NOT_SCORED)
            return
        self.read["duplicates"] += 1
        if sample.iteration < self.iteration[answer]:
            self.origin[answer], self.iteration[answer] = place, sample.iteration
        if is_own and self.scored[answer] == _NOT_SCORED:
            self.scored[answer] = place

    def index(self, samples_per_prompt: int) -> PoolIndex:
        """What was added, in the pool's order."""
        prompt_of, origin, own_place = (
            np.array(values, dtype=np.int64) for values in (self.prompt_of, self.origin, self.own_place)
        )
        unknown = own_place < 0
        rank = np.where(unknown, own_place.max(initial=0) + 1 + np.arange(len(own_place)), own_place)
        order = np.lexsort((origin, np.array(self.iteration, dtype=np.int64), rank[prompt_of]))
        there = np.unique(prompt_of)
        answered = there[np.argsort(rank[there])]
        repeats = np.maximum(np.array(self.own_samples, dtype=np.int64) // samples_per_prompt, 1)
        unanswered = np.setdiff1d(np.nonzero(~unknown)[0], there)
        scored = np.array(self.scored, dtype=np.int64)
        return PoolIndex(
            origins=origin[order],  # type: ignore[arg-type]
            scored=scored[order],  # type: ignore[arg-type]
            is_safety=np.array(self.is_safety, dtype=bool)[prompt_of[order]],  # type: ignore[arg-type]
            repeats=repeats[answered].tolist(),
            without_answer=int(repeats[unanswered].sum()),
            latest_earlier=self.latest_earlier,
            counts={
                "earlier_samples": self.read["earlier"],
                "earlier_ineligible": dict(sorted(self.ineligible.items())),
                "duplicates": self.read["duplicates"],
                "answers": len(origin),
                "scored_again": int((scored == _NOT_SCORED).sum()),
                "prompts_from_earlier_only": int(unknown[there].sum()),
            },
        )


def _digest(value: Any) -> bytes:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).digest()
