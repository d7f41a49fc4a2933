"""Rotary position embedding (arXiv 2104.09864) in the half-split convention of GPT-NeoX and Hugging Face.

Shapes: B batch, S sequence, H heads, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import choose


def rope_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of positions * theta^(-2i / head_dim): fp32, shape (*positions.shape, head_dim / 2)."""
    if head_dim % 2:
        raise ValueError(f"rope needs an even head_dim, got {head_dim}")
    power = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angle = positions[..., None].float() * (1.0 / theta**power)
    return angle.cos(), angle.sin()


def rope_reference(x_BSHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rope` in plain torch, differentiated by autograd."""
    wide = torch.promote_types(x_BSHd.dtype, torch.float32)
    first, second = x_BSHd.to(wide).chunk(2, -1)
    cos, sin = cos.to(wide).unsqueeze(-2), sin.to(wide).unsqueeze(-2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x_BSHd.dtype)


def rope(x_BSHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates (x[i], x[i + d/2]) by the angle of position s and frequency i.

    x_BSHd (B, S, H, d) with any strides; cos and sin (S, d/2) or (B, S, d/2) fp32, without gradient.
    """
    return rope_reference(x_BSHd, cos, sin)
