"""How PPO is watched: guards over its metrics, and when to stop early. Nothing here changes what is learned."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from llama2_chat.settings import StrictModel


def _off(value: Any) -> Any:
    """YAML 1.1 reads a bare `off` as false."""
    return "off" if value is False else value


Off = Annotated[Literal["off"], BeforeValidator(_off)]
Action = Annotated[Literal["warn", "stop", "off"], BeforeValidator(_off)]
"""warn: a line on the console, an event, a place in the report. stop: the same, and the stage ends with its best
policy."""


class KlGuard(StrictModel):
    """The policy has left its reference far behind: a reward model is then asked about what it has never seen."""

    action: Action = "warn"
    bound: float = Field(50.0, gt=0.0, description="Nats a response")


class LengthGuard(StrictModel):
    """Responses have become much longer or shorter than they were."""

    action: Action = "warn"
    bound: float = Field(
        3.0, gt=1.0, description="So many times as long, or as short, as in the first iterations"
    )


class CompleteGuard(StrictModel):
    """Few responses end by themselves, so that most rewards say nothing of an answer."""

    action: Action = "warn"
    bound: float = Field(0.5, ge=0.0, le=1.0, description="Least share of complete responses")


class EntropyGuard(StrictModel):
    """The policy says nearly always the same, and can find nothing new."""

    action: Action = "warn"
    bound: float = Field(
        0.2, ge=0.0, lt=1.0, description="Least share of the entropy of the first iterations"
    )


class RewardHackingGuard(StrictModel):
    """The reward that is optimised rises while the held-out reward, or that of `independent`, falls."""

    action: Action = "warn"
    bound: int = Field(3, ge=1, description="Evaluations in a row that it falls")


class NotFiniteGuard(StrictModel):
    """A loss, a gradient or a metric is NaN or infinite; training cannot go on."""

    action: Literal["stop", "error"] = Field(
        "stop", description="End with the best policy so far, or with an error and without a model"
    )


class GuardsConfig(StrictModel):
    """What is looked for after each iteration. Values are means over the last three iterations."""

    kl: KlGuard = KlGuard()
    length: LengthGuard = LengthGuard()
    complete: CompleteGuard = CompleteGuard()
    entropy: EntropyGuard = EntropyGuard()
    reward_hacking: RewardHackingGuard = RewardHackingGuard()
    not_finite: NotFiniteGuard = NotFiniteGuard()


class EarlyStopping(StrictModel):
    """Stop when the held-out reward has not risen for some evaluations (§3.2.3 stops early on held-out prompts)."""

    patience: int = Field(5, ge=1, description="Evaluations in a row without a gain")
    min_delta: float = Field(0.0, ge=0.0, description="What counts as a gain, in raw R_c (logits)")


def _written_as(value: Any) -> str:
    """Which of the two a value is meant to be, so that only that one's problems are reported."""
    return "a mapping" if isinstance(value, EarlyStopping | dict) else "off"


Stopping = Annotated[
    Annotated[EarlyStopping, Tag("a mapping")] | Annotated[Off, Tag("off")], Discriminator(_written_as)
]
