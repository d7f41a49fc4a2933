"""Causal self-attention with grouped queries and an optional key-value cache.

B batch, S sequence, D model, H query heads, G key-value heads, d head width.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from ..kernels.attention import causal_attention
from ..kernels.rope import rope
from .config import ModelConfig
from .layers import Linear, Norm


class Cache(Protocol):
    """Where keys and values of earlier tokens live; the owner of the memory decides how."""

    length: int
    """Tokens held by every sequence: the position of the next one where positions are not given."""

    def attend(self, layer: int, q_BSHd: Tensor, k_BSGd: Tensor, v_BSGd: Tensor) -> Tensor:
        """Stores the new keys and values of `layer` and attends to all up to each query: o_BSHd."""
        ...


class Attention(nn.Module):
    """Queries, keys and values in one projection; heads in that order along its rows."""

    def __init__(self, config: ModelConfig, *, device=None, dtype=None) -> None:
        super().__init__()
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.heads, self.kv_heads, self.width = config.heads, config.num_kv_heads, config.width_per_head
        rows = (self.heads + 2 * self.kv_heads) * self.width
        self.qkv = Linear(config.dim, rows, bias=config.bias, **kind)
        self.out = Linear(self.heads * self.width, config.dim, bias=config.bias, **kind)
        self.q_norm = Norm(self.width, eps=config.norm_eps, **kind) if config.qk_norm else None
        self.k_norm = Norm(self.width, eps=config.norm_eps, **kind) if config.qk_norm else None

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
        B, S, _ = x_BSD.shape
        H, G = self.heads, self.kv_heads
        qkv = self.qkv(x_BSD).view(B, S, H + 2 * G, self.width)
        qk, v = qkv.split((H + G, G), dim=2)
        if self.q_norm is None or self.k_norm is None:
            # One rotation for queries and keys: they are neighbours in the projection.
            q, k = _rotated(qk, cos, sin).split((H, G), dim=2)
        else:
            q, k = qk.split((H, G), dim=2)
            q, k = _rotated(self.q_norm(q), cos, sin), _rotated(self.k_norm(k), cos, sin)
        o_BSHd = causal_attention(q, k, v) if cache is None else cache.attend(layer, q, k, v)
        return self.out(o_BSHd.reshape(B, S, H * self.width))


def _rotated(x_BSHd: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    return x_BSHd if cos is None or sin is None else rope(x_BSHd, cos, sin)
