"""Norms and linear layers: modules with no choice of their own, computed by the kernels.

D model, H heads, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import norm_native
from ..kernels.linear import linear
from ..kernels.rmsnorm import rms_norm, rms_norm_add
from ..kernels.rows import rows
from ..moe.experts import identity
from ..parallel.tensor import local_part


class Norm(nn.Module):
    """RMSNorm, or LayerNorm with a bias, over the last axis.

    `share` is applied to the weight; `parallelize` replaces it where each rank norms other heads by the same weight.
    """

    bias: nn.Parameter | None

    def __init__(self, dim: int, kind: str = "rmsnorm", eps: float = 1e-5, *, device=None, dtype=None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        bias = torch.zeros(dim, device=device, dtype=dtype) if kind == "layernorm" else None
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self.share: Callable[[Tensor], Tensor] = identity

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        if self.bias is None:
            return rms_norm(x, self.share(self.weight), self.eps)
        if norm_native.ready(x, self.weight, self.bias):
            return norm_native.norm(x, self.weight, self.eps, self.bias)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual): one pass where the kernel can."""
        if self.bias is None:
            return rms_norm_add(x, residual, self.weight, self.eps)
        if norm_native.ready(x, self.weight, self.bias, residual):
            return norm_native.norm_add(x, residual, self.weight, self.eps, self.bias)
        total = x + residual
        return self(total), total


class HeadsNorm(Norm):
    """RMSNorm over the widths of all heads together, with a weight (H * d,) (OLMoE).

    `parallelize` replaces two hooks where each rank has some heads: `share` gives their part of the weight, `total`
    sums the heads' squares over the ranks.
    """

    def __init__(self, heads: int, width: int, eps: float = 1e-5, *, device=None, dtype=None) -> None:
        super().__init__(heads * width, eps=eps, device=device, dtype=dtype)
        self.total: Callable[[Tensor], Tensor] = identity

    def forward(self, x: Tensor) -> Tensor:
        """(..., H, d) -> (..., H, d)."""
        weight, flat = self.share(self.weight), x.flatten(-2)
        if self.total is identity:
            return rms_norm(flat, weight, self.eps).view(x.shape)
        wide = flat.float()
        square = self.total(wide.square().sum(-1, keepdim=True)) / len(self.weight)
        return (wide * torch.rsqrt(square + self.eps) * weight).to(x.dtype).view(x.shape)


class Embedding(nn.Embedding):
    """A table (V, D). `parallelize` replaces `look_up` where each rank holds some of the words."""

    def __init__(self, words: int, dim: int, *, device=None, dtype=None) -> None:
        super().__init__(words, dim, device=device, dtype=dtype)
        self.look_up: Callable[[Tensor, Tensor], Tensor] = rows

    def forward(self, input: Tensor) -> Tensor:
        """(...) ids -> (..., D)."""
        return self.look_up(input, self.weight)


class Heads(nn.Module):
    """A projection to heads: weight (*heads, d, D), optional bias (*heads, d). A rank that holds some of the heads
    computes those."""

    def __init__(self, dim: int, heads: tuple[int, ...], width: int, *, bias: bool, device=None, dtype=None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*heads, width, dim, device=device, dtype=dtype))
        zeros = torch.zeros(*heads, width, device=device, dtype=dtype) if bias else None
        self.bias = None if zeros is None else nn.Parameter(zeros)
        nn.init.uniform_(self.weight, -1 / math.sqrt(dim), 1 / math.sqrt(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., *heads, d)."""
        return linear(x, local_part(self.weight), None if self.bias is None else local_part(self.bias))


class Linear(nn.Module):
    """weight (N, D) without a bias. A rank that holds some of the columns gives the sum over those."""

    def __init__(self, dim: int, out: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, dim, device=device, dtype=dtype))
        nn.init.uniform_(self.weight, -1 / math.sqrt(dim), 1 / math.sqrt(dim))

    def forward(self, x: Tensor, bias_N: Tensor | None = None) -> Tensor:
        """(..., D) -> (..., N), `bias_N` added if given."""
        return linear(x, local_part(self.weight), bias_N)
