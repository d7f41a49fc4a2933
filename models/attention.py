"""Causal self-attention with grouped queries and an optional key-value cache.

B batch, S sequence, D model, H query heads, G key-value heads, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..kernels.attention import causal_attention
from ..kernels.rope import rope_both_
from ..moe.experts import identity
from .config import ModelConfig, RopeScaling
from .layers import Heads, HeadsNorm, Linear, Norm


class Cache(Protocol):
    """Where keys and values of earlier tokens live; the owner of the memory decides how."""

    length: int
    """Tokens held by every sequence: the position of the next one where positions are not given."""
    losses: bool
    """Whether a pass with this cache computes the router's losses and entropy, which decoding does not read."""

    def attend(self, layer: int, q_BSHd: Tensor, k_BSGd: Tensor, v_BSGd: Tensor) -> Tensor:
        """Stores the new keys and values of `layer` and attends to all up to each query: o_BSHd."""
        ...


class Attention(nn.Module):
    """Projections `q` (H, d, D), `kv` (2, G, d, D) and `out` (D, H * d) with its bias `out_bias`.

    `parallelize` replaces three hooks where each rank holds some heads: `enter` gives the whole sequence from a
    rank's positions, `leave` sums the ranks' answers and goes back, `once` lets that sum hold the bias once.
    """

    def __init__(self, config: ModelConfig, *, device=None, dtype=None) -> None:
        super().__init__()
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        width, heads, dim = config.width_per_head, config.heads, config.dim
        self.q = Heads(dim, (heads,), width, bias=config.attention_bias != "none", **kind)
        self.kv = Heads(dim, (2, config.num_kv_heads), width, bias=config.attention_bias != "none", **kind)
        self.out = Linear(heads * width, dim, **kind)
        self.out_bias = nn.Parameter(torch.zeros(dim, **kind)) if config.attention_bias == "all" else None
        self.q_norm, self.k_norm = (_head_norm(config, n, kind) for n in (heads, config.num_kv_heads))
        self.enter: Callable[[Tensor], Tensor] = identity
        self.leave: Callable[[Tensor], Tensor] = identity
        self.once: Callable[[Tensor], Tensor] = identity

    def forward(
        self, x_BSD: Tensor, cos: Tensor | None, sin: Tensor | None, cache: Cache | None = None, layer: int = 0
    ) -> Tensor:
        """Causal attention over the sequence, or over the cache and the sequence.

        Args:
            x_BSD: normalised input.
            cos, sin: (S, d/2) or (B, S, d/2) rotations; None: positions were added to the input.
            cache: keys and values of earlier tokens.
            layer: which of the cache's layers this is.
        """
        x_BSD = self.enter(x_BSD)
        q_BSHd = self.q(x_BSD)
        k_BSGd, v_BSGd = self.kv(x_BSD).unbind(2)
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHd, k_BSGd = self.q_norm(q_BSHd), self.k_norm(k_BSGd)
        if cos is not None and sin is not None:
            q_BSHd, k_BSGd = rope_both_(q_BSHd, k_BSGd, cos, sin)
        if cache is None:
            o_BSHd = causal_attention(q_BSHd, k_BSGd, v_BSGd)
        else:
            o_BSHd = cache.attend(layer, q_BSHd, k_BSGd, v_BSGd)
        bias_D = None if self.out_bias is None else self.once(self.out_bias)
        return self.leave(self.out(o_BSHd.flatten(2), bias_D))


def _head_norm(config: ModelConfig, heads: int, kind: dict[str, Any]) -> Norm | None:
    width, eps = config.width_per_head, config.norm_eps
    if config.qk_norm == "all":
        return HeadsNorm(heads, width, eps, **kind)
    return Norm(width, eps=eps, **kind) if config.qk_norm == "head" else None


def scaled(rates: Tensor, scaling: RopeScaling) -> Tensor:
    """Rotations per position, in radians, slowed down as `RopeScaling` says."""
    slow = rates / scaling.factor
    if scaling.kind == "linear":
        return slow
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = rates * (scaling.original_max_positions / (2 * math.pi))
    return torch.lerp(slow, rates, ((turns - low) / (high - low)).clamp(0, 1))
