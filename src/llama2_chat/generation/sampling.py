"""Drawing the next token. B rows, V vocabulary.

Every row brings its own uniform random number, so that a sample depends on its seed and not on the
rows that happen to share its batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def uniforms_for_prompt(seed: int, prompt: Sequence[int], samples: int, length: int) -> Tensor:
    """Uniform numbers in [0, 1), float64 (samples, length), a function of seed and prompt.

    Row k is the same for any number of samples above k.
    """
    key = hashlib.sha256(f"{seed}:{','.join(map(str, prompt))}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))
    return torch.from_numpy(generator.random((samples, length)))


def keep_nucleus(probabilities_BV: Tensor, top_p: float) -> Tensor:
    """Zero all but the smallest set of most probable tokens whose sum reaches `top_p`; not renormalised.

    Source: Holtzman et al. 2020 (arXiv 1904.09751), §3.1.
    """
    ordered, order = probabilities_BV.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.where(before < top_p, ordered, torch.zeros_like(ordered))
    return torch.zeros_like(probabilities_BV).scatter(-1, order, kept)


def draw(logits_BV: Tensor, uniforms_B: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """Next token of each row by inverting the cumulative distribution at the row's uniform number.

    Args:
        logits_BV: Unscaled logits.
        uniforms_B: In [0, 1).
        temperature: 0 takes the most probable token.
        top_p: 1 keeps the whole distribution.

    Returns:
        int64 (B,).
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    probabilities_BV = torch.softmax(logits_BV.double() / temperature, dim=-1)
    if top_p < 1:
        probabilities_BV = keep_nucleus(probabilities_BV, top_p)
    cumulative_BV = probabilities_BV.cumsum(-1)
    target_B1 = (uniforms_B.to(cumulative_BV) * cumulative_BV[:, -1]).unsqueeze(1)
    tokens_B = torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(1)
    return tokens_B.clamp(max=logits_BV.shape[-1] - 1)
