"""Drawing the next token. B rows, N draws a row, V vocabulary.

Every draw brings its own uniform random number, so that a sample depends on its seed and not on the rows that happen
to share its batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_BLOCK = 128
"""Tokens whose probabilities are summed as one before the block that holds the drawn token is looked into."""

_NUCLEUS = 512
"""Most probable tokens that are sorted; all are where these do not reach `top_p`."""


def uniforms_for_prompt(seed: int, prompt: Sequence[int], samples: int, length: int) -> Tensor:
    """Uniform numbers in [0, 1), float64 (samples, length), a function of seed and prompt.

    Row k is the same for any number of samples above k.
    """
    key = hashlib.sha256(f"{seed}:{','.join(map(str, prompt))}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))
    return torch.from_numpy(generator.random((samples, length)))


def draw(
    logits_BV: Tensor, uniforms_BN: Tensor, *, temperature: float, top_p: float
) -> tuple[Tensor, Tensor]:
    """Next tokens of each row, by inverting the cumulative distribution at the row's uniform numbers.

    Args:
        logits_BV: Unscaled logits.
        uniforms_BN: In [0, 1).
        temperature: 0 takes the most probable token.
        top_p: 1 keeps the whole distribution, less its nucleus: the smallest set of most probable tokens whose sum
            reaches it (Holtzman et al. 2020, arXiv 1904.09751, §3.1).

    Returns:
        Tokens, int64 (B, N), and their natural-log probabilities at temperature 1, float32 (B, N).
    """
    shifted_BV = logits_BV.float()
    shifted_BV = shifted_BV - shifted_BV.amax(-1, keepdim=True)
    weights_BV = (shifted_BV / temperature if temperature not in (0, 1) else shifted_BV).exp()
    sums_BC = _block_sums(weights_BV)
    if temperature in (0, 1):
        normaliser_B1 = sums_BC.sum(-1, keepdim=True).log()
    else:
        normaliser_B1 = _block_sums(shifted_BV.exp()).sum(-1, keepdim=True).log()
    if temperature == 0:
        tokens_BN = logits_BV.argmax(-1, keepdim=True).expand(uniforms_BN.shape)
    elif top_p < 1:
        total_B1 = sums_BC.sum(-1, keepdim=True)
        tokens_BN = _drawn_from_nucleus(weights_BV, total_B1, uniforms_BN, top_p, sorted_tokens=_NUCLEUS)
    else:
        tokens_BN = _drawn(weights_BV, sums_BC, uniforms_BN)
    return tokens_BN, (shifted_BV.gather(-1, tokens_BN) - normaliser_B1).float()


def _block_sums(weights_BV: Tensor) -> Tensor:
    """Sums of blocks of tokens, float64 (B, C); the last block may be shorter."""
    rows, size = weights_BV.shape
    whole = size - size % _BLOCK
    sums = weights_BV[:, :whole].reshape(rows, -1, _BLOCK).sum(-1).double()
    if whole == size:
        return sums
    return torch.cat([sums, weights_BV[:, whole:].sum(-1, keepdim=True).double()], dim=1)


def _drawn(weights_BV: Tensor, sums_BC: Tensor, uniforms_BN: Tensor) -> Tensor:
    """Tokens (B, N) at `uniforms` of the sum of unnormalised probabilities: the block first, then within it."""
    size = weights_BV.shape[-1]
    ends_BC = sums_BC.cumsum(-1)
    targets_BN = uniforms_BN.to(ends_BC) * ends_BC[:, -1:]
    blocks_BN = torch.searchsorted(ends_BC, targets_BN, right=True)
    blocks_BN = blocks_BN.clamp(max=_last_block(sums_BC))
    rest_BN1 = (targets_BN - (ends_BC - sums_BC).gather(-1, blocks_BN)).unsqueeze(-1)
    places_BNb = blocks_BN.unsqueeze(-1) * _BLOCK + torch.arange(_BLOCK, device=weights_BV.device)
    rows = torch.arange(len(weights_BV), device=weights_BV.device)[:, None, None]
    inside_BNb = weights_BV[rows, places_BNb.clamp(max=size - 1)].double()
    inside_BNb = torch.where(places_BNb < size, inside_BNb, 0.0)
    ends_BNb = inside_BNb.cumsum(-1)
    within_BN = torch.searchsorted(ends_BNb, rest_BN1, right=True).squeeze(-1)
    # Rounding may put the target beyond the block's last token: what is drawn then is its last possible one.
    last_BN = _BLOCK - 1 - (inside_BNb > 0).flip(-1).int().argmax(-1)
    return blocks_BN * _BLOCK + torch.minimum(within_BN, last_BN)


def _last_block(sums_BC: Tensor) -> Tensor:
    """The last block of each row that holds any probability, (B, 1)."""
    return sums_BC.shape[-1] - 1 - (sums_BC > 0).flip(-1).int().argmax(-1, keepdim=True)


def _drawn_from_nucleus(
    weights_BV: Tensor, total_B1: Tensor, uniforms_BN: Tensor, top_p: float, *, sorted_tokens: int
) -> Tensor:
    """Tokens (B, N) at `uniforms` of the nucleus' sum, the most probable first."""
    size = weights_BV.shape[-1]
    top, order = weights_BV.topk(min(sorted_tokens, size), dim=-1)
    ends = top.double().cumsum(-1)
    kept = (ends - top < top_p * total_B1).sum(-1, keepdim=True)
    targets_BN = uniforms_BN.to(ends) * ends.gather(-1, kept - 1)
    places_BN = torch.searchsorted(ends, targets_BN, right=True)
    tokens_BN = order.gather(-1, torch.minimum(places_BN, kept - 1))
    beyond_B = (ends[:, -1:] < top_p * total_B1).squeeze(1)
    if sorted_tokens < size and bool(beyond_B.any()):
        tokens_BN[beyond_B] = _drawn_from_nucleus(
            weights_BV[beyond_B], total_B1[beyond_B], uniforms_BN[beyond_B], top_p, sorted_tokens=size
        )
    return tokens_BN
