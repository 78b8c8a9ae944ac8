"""Statistics over the positions that count. B sequences, T response tokens; a mask is True where a token counts.

Masked positions may hold anything, infinities and NaN included, without touching a result or a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _check(x: Tensor, mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, got {mask.dtype}")
    if x.shape != mask.shape:
        raise ValueError(f"x {tuple(x.shape)} and mask {tuple(mask.shape)} differ in shape")
    if not bool(mask.any()):
        raise ValueError("the mask selects no position")


def check_shapes(mask: Tensor, **tensors: Tensor) -> None:
    """Refuse what would broadcast, and give a wrong mean without a word.

    Raises:
        ValueError: the mask is not bool, or a tensor has another shape than it; the message names the tensor.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"response_mask must be bool, got {mask.dtype}")
    for name, tensor in tensors.items():
        if tensor.shape != mask.shape:
            raise ValueError(
                f"{name} {tuple(tensor.shape)} and response_mask {tuple(mask.shape)} differ in shape"
            )


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over all True positions of the whole batch together.

    Formula: sum(x[mask]) / count(mask); not the mean of per-row means.

    Args:
        x: Any shape, any float dtype.
        mask: bool, the shape of `x`.

    Returns:
        A scalar tensor.

    Raises:
        ValueError: shapes differ, the mask is not bool or selects nothing.
    """
    _check(x, mask)
    return torch.where(mask, x, torch.zeros_like(x)).sum() / mask.sum()


def whiten(x: Tensor, mask: Tensor, *, centre: bool = True, eps: float = 1e-8) -> Tensor:
    """Scale to unit variance over the True positions, and to zero mean unless `centre` is False.

    Formula: (x - mean) / sqrt(variance + eps), plus the mean again if not `centre`; biased variance.

    Args:
        x: Any shape, any float dtype.
        mask: bool, the shape of `x`.
        centre: Remove the mean.
        eps: Added to the variance.

    Returns:
        A tensor of the shape of `x`; 0 where the mask is False.

    Raises:
        ValueError: shapes differ, the mask is not bool or selects nothing.

    Source: §3.2.3 (the final rewards are whitened before the KL term is added).
    """
    _check(x, mask)
    inside = torch.where(mask, x, torch.zeros_like(x))
    mean = inside.sum() / mask.sum()
    centred = torch.where(mask, inside - mean, torch.zeros_like(x))
    variance = centred.square().sum() / mask.sum()
    whitened = centred * torch.rsqrt(variance + eps)
    return whitened if centre else torch.where(mask, whitened + mean, torch.zeros_like(x))
