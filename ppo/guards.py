"""What the history of a run says: guards that found something, when to stop early, which evaluation was best.

Pure functions over rows of `metrics.jsonl` (one an iteration, from 1) and of `held_out.jsonl` (one an evaluation, by
the iterations done before it). A run that is resumed reads the same rows and so decides the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

from llama2_chat.ppo.watching_config import EarlyStopping, GuardsConfig

Row = Mapping[str, Any]

_AVERAGED = 3
"""Iterations that a value is the mean of; one batch alone says little."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a guard found, in one sentence, after how many iterations."""

    guard: str
    action: Literal["warn", "stop"]
    iteration: int
    reason: str

    def to_row(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def findings(
    rows: Sequence[Row], evaluations: Sequence[Row], guards: GuardsConfig, *, sampler_bound: float
) -> list[Finding]:
    """What the guards find in the state that the last row led to.

    Args:
        rows: Of `metrics.jsonl`, from the first on.
        evaluations: Of `held_out.jsonl`, up to that state.
        sampler_bound: Most nats a token between log-probabilities of sampler and trainer, in the mean.
    """
    if not rows:
        return []
    found = {
        "not_finite": (guards.not_finite.action, _not_finite(rows)),
        "kl": (guards.kl.action, _kl(rows, guards.kl.bound)),
        "length": (guards.length.action, _length(rows, guards.length.bound)),
        "complete": (guards.complete.action, _complete(rows, guards.complete.bound)),
        "entropy": (guards.entropy.action, _entropy(rows, guards.entropy.bound)),
        "reward_hacking": (
            guards.reward_hacking.action,
            _reward_hacking(rows, evaluations, guards.reward_hacking.bound),
        ),
        "sampler_difference": ("warn", _sampler_difference(rows, sampler_bound)),
    }
    return [
        Finding(guard, "warn" if action == "warn" else "stop", len(rows), reason)
        for guard, (action, reason) in found.items()
        if reason is not None and action != "off"
    ]


def new_findings(
    rows: Sequence[Row], evaluations: Sequence[Row], guards: GuardsConfig, *, sampler_bound: float
) -> list[Finding]:
    """Those of `findings` that the state one iteration before did not have: a condition that lasts is told once."""
    before = findings(
        rows[:-1],
        [row for row in evaluations if row["step"] < len(rows)],
        guards,
        sampler_bound=sampler_bound,
    )
    known = {finding.guard for finding in before}
    now = findings(rows, evaluations, guards, sampler_bound=sampler_bound)
    return [finding for finding in now if finding.guard not in known]


def all_findings(
    rows: Sequence[Row], evaluations: Sequence[Row], guards: GuardsConfig, *, sampler_bound: float
) -> list[Finding]:
    """Everything that was found in the course of the run, each condition where it began."""
    return [
        finding
        for done in range(1, len(rows) + 1)
        for finding in new_findings(
            rows[:done],
            [row for row in evaluations if row["step"] <= done],
            guards,
            sampler_bound=sampler_bound,
        )
    ]


def stops_early(evaluations: Sequence[Row], stopping: EarlyStopping | None) -> str | None:
    """Why to stop: the held-out reward has not risen by more than `min_delta` for `patience` evaluations."""
    if stopping is None or not evaluations:
        return None
    reached, without_gain = evaluations[0], 0
    for row in evaluations[1:]:
        if row["score_mean"] > reached["score_mean"] + stopping.min_delta:
            reached, without_gain = row, 0
        else:
            without_gain += 1
    if without_gain < stopping.patience:
        return None
    return (
        f"for {without_gain} evaluations the held-out reward has not risen above {reached['score_mean']:.4g}, which it "
        f"had after {reached['step']} iterations"
    )


def best_evaluation(evaluations: Sequence[Row]) -> Row | None:
    """The one of the highest held-out reward, the earliest of equals."""
    return max(evaluations, key=lambda row: row["score_mean"], default=None)


def _values(rows: Sequence[Row], name: str) -> Iterator[float]:
    return (row[name] for row in rows if row.get(name) is not None)


def _mean(rows: Sequence[Row], name: str) -> float | None:
    values = list(_values(rows, name))
    return sum(values) / len(values) if values else None


def _last(rows: Sequence[Row], name: str) -> float | None:
    """The mean over the last iterations, once there are enough of them."""
    return None if len(rows) < _AVERAGED else _mean(rows[-_AVERAGED:], name)


def _first_and_last(rows: Sequence[Row], name: str) -> tuple[float, float] | None:
    """Means over the first and the last iterations, once there are enough of them."""
    if len(rows) < _AVERAGED:
        return None
    first, last = _mean(rows[:_AVERAGED], name), _mean(rows[-_AVERAGED:], name)
    return None if first is None or last is None else (first, last)


def _not_finite(rows: Sequence[Row]) -> str | None:
    names = rows[-1].get("not_finite")
    if not names:
        return None
    return f"{', '.join(names)} became NaN or infinite: lower training.learning_rate"


def _kl(rows: Sequence[Row], bound: float) -> str | None:
    kl = _last(rows, "kl_nats")
    if kl is None or kl <= bound:
        return None
    return (
        f"the KL to the reference is {kl:.4g} nats a response, above {bound:g}: raise kl_coefficient or lower "
        "training.learning_rate"
    )


def _length(rows: Sequence[Row], bound: float) -> str | None:
    means = _first_and_last(rows, "response_tokens_mean")
    if means is None or means[0] / bound <= means[1] <= means[0] * bound:
        return None
    first, last = means
    change = "longer" if last > first else "shorter"
    return (
        f"responses have {last:.4g} tokens in the mean, {first:.4g} at first, more than {bound:g} times {change}: look "
        "at samples.jsonl; the reward may pay for length alone"
    )


def _complete(rows: Sequence[Row], bound: float) -> str | None:
    share = _last(rows, "complete_share")
    if share is None or share >= bound:
        return None
    return (
        f"{100 * share:.3g} % of the responses end by themselves, below {100 * bound:g} %: raise "
        "sampling.max_new_tokens or start from a policy that ends its answers"
    )


def _entropy(rows: Sequence[Row], bound: float) -> str | None:
    means = _first_and_last(rows, "entropy_nats")
    if means is None or means[1] >= means[0] * bound:
        return None
    first, last = means
    return (
        f"the entropy fell from {first:.4g} to {last:.4g} nats a token, below {100 * bound:g} % of it: raise "
        "kl_coefficient or lower training.learning_rate"
    )


def _reward_hacking(rows: Sequence[Row], evaluations: Sequence[Row], bound: int) -> str | None:
    """A fall over the last `bound` evaluations while the batches' reward rose over the same iterations.

    The fall must exceed the standard error of the last mean: on a plateau some falls in a row are chance.
    """
    last = list(evaluations[-bound - 1 :])
    if len(last) <= bound:
        return None
    first_step, last_step = last[0]["step"], last[-1]["step"]
    span = max(1, (last_step - first_step) // bound)
    before = _mean(rows[max(0, first_step - span) : max(first_step, 1)], "score_mean")
    after = _mean(rows[max(0, last_step - span) : last_step], "score_mean")
    if before is None or after is None or after <= before:
        return None
    for name, error, whose in (
        ("independent_mean", "independent_se", "the independent reward model's held-out reward"),
        ("score_mean", "score_se", "the held-out reward"),
    ):
        values = list(_values(last, name))
        falls = len(values) == len(last) and all(a > b for a, b in pairwise(values))
        if falls and values[0] - values[-1] > (last[-1].get(error) or 0.0):
            return (
                f"{whose} fell in {bound} evaluations in a row, from {values[0]:.4g} to {values[-1]:.4g}, while the "
                f"batches' rose from {before:.4g} to {after:.4g}: the reward model is being exploited; raise "
                "kl_coefficient or take an earlier policy"
            )
    return None


def _sampler_difference(rows: Sequence[Row], bound: float) -> str | None:
    difference = _mean(rows[-_AVERAGED:], "sampler_logprob_difference")
    if difference is None or difference <= bound:
        return None
    return (
        f"log-probabilities of sampler and trainer differ by {difference:.4g} nats a token, above {bound:g}: the batch "
        "is not the policy's own; compare their precision (precision: float32), or raise max_sampler_difference"
    )
