"""Log-probabilities of given responses under a model. B sequences, S tokens, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

_TOKEN_BUDGET = 16384
_LOGIT_BUDGET = 2**26
"""Logits of one forward pass: 256 MiB in float32, and as much again for their softmax."""
_ROWS = 128
"""Rows of logits that are read while they are still in the processor's caches."""


def token_logprobs(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """log softmax(logits)[target] in float32, shape (B, S)."""
    return torch.log_softmax(logits_BSV.float(), -1).gather(-1, targets_BS.unsqueeze(-1)).squeeze(-1)


def head_logprobs(states_NH: Tensor, weight_VH: Tensor, targets_N: Tensor) -> Tensor:
    """log softmax(states · weightᵀ)[target] in float32, shape (N,), with at most one (N, V) tensor at any time.

    Without gradients not even that: logits are made and read a few rows at a time. With gradients they are kept, in
    the dtype in which they were computed, and turned into their own gradient in place.
    """
    if torch.is_autocast_enabled(states_NH.device.type):
        dtype = torch.get_autocast_dtype(states_NH.device.type)
        states_NH, weight_VH = states_NH.to(dtype), weight_VH.to(dtype)
    logprobs: Tensor = _HeadLogprobs.apply(states_NH, weight_VH, targets_N)  # type: ignore[no-untyped-call]
    return logprobs


class _HeadLogprobs(torch.autograd.Function):
    """The head's product and the softmax over it as one step, row by row."""

    @staticmethod
    def forward(ctx: Any, states_NH: Tensor, weight_VH: Tensor, targets_N: Tensor) -> Tensor:
        kept = any(ctx.needs_input_grad)
        logits_NV = states_NH.new_empty((len(states_NH), len(weight_VH))) if kept else None
        normaliser_N = states_NH.new_empty(len(states_NH), dtype=torch.float32)
        logprobs_N = torch.empty_like(normaliser_N)
        transposed_HV = weight_VH.t()
        for start in range(0, len(states_NH), _ROWS):
            part = slice(start, start + _ROWS)
            out = logits_NV[part] if logits_NV is not None else None
            logits = torch.mm(states_NH[part], transposed_HV, out=out)
            normaliser_N[part] = logits.float().logsumexp(-1)
            chosen = logits.gather(-1, targets_N[part, None]).squeeze(-1).float()
            logprobs_N[part] = chosen - normaliser_N[part]
        if kept:
            ctx.save_for_backward(states_NH, weight_VH, targets_N, logits_NV, normaliser_N)
        return logprobs_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """d logprob / d logits = one at the target − softmax; then the product's two gradients."""
        (gradient_N,) = gradients
        states_NH, weight_VH, targets_N, logits_NV, normaliser_N = ctx.saved_tensors
        for_states, for_weight, _ = ctx.needs_input_grad
        states_gradient = torch.empty_like(states_NH) if for_states else None
        for start in range(0, len(states_NH), _ROWS):
            part = slice(start, start + _ROWS)
            scale = -gradient_N[part, None]
            logits = logits_NV[part]
            share = (logits.float() - normaliser_N[part, None]).exp_().mul_(scale)
            share.scatter_add_(-1, targets_N[part, None], -scale)
            logits.copy_(share)
            if states_gradient is not None:
                torch.mm(logits, weight_VH, out=states_gradient[part])
        weight_gradient = torch.mm(logits_NV.t(), states_NH) if for_weight else None
        return states_gradient, weight_gradient, None


@torch.no_grad()
def response_logprobs(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    padding_id: int,
) -> list[list[float]]:
    """Natural-log probability of each response token after its prompt and the response's earlier tokens.

    Equal pairs are computed once. Rows of similar length share a forward pass, padded on the right, where causal
    attention never sees it; logits are computed only from the shortest prompt's end on.
    """
    model.train(False)
    pairs = [(tuple(p), tuple(r)) for p, r in zip(prompts, responses, strict=True)]
    distinct = list(dict.fromkeys(pairs))
    computed = dict(zip(distinct, _distinct_logprobs(model, distinct, padding_id), strict=True))
    return [list(computed[pair]) for pair in pairs]


def _distinct_logprobs(
    model: PreTrainedModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], padding_id: int
) -> list[list[float]]:
    prompts, responses = [prompt for prompt, _ in pairs], [response for _, response in pairs]
    results: list[list[float]] = [[] for _ in prompts]
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    order = sorted((i for i in range(len(prompts)) if responses[i]), key=lambda i: (lengths[i], i))
    logit_rows = _LOGIT_BUDGET // model.config.get_text_config().vocab_size
    while order:
        batch = _next_batch(order, lengths, [len(prompt) for prompt in prompts], logit_rows)
        longest = lengths[batch[0]]
        ids = torch.tensor(
            [[*prompts[i], *responses[i]] + [padding_id] * (longest - lengths[i]) for i in batch],
            device=model.device,
        )
        first = min(len(prompts[i]) for i in batch) - 1
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=longest - first).logits
        values = token_logprobs(logits[:, :-1], ids[:, first + 1 :]).cpu()
        for row, i in enumerate(batch):
            start = len(prompts[i]) - 1 - first
            results[i] = values[row, start : start + len(responses[i])].tolist()
    return results


def _next_batch(
    order: list[int], lengths: list[int], prompt_lengths: list[int], logit_rows: int
) -> list[int]:
    """Take rows off the end of `order`, longest first, while tokens and logits stay within their budgets."""
    batch = [order.pop()]
    longest, shortest_prompt = lengths[batch[0]], prompt_lengths[batch[0]]
    while order:
        shortest_prompt = min(shortest_prompt, prompt_lengths[order[-1]])
        rows = len(batch) + 1
        if rows * longest > _TOKEN_BUDGET or rows * (longest - shortest_prompt + 1) > logit_rows:
            break
        batch.append(order.pop())
    return batch
