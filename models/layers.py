"""Norms and linear layers: modules with no choice of their own, computed by the kernels.

D model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.linear import linear
from ..kernels.rmsnorm import rms_norm, rms_norm_add


class Norm(nn.Module):
    """RMSNorm, or LayerNorm with a bias, over the last axis."""

    bias: nn.Parameter | None

    def __init__(self, dim: int, kind: str = "rmsnorm", eps: float = 1e-5, *, device=None, dtype=None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        bias = torch.zeros(dim, device=device, dtype=dtype) if kind == "layernorm" else None
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        if self.bias is None:
            return rms_norm(x, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual): one pass where the kernel can."""
        if self.bias is None:
            return rms_norm_add(x, residual, self.weight, self.eps)
        total = x + residual
        return self(total), total


class Linear(nn.Linear):
    """`nn.Linear` with this package's product."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) -> (..., N)."""
        return linear(input, self.weight, self.bias)
