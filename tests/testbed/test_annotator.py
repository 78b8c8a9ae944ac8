"""The simulated annotator against the normal distribution, worked out from the error function."""

from __future__ import annotations

import math
from collections import Counter
from random import Random

import pytest

from llama2_chat.testbed.annotator import attainable_accuracy, compare, rating_of
from llama2_chat.testbed.generators import AnnotationCounts, preferences

PROMPT = [{"role": "user", "content": "What is 27 plus 8?"}]
GOOD, PLAIN, WRONG = "Sure! 27 plus 8 is 35.", "27 plus 8 is 35.", "27 plus 8 is 36."
CRIME = [{"role": "user", "content": "How do I steal a car at night?"}]
REFUSAL, CURT = "I am sorry, but I cannot help with that.", "No."
COMPLIANCE = "To steal a car at night, take it while nobody is looking."


def below(x: float, mean: float, deviation: float) -> float:
    """Normal distribution function."""
    return 0.5 * (1 + math.erf((x - mean) / (deviation * math.sqrt(2))))


@pytest.mark.parametrize(
    ("difference", "rating"),
    [
        (0.0, "negligibly_better"),
        (0.0999, "negligibly_better"),
        (0.1, "slightly_better"),
        (0.2499, "slightly_better"),
        (0.25, "better"),
        (0.4999, "better"),
        (0.5, "significantly_better"),
        (2.0, "significantly_better"),
    ],
)
def test_ratings_part_at_the_cuts(difference: float, rating: str) -> None:
    assert rating_of(difference) == rating


def test_without_noise_the_truth_decides() -> None:
    verdict = compare(PROMPT, PLAIN, GOOD, domain="helpfulness", rng=Random(0), noise=0.0)
    assert (verdict.preferred, verdict.rating, verdict.true_difference) == ("b", "better", -0.25)
    unsafe = compare(CRIME, COMPLIANCE, CURT, domain="safety", rng=Random(0), noise=0.0)
    # safe and 0.3 helpful: 0.5 + 0.15; wholly harmful: 0
    assert (unsafe.preferred, unsafe.rating) == ("b", "significantly_better")
    assert unsafe.true_difference == pytest.approx(-0.65)
    assert (unsafe.safe_a, unsafe.safe_b, unsafe.prefers_unsafe) == (False, True, False)


def test_noise_is_normal_with_the_given_deviation() -> None:
    """True difference 0.25, noise 0.1: choices and ratings as the normal distribution says."""
    rng, draws = Random(1), 20000
    verdicts = [compare(PROMPT, GOOD, PLAIN, domain="helpfulness", rng=rng) for _ in range(draws)]
    ratings = Counter(verdict.rating for verdict in verdicts)

    def share(low: float, high: float) -> float:
        upper = below(high, 0.25, 0.1) - below(low, 0.25, 0.1)
        return upper + below(-low, 0.25, 0.1) - below(-high, 0.25, 0.1)

    expected = {
        "negligibly_better": share(0.0, 0.1),
        "slightly_better": share(0.1, 0.25),
        "better": share(0.25, 0.5),
        "significantly_better": share(0.5, 100.0),
    }
    assert sum(expected.values()) == pytest.approx(1.0, abs=1e-12)
    for rating, probability in expected.items():
        spread = 4 * math.sqrt(probability * (1 - probability) / draws)
        assert ratings[rating] / draws == pytest.approx(probability, abs=spread)
    wrong_choice = below(0.0, 0.25, 0.1)
    flipped = sum(verdict.preferred == "b" for verdict in verdicts) / draws
    assert flipped == pytest.approx(wrong_choice, abs=4 * math.sqrt(wrong_choice / draws))


def test_attainable_accuracy_is_the_chance_that_noise_does_not_turn_a_choice() -> None:
    """Pairs with one true difference d: the truth agrees with the annotator in a share Phi(d / 0.1)."""
    rows, rng = [], Random(2)
    for _ in range(8000):
        verdict = compare(PROMPT, PLAIN, WRONG, domain="helpfulness", rng=rng, noise=0.3)
        chosen, rejected = (PLAIN, WRONG) if verdict.preferred == "a" else (WRONG, PLAIN)
        rows.append(
            {
                "prompt": PROMPT,
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
                "rating": verdict.rating,
                "domain": "helpfulness",
            }
        )
    result = attainable_accuracy(rows)
    expected = below(0.2625, 0.0, 0.3)  # 0.75 - 0.4875
    assert result["overall"]["count"] == 8000
    assert result["overall"]["accuracy"] == pytest.approx(expected, abs=0.02)
    assert sum(entry["count"] for entry in result["by_rating"].values()) == 8000
    shares = [result["by_rating"][r]["accuracy"] for r in ("negligibly_better", "slightly_better", "better")]
    assert shares == sorted(shares)


def test_attainable_accuracy_by_hand() -> None:
    def row(chosen: str, rejected: str, rating: str | None) -> dict[str, object]:
        answers = {"chosen": chosen, "rejected": rejected}
        sides = {side: [{"role": "assistant", "content": text}] for side, text in answers.items()}
        return {"prompt": PROMPT, **sides, **({"rating": rating} if rating else {})}

    rows = [
        row(GOOD, PLAIN, "better"),
        row(PLAIN, GOOD, "better"),
        row(PLAIN, PLAIN, "negligibly_better"),
        row(GOOD, WRONG, None),
    ]
    assert attainable_accuracy(rows) == {
        "overall": {"accuracy": 0.625, "count": 4},  # (1 + 0 + 1/2 + 1) / 4
        "by_rating": {
            "better": {"accuracy": 0.5, "count": 2},
            "negligibly_better": {"accuracy": 0.5, "count": 1},
            "unrated": {"accuracy": 1.0, "count": 1},
        },
    }
    assert attainable_accuracy([]) == {"overall": {"accuracy": None, "count": 0}, "by_rating": {}}


@pytest.mark.parametrize("domain", ["helpfulness", "safety"])
def test_every_rating_is_well_represented(domain: str) -> None:
    rows = list(preferences(rows=2500, seed=3, domain=domain))
    shares = {rating: count / len(rows) for rating, count in Counter(row["rating"] for row in rows).items()}
    assert set(shares) == {"negligibly_better", "slightly_better", "better", "significantly_better"}
    assert min(shares.values()) > 0.08
    assert shares["negligibly_better"] < 0.25
    attainable = attainable_accuracy(rows)
    assert 0.88 < attainable["overall"]["accuracy"] < 0.98
    assert attainable["by_rating"]["negligibly_better"]["accuracy"] < 0.8
    assert attainable["by_rating"]["significantly_better"]["accuracy"] > 0.99


def test_safety_pairs_that_prefer_the_unsafe_answer_are_dropped_and_counted() -> None:
    counts = AnnotationCounts()
    rows = list(preferences(rows=1500, seed=4, domain="safety", noise=0.6, counts=counts))
    assert counts.kept == len(rows) == 1500
    assert counts.prefers_unsafe > 50
    labels = Counter((row["chosen_safe"], row["rejected_safe"]) for row in rows)
    assert labels[False, True] == 0
    assert min(labels[True, False], labels[True, True], labels[False, False]) > 20
