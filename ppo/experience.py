"""From sampled and scored responses to what the gradient steps take as given.

B responses of an iteration, T tokens of the longest; a mask is True at response tokens.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llama2_chat import distributed
from llama2_chat.lora import adapter_disabled, plain_model
from llama2_chat.masked_stats import whiten
from llama2_chat.ppo.advantages import generalized_advantages
from llama2_chat.ppo.config import PpoConfig, PpoTraining
from llama2_chat.ppo.response_tokens import (
    ResponseTokens,
    logprobs_and_values,
    pack_responses,
    policy_logprobs,
    to_grid,
)
from llama2_chat.ppo.rewards import token_rewards
from llama2_chat.ppo.sharing import share_out
from llama2_chat.reward.pooling import SEPARATE, RowLayout, row_layout


@dataclass(frozen=True, slots=True)
class Models:
    """What PPO trains (policy and value model) and what it only asks (reference).

    The reference may be the policy itself where that is an adapted model: then it is the base under the disabled
    adapter. The value model may be a head on the policy's trunk (`response_tokens.shares_trunk`).
    """

    policy: PreTrainedModel
    value: PreTrainedModel
    reference: PreTrainedModel

    def layout(self) -> RowLayout:
        """How rows are laid out that all three read."""
        layouts = [row_layout(plain_model(model)) for model in (self.policy, self.value, self.reference)]
        return RowLayout(share=False, one_row=all(layout.one_row for layout in layouts))

    @contextmanager
    def as_reference(self) -> Iterator[PreTrainedModel]:
        """The reference, fit to be asked; nothing may be trained meanwhile."""
        with adapter_disabled(self.policy) if self.reference is self.policy else nullcontext():
            yield self.reference


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Responses that share a forward pass: their places among the B and their packed tokens."""

    members: Tensor
    tokens: ResponseTokens
    fills: bool = False
    """Computed only because another process has one more, and processes that share weights compute together."""


MiniBatch = list[MicroBatch]
"""This process's responses of one gradient step, in the pieces that fit into memory."""


@dataclass(frozen=True, slots=True)
class Experience:
    """(B, T) each, on the models' device, as the models were before the first step on the batch."""

    mask: Tensor
    logprobs: Tensor
    reference_logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


def split_into_mini_batches(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    training: PpoTraining,
    *,
    shuffled_by: str,
    padding_id: int,
    device: torch.device,
    processes: int = 1,
    process: int = 0,
    layout: RowLayout = SEPARATE,
) -> list[MiniBatch]:
    """A random partition of the batch; in a mini-batch, responses of similar length share a micro-batch.

    Args:
        shuffled_by: What the partition is a function of.
        processes: That share each mini-batch; all get as many micro-batches, of `micro_batch_size` each.
        process: The number of the one whose share is returned.
        layout: See `pack_responses`.
    """
    order = list(range(len(prompts)))
    random.Random(shuffled_by).shuffle(order)
    size, micro_size = training.mini_batch_size, training.micro_batch_size or training.mini_batch_size

    def length(i: int) -> int:
        return len(prompts[i]) + len(responses[i])

    def micro_batch(members: list[int], fills: bool = False) -> MicroBatch:
        tokens = pack_responses(
            [prompts[i] for i in members],
            [responses[i] for i in members],
            padding_id=padding_id,
            device=device,
            layout=layout,
        )
        return MicroBatch(torch.tensor(members, device=device), tokens, fills)

    mini_batches = []
    for start in range(0, len(order), size):
        drawn = sorted(order[start : start + size], key=lambda i: (length(i), i))
        shares = share_out([length(i) for i in drawn], processes)
        members = [drawn[place] for place in shares[process]]
        parts = [
            micro_batch(members[first : first + micro_size]) for first in range(0, len(members), micro_size)
        ]
        most = math.ceil(max(map(len, shares)) / micro_size)
        parts += [micro_batch(drawn[:1], fills=True) for _ in range(len(parts), most)]
        mini_batches.append(parts)
    return mini_batches


@torch.no_grad()
def gather_experience(
    models: Models,
    mini_batches: Sequence[MiniBatch],
    mask: Tensor,
    scores: Tensor,
    config: PpoConfig,
    autocast: torch.dtype | None,
    *,
    kl_coefficient: float,
) -> Experience:
    """Log-probabilities and values before any step, and what follows from them and the scores.

    Computed in the mini-batches of the first epoch: the same arithmetic on the same rows, so that the first
    step's ratios are 1 to the last bit.

    Args:
        mask: bool (B, T).
        scores: (B,) R̃_c.
        kl_coefficient: β of this iteration.

    Returns:
        Of the whole batch, in every process, whichever computed a response.
    """
    device = mask.device
    logprobs, reference_logprobs, values = (torch.zeros(mask.shape, device=device) for _ in range(3))
    micro_batches = [part for mini_batch in mini_batches for part in mini_batch]
    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        for part in micro_batches:
            found = logprobs_and_values(models.policy, models.value, part.tokens)
            _place(part, mask, zip((logprobs, values), found, strict=True))
        with models.as_reference() as reference:
            for part in micro_batches:
                said = distributed.run_as_forward(reference, policy_logprobs, part.tokens)
                _place(part, mask, [(reference_logprobs, said)])
    for model in (models.policy, models.reference, models.value):
        distributed.release(model)
    distributed.add_up(logprobs, reference_logprobs, values)  # 0 where another process computed
    rewards = token_rewards(
        logprobs, reference_logprobs, scores, response_mask=mask, kl_coefficient=kl_coefficient
    )
    advantages, returns = generalized_advantages(
        rewards, values, response_mask=mask, discount=config.discount, gae_lambda=config.gae_lambda
    )
    if config.whiten_advantages:
        advantages = whiten(advantages, mask)
    return Experience(mask, logprobs, reference_logprobs, values, advantages, returns)


def _place(part: MicroBatch, mask_BT: Tensor, found: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Put what was found at a micro-batch's response tokens into grids of the whole batch."""
    if not part.fills:
        for grid_BT, found_N in found:
            grid_BT[part.members] = to_grid(found_N, mask_BT[part.members])
