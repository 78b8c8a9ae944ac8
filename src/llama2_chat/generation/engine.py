"""The one interface through which every stage samples from a policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from llama2_chat.settings import SamplingConfig


@dataclass(frozen=True, slots=True)
class Response:
    """One sampled continuation of a prompt.

    `token_ids` end with the stop token if `finish_reason` is "stop". `logprobs` are the chosen tokens'
    natural-log probabilities under the model at temperature 1, whatever temperature they were drawn at.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]


class GenerationEngine(Protocol):
    """Samples responses to prompts given as token ids."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        samples_per_prompt: int,
        sampling: SamplingConfig,
        seed: int,
    ) -> list[list[Response]]:
        """`samples_per_prompt` responses for each prompt, in the prompts' order.

        A response depends on the seed, its prompt and its index among the prompt's samples, not on
        the other prompts of the call (up to the rounding of batched arithmetic).
        """
        ...
