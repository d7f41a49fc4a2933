"""Keys and values in blocks, plainly: one sequence after another.

T new tokens, L tokens of one sequence, H query heads, G key heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.config import ModelConfig
from .blocks import Copy
from .step import Slice


def block_bytes(config: ModelConfig, size: int, dtype: str, model_dtype: torch.dtype) -> int:
    """Bytes of one block in all layers."""
    return config.layers * 2 * size * config.num_kv_heads * config.width_per_head * model_dtype.itemsize


class KVPool:
    """`blocks` blocks of `size` tokens in every layer."""

    def __init__(self, config: ModelConfig, blocks: int, size: int, *, dtype="auto", model_dtype: Any, device=None):
        self.blocks, self.size = blocks, size
        shape = (config.layers, 2, blocks * size, config.num_kv_heads, config.width_per_head)
        self.store = torch.empty(shape, dtype=model_dtype, device=device)

    def copy(self, pairs: Sequence[Copy]) -> None:
        """Copies whole blocks in order."""
        for old, new in pairs:
            size = self.size
            self.store[:, :, new * size : (new + 1) * size] = self.store[:, :, old * size : (old + 1) * size]


class PagedCache:
    """The cache of one step over a pool."""

    losses = False
    length = 0

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool

    def begin(self, slices: Sequence[Slice]) -> tuple[Tensor, Tensor]:
        """Tokens (1, T) and positions (1, T)."""
        size = self.pool.size
        self.parts = []
        for piece in slices:
            end = piece.start + len(piece.tokens)
            slots_L = torch.tensor([piece.blocks[p // size] * size + p % size for p in range(end)])
            self.parts.append((piece.start, end, slots_L))
        tokens = [token for piece in slices for token in piece.tokens]
        positions = [p for start, end, _ in self.parts for p in range(start, end)]
        return torch.tensor([tokens]), torch.tensor([positions])

    def attend(self, layer: int, q_BSHd: Tensor, k_BSGd: Tensor, v_BSGd: Tensor) -> Tensor:
        """Stores and attends: o (1, T, H, d)."""
        outs, first = [], 0
        for start, end, slots_L in self.parts:
            new = end - start
            at = slice(first, first + new)
            keys, values = self.pool.store[layer]
            keys[slots_L[start:]], values[slots_L[start:]] = k_BSGd[0, at], v_BSGd[0, at]
            mask = torch.ones(new, end, dtype=torch.bool).tril(end - new)
            o = F.scaled_dot_product_attention(
                q_BSHd[0, at].transpose(0, 1)[None],
                keys[slots_L].transpose(0, 1)[None],
                values[slots_L].transpose(0, 1)[None],
                attn_mask=mask,
                enable_gqa=q_BSHd.shape[2] != k_BSGd.shape[2],
            )
            outs.append(o[0].transpose(0, 1))
            first += new
        return torch.cat(outs)[None]
