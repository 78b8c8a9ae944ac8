"""A simulated annotator: turns two answers into a choice, its degree and safety labels, with known noise.

The difference of the two true scores, plus normal noise, decides which answer is preferred; its size is cut
into the four ratings. In the helpfulness domain the score is the oracle's helpfulness, in the safety domain
`oracle.safety_score`, which puts safety first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from llama2_chat.testbed.oracle import grade, safety_score

if TYPE_CHECKING:
    from llama2_chat.dialogue import Domain, Message, Rating

NOISE = 0.1
"""Standard deviation of the error on a score difference."""

CUTS = (0.1, 0.25, 0.5)
"""Where negligibly, slightly, (plainly) and significantly better part."""


@dataclass(frozen=True)
class Comparison:
    """The annotator's verdict on two answers, and the true difference it was based on."""

    preferred: Literal["a", "b"]
    rating: Rating
    safe_a: bool
    safe_b: bool
    true_difference: float

    @property
    def prefers_unsafe(self) -> bool:
        """Whether the unsafe answer of a safe and an unsafe one was preferred; such pairs are dropped."""
        return self.safe_a != self.safe_b and self.safe_a == (self.preferred == "b")


def true_score(messages: Sequence[Message | Mapping[str, str]], answer: str, domain: Domain) -> float:
    """What the annotator would go by if it made no errors."""
    result = grade(messages, answer)
    return result.helpfulness if domain == "helpfulness" else safety_score(result)


def compare(
    messages: Sequence[Message | Mapping[str, str]],
    answer_a: str,
    answer_b: str,
    *,
    domain: Domain,
    rng: Random,
    noise: float = NOISE,
    cuts: tuple[float, float, float] = CUTS,
) -> Comparison:
    """Have two answers to `messages` compared.

    `noise` is the standard deviation of the error on the difference of their scores; `cuts` part the ratings.
    """
    difference = true_score(messages, answer_a, domain) - true_score(messages, answer_b, domain)
    felt = difference + rng.gauss(0.0, noise)
    return Comparison(
        preferred="a" if felt > 0 else "b",
        rating=rating_of(abs(felt), cuts),
        safe_a=grade(messages, answer_a).safe,
        safe_b=grade(messages, answer_b).safe,
        true_difference=difference,
    )


def rating_of(difference: float, cuts: tuple[float, float, float] = CUTS) -> Rating:
    """The rating that a (non-negative) difference is given."""
    if difference < cuts[0]:
        return "negligibly_better"
    if difference < cuts[1]:
        return "slightly_better"
    return "better" if difference < cuts[2] else "significantly_better"


def attainable_accuracy(rows: Iterable[Mapping[str, Any]], *, domain: Domain | None = None) -> dict[str, Any]:
    """How often the true score agrees with the annotator: what no reward model can be expected to exceed.

    `rows` are preferences as they stand in a file; `domain` overrides theirs. Ties of the true score count
    half. Returns `{"overall": {"accuracy", "count"}, "by_rating": {rating: {"accuracy", "count"}}}`.
    """
    agreements: dict[str, list[float]] = {}
    for row in rows:
        used: Domain = domain or row.get("domain") or "helpfulness"
        chosen = true_score(row["prompt"], row["chosen"][0]["content"], used)
        rejected = true_score(row["prompt"], row["rejected"][0]["content"], used)
        agreement = 0.5 if chosen == rejected else float(chosen > rejected)
        agreements.setdefault(row.get("rating") or "unrated", []).append(agreement)
    return {
        "overall": _share([value for values in agreements.values() for value in values]),
        "by_rating": {rating: _share(values) for rating, values in sorted(agreements.items())},
    }


def _share(agreements: list[float]) -> dict[str, Any]:
    accuracy = sum(agreements) / len(agreements) if agreements else None
    return {"accuracy": accuracy, "count": len(agreements)}
