"""Which variants answer which prompt, and what becomes of the two answers: pure functions of rows and a seed."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from random import Random
from typing import Any

from llama2_chat.dialogue import Domain, Message, Preference, Prompt, Rating, Row, messages_to_rows


@dataclass(frozen=True, slots=True)
class Variant:
    """Who answers: a policy, by its place in the configuration, at a temperature."""

    policy: int
    temperature: float


@dataclass(frozen=True, slots=True)
class PlannedAnswer:
    """One answer that is to be sampled; `side` 0 is shown as answer a, 1 as answer b."""

    pair: int
    side: int
    prompt: Prompt
    variant: Variant


@dataclass(frozen=True, slots=True)
class AnswerPair:
    """Two complete, different answers (a, b) to one prompt.

    `id` is a function of prompt and answers, so that an annotation cannot be taken for another pair's.
    """

    id: str
    prompt: tuple[Message, ...]
    answers: tuple[str, str]
    variants: tuple[str, str]
    """Policy and temperature of each, as text."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """An annotator's choice: 0 prefers a, 1 prefers b; `safe` are the labels of (a, b) where there are any."""

    preferred: int
    rating: Rating | None = None
    safe: tuple[bool, bool] | None = None

    @property
    def prefers_unsafe(self) -> bool:
        """Whether the unsafe answer of a safe and an unsafe one was preferred; such pairs are dropped (§3.2.1)."""
        return self.safe is not None and not self.safe[self.preferred] and self.safe[1 - self.preferred]


def draw_prompts(prompts: Sequence[Prompt], count: int | None, rng: Random) -> list[Prompt]:
    """`count` prompts without replacement, in their order; all where there are no more or none is asked for."""
    if count is None or count >= len(prompts):
        return list(prompts)
    return [prompts[place] for place in sorted(rng.sample(range(len(prompts)), count))]


def plan_answers(
    prompts: Sequence[Prompt], policies: int, temperatures: Sequence[float], rng: Random
) -> list[PlannedAnswer]:
    """Two answers to each prompt from two different variants, drawn uniformly; policy by policy.

    The draw is ordered, and its order is the one in which the annotator sees the answers: neither side tells anything.
    """
    variants = [
        Variant(policy, temperature) for policy, temperature in product(range(policies), temperatures)
    ]
    planned = [
        PlannedAnswer(number, side, prompt, variant)
        for number, prompt in enumerate(prompts)
        for side, variant in enumerate(rng.sample(variants, 2))
    ]
    return sorted(planned, key=lambda answer: answer.variant.policy)


def variant_seed(seed: int, batch: str, variant: Variant) -> int:
    """The seed that a variant samples with.

    Each has its own: with the same random numbers two temperatures of one policy would often give one answer.
    """
    return zlib.crc32(f"{seed}/{batch}/{variant.policy}/{variant.temperature}".encode())


def pairs_of(rows: Iterable[Mapping[str, Any]]) -> tuple[list[AnswerPair], Counter[str]]:
    """The pairs that can be judged, from the rows of `samples.jsonl`, and how many are dropped for which reason."""
    by_number: dict[int, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        by_number.setdefault(row["pair"], {})[row["sample_index"]] = row
    pairs: dict[str, AnswerPair] = {}
    dropped: Counter[str] = Counter()
    for _, sides in sorted(by_number.items()):
        a, b = sides[0], sides[1]
        statuses = {a["status"], b["status"]} - {"complete"}
        if statuses:
            dropped["chat_tag" if "chat_tag" in statuses else "incomplete"] += 1
        elif a["response"] == b["response"]:
            dropped["identical"] += 1
        else:
            pair = _pair(a, b)
            dropped["seen_before"] += pair.id in pairs
            pairs.setdefault(pair.id, pair)
    return list(pairs.values()), +dropped


def _pair(a: Mapping[str, Any], b: Mapping[str, Any]) -> AnswerPair:
    prompt, answers = a["prompt"], (a["response"], b["response"])
    text = json.dumps([prompt, *answers], ensure_ascii=False, sort_keys=True)
    return AnswerPair(
        id=hashlib.sha256(text.encode()).hexdigest()[:16],
        prompt=tuple(Message(row["role"], row["content"]) for row in prompt),
        answers=answers,
        variants=tuple(f"{row['policy']} at {row['temperature']:g}" for row in (a, b)),  # type: ignore[arg-type]
    )


def to_preference(pair: AnswerPair, verdict: Verdict, domain: Domain, source: str) -> Preference:
    """A row of a preferences file: the preferred answer in `chosen`."""
    chosen, rejected = verdict.preferred, 1 - verdict.preferred
    return Preference(
        prompt=pair.prompt,
        chosen=pair.answers[chosen],
        rejected=pair.answers[rejected],
        rating=verdict.rating,
        chosen_safe=None if verdict.safe is None else verdict.safe[chosen],
        rejected_safe=None if verdict.safe is None else verdict.safe[rejected],
        domain=domain,
        source=source,
    )


def to_annotate(pair: AnswerPair) -> Row:
    """What a person is shown."""
    return {
        "id": pair.id,
        "prompt": messages_to_rows(pair.prompt),
        "answer_a": pair.answers[0],
        "answer_b": pair.answers[1],
    }
