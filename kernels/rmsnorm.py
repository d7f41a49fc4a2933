"""Root-mean-square norm (arXiv 1910.07467), alone and with the residual sum before it; computed in fp32.

Shapes: T tokens (all leading axes of x), D model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import choose


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in plain torch, differentiated by autograd."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide = x.to(wide)
    scale = (x_wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (x_wide * scale * weight.to(wide)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis; x (..., D), weight (D,), y like x."""
    return rms_norm_reference(x, weight, eps)


def rms_norm_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns (rms_norm(h), h) of h = x + residual."""
    h = x + residual
    return rms_norm_reference(h, weight, eps), h
