"""Keys and values of a batch whose sequences all have the same length, in memory reserved at the start.

B batch, S new tokens, L tokens in all, H query heads, G key-value heads, d head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.config import ModelConfig


class DenseCache:
    """Room for `tokens` keys and values per sequence and layer. No gradient passes through it.

    Attributes:
        length: tokens held; the caller moves it with `advance` after each pass of the model.
    """

    losses = False

    def __init__(self, config: ModelConfig, batch: int, tokens: int, *, device=None, dtype=None) -> None:
        shape = (config.layers, 2, batch, config.num_kv_heads, tokens, config.width_per_head)
        # Never read before it is written: attention is cut at the length.
        self._store = torch.empty(shape, device=device, dtype=dtype)
        self._grouped = config.num_kv_heads != config.heads
        self.tokens = tokens
        self.length = 0

    def attend(self, layer: int, q_BSHd: Tensor, k_BSGd: Tensor, v_BSGd: Tensor) -> Tensor:
        """Stores S new keys and values at `length` and attends causally to all: o_BSHd."""
        old, new = self.length, q_BSHd.shape[1]
        end = old + new
        if end > self.tokens:
            raise ValueError(f"{end} tokens do not fit into a cache made for {self.tokens}")
        keys_BGLd, values_BGLd = self._store[layer, 0], self._store[layer, 1]
        keys_BGLd[:, :, old:end] = k_BSGd.detach().transpose(1, 2)
        values_BGLd[:, :, old:end] = v_BSGd.detach().transpose(1, 2)
        # One query sees all there is and needs no mask; several after earlier ones need one cut aslant.
        mask = _slanted(new, end, q_BSHd.device) if old and new > 1 else None
        o_BHSd = F.scaled_dot_product_attention(
            q_BSHd.transpose(1, 2),
            keys_BGLd[:, :, :end],
            values_BGLd[:, :, :end],
            attn_mask=mask,
            is_causal=not old and new > 1,
            enable_gqa=self._grouped,
        )
        return o_BHSd.transpose(1, 2)

    def advance(self, tokens: int) -> None:
        """Counts the tokens that every layer has just stored."""
        self.length += tokens


def _slanted(new: int, end: int, device: torch.device) -> Tensor:
    return torch.ones(new, end, dtype=torch.bool, device=device).tril(end - new)
