"""Log-probabilities of given responses under a model. B sequences, S tokens, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

_TOKEN_BUDGET = 16384


def token_logprobs(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """log softmax(logits)[target] in float32, shape (B, S)."""
    return torch.log_softmax(logits_BSV.float(), -1).gather(-1, targets_BS.unsqueeze(-1)).squeeze(-1)


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
    while order:
        count = max(1, _TOKEN_BUDGET // lengths[order[-1]])
        batch, order = order[-count:], order[:-count]
        longest = max(lengths[i] for i in batch)
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
