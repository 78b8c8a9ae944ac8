"""What a model says at the response tokens of a batch: log-probabilities and values, and nothing elsewhere.

Prompt and response of several samples share a row without padding (see `llama2_chat.reward.pooling`), and
heads are computed only where a response token is predicted. R rows of S tokens, N response tokens of all
samples together, in the order sample by sample, token by token; V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llama2_chat import distributed
from llama2_chat.logprobs import head_logprobs, token_logprobs
from llama2_chat.lora import plain_model
from llama2_chat.reward.pooling import SEPARATE, RowLayout, last_layer_at, pack_dialogues, row_layout


@dataclass(frozen=True, slots=True)
class ResponseTokens:
    """Samples packed into rows, with the places from which each response token is predicted: all int64.

    `input_ids` and `position_ids` (R, S). Response token n is `targets[n]`; the state before it, from which the
    policy draws it and the value model judges it, is token `columns[n]` of row `rows[n]`.
    """

    input_ids: Tensor
    position_ids: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor


def pack_responses(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    padding_id: int,
    device: torch.device,
    layout: RowLayout = SEPARATE,
) -> ResponseTokens:
    """Pack each prompt with its response; both hold at least one token.

    Args:
        layout: What all models that read the rows can take; nothing is shared, each prompt has one response.
    """
    packed = pack_dialogues(
        [[*p, *r] for p, r in zip(prompts, responses, strict=True)],
        padding_id,
        RowLayout(share=False, one_row=layout.one_row),
    )
    lengths_B = torch.tensor([len(response) for response in responses])
    rows_N = packed.rows.repeat_interleave(lengths_B)
    columns_N = torch.cat(
        [torch.arange(end - len(r), end) for end, r in zip(packed.ends.tolist(), responses, strict=True)]
    )
    tensors = (
        packed.input_ids,
        packed.position_ids,
        rows_N,
        columns_N,
        packed.input_ids[rows_N, columns_N + 1],
    )
    return ResponseTokens(*(tensor.to(device) for tensor in tensors))


def response_mask(responses: Sequence[Sequence[int]]) -> Tensor:
    """bool (B, T), True at the tokens of each response; T is the longest's length."""
    lengths_B1 = torch.tensor([[len(response)] for response in responses])
    return torch.arange(int(lengths_B1.max())) < lengths_B1


def to_grid(values_N: Tensor, mask_BT: Tensor) -> Tensor:
    """Values of the N True positions as (B, T), 0 elsewhere; gradients flow through."""
    return torch.zeros(mask_BT.shape, dtype=values_N.dtype, device=values_N.device).masked_scatter(
        mask_BT, values_N
    )


def policy_logprobs(policy: PreTrainedModel, tokens: ResponseTokens) -> Tensor:
    """Natural-log probability of each response token at temperature 1, float32 (N,)."""
    return _logprobs_of(policy, _states(policy, tokens), tokens)


def token_values(value_model: PreTrainedModel, tokens: ResponseTokens) -> Tensor:
    """The value of the state before each response token, float32 (N,)."""
    return _values_of(value_model, _states(value_model, tokens))


def logprobs_and_values(
    policy: PreTrainedModel, value_model: PreTrainedModel, tokens: ResponseTokens
) -> tuple[Tensor, Tensor]:
    """What `policy_logprobs` and `token_values` say; a trunk that is both models' is computed once."""
    if shares_trunk(policy, value_model):
        states = _states(policy, tokens)
        return _logprobs_of(policy, states, tokens), _values_of(value_model, states)
    return (
        distributed.run_as_forward(policy, policy_logprobs, tokens),
        distributed.run_as_forward(value_model, token_values, tokens),
    )


def shares_trunk(policy: PreTrainedModel, value_model: PreTrainedModel) -> bool:
    """Whether the value model is a head on the policy's own trunk."""
    return plain_model(policy).base_model is plain_model(value_model).base_model


def _logprobs_of(policy: PreTrainedModel, states_NH: Tensor, tokens: ResponseTokens) -> Tensor:
    head: nn.Module = plain_model(policy).get_output_embeddings()  # type: ignore[no-untyped-call]
    if isinstance(head, nn.Linear) and head.bias is None:
        return head_logprobs(states_NH, head.weight, tokens.targets)
    return token_logprobs(head(states_NH), tokens.targets)


def _values_of(value_model: PreTrainedModel, states_NH: Tensor) -> Tensor:
    head: nn.Module = plain_model(value_model).score  # type: ignore[assignment]
    values_N: Tensor = head(states_NH).squeeze(-1).float()
    return values_N


def _states(model: PreTrainedModel, tokens: ResponseTokens) -> Tensor:
    """Last hidden state before each response token, (N, H).

    The last layer's feed-forward network is computed there alone. Not so where activations are computed a second
    time, which happens out of its reach; then never, so that all passes do the same arithmetic.
    """
    plain: Any = plain_model(model)
    alone = row_layout(plain).share and not plain.is_activation_checkpointing
    where = (tokens.input_ids.shape, tokens.rows, tokens.columns)
    with last_layer_at(plain, *where) if alone else nullcontext():
        hidden_RSH: Tensor = plain.base_model(
            input_ids=tokens.input_ids, position_ids=tokens.position_ids, use_cache=False
        ).last_hidden_state
    return hidden_RSH[tokens.rows, tokens.columns]
