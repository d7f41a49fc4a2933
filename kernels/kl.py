"""Distillation loss between two linear heads, chunk by chunk: neither's whole logits ever exist.

Shapes: T tokens, D student model, U teacher model, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import choose, jit, on_device, tl, triton
from .cross_entropy import chunk_tokens, fake_head_loss, head_loss, save_gradients, scale_gradients, wide_dtype


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
    wide = wide_dtype(x_TD)
    student_TV = F.log_softmax((x_TD @ w_VD.t()).to(wide) / temperature, -1)
    with torch.no_grad():
        teacher_TV = F.log_softmax((teacher_x_TU @ teacher_w_VU.t()).to(wide) / temperature, -1)
    kl_T = (teacher_TV.exp() * (teacher_TV - student_TV)).sum(-1)
    if valid_T is not None:
        kl_T = kl_T.masked_fill(~valid_T, 0)
    return kl_T.sum() * temperature**2


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
    """SUM over valid tokens of temperature^2 * KL(teacher || student) at that temperature (arXiv 1503.02531).

    The temperature^2 keeps the gradient's size when the temperature changes. Students and teachers may differ in
    width and dtype, not in vocabulary. valid_T bool, None: all. chunk as in `linear_cross_entropy`. Returns an fp32
    scalar; gradients go to x and w alone, and gradients of gradients are not defined.
    """
    tokens, words = x_TD.shape[0], w_VD.shape[0]
    if teacher_x_TU.shape[0] != tokens or teacher_w_VU.shape[0] != words:
        raise ValueError(
            f"linear_kl: a teacher of {teacher_x_TU.shape[0]} tokens and {teacher_w_VU.shape[0]} words for a student"
            f" of {tokens} tokens and {words} words"
        )
    if temperature <= 0 or (chunk is not None and chunk < 1):
        raise ValueError(f"linear_kl: temperature {temperature} and chunk {chunk} must be positive")
    if choose(x_TD, w_VD) == "reference":
        return linear_kl_reference(x_TD, w_VD, teacher_x_TU, teacher_w_VU, temperature=temperature, valid_T=valid_T)
    grad = torch.is_grad_enabled()
    need = (grad and x_TD.requires_grad, grad and w_VD.requires_grad)
    teacher = (teacher_x_TU.detach(), teacher_w_VU.detach())
    return _linear_kl(x_TD, w_VD, *teacher, valid_T, temperature, chunk or 0, *need)[0]


def _loss_rows_torch(student_CV: Tensor, teacher_CV: Tensor, temperature: float, valid_C: Tensor | None, grad: bool):
    wide = wide_dtype(student_CV)
    student = F.log_softmax(student_CV.to(wide) / temperature, -1)
    teacher = F.log_softmax(teacher_CV.to(wide) / temperature, -1)
    teacher_p = teacher.exp()
    loss_C = (teacher.sub_(student).mul_(teacher_p)).sum(1).mul_(temperature**2)
    if grad:
        gradient = student.exp_().sub_(teacher_p).mul_(temperature)
        student_CV.copy_(gradient if valid_C is None else gradient.masked_fill_(~valid_C[:, None], 0))
    return loss_C if valid_C is None else loss_C.masked_fill_(~valid_C, 0)


@jit
def _log_sum(z, V, scale, BLOCK: tl.constexpr):
    """log sum exp(scale * z) over one row."""
    v = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, V, BLOCK):
        value = tl.load(z + first + v, mask=first + v < V, other=float("-inf")).to(tl.float32) * scale
        higher = tl.maximum(top, value)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - base) + tl.exp(value - base)
        top = higher
    best = tl.max(top, axis=0)
    return best + tl.log(tl.sum(total * tl.exp(top - best), axis=0))


@jit
def _kl_kernel(
    student, teacher, valid, loss, V, temperature, MASKED: tl.constexpr, GRAD: tl.constexpr, BLOCK: tl.constexpr
):
    """One program a row: the two normalisers, then the divergence and the student's gradient in one pass."""
    row = tl.program_id(0).to(tl.int64)
    s, t = student + row * V, teacher + row * V
    scale = 1.0 / temperature
    counted = True
    if MASKED:
        counted = tl.load(valid + row) != 0
    student_sum = _log_sum(s, V, scale, BLOCK)
    teacher_sum = _log_sum(t, V, scale, BLOCK)
    v = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, V, BLOCK):
        keep = first + v < V
        log_q = tl.load(s + first + v, mask=keep, other=0.0).to(tl.float32) * scale - student_sum
        log_p = tl.load(t + first + v, mask=keep, other=0.0).to(tl.float32) * scale - teacher_sum
        p = tl.exp(log_p)
        total += tl.where(keep, p * (log_p - log_q), 0.0)
        if GRAD:
            gradient = tl.where(counted, (tl.exp(log_q) - p) * temperature, 0.0)
            tl.store(s + first + v, gradient.to(student.dtype.element_ty), mask=keep)
    tl.store(loss + row, tl.where(counted, tl.sum(total, axis=0) * temperature * temperature, 0.0))


@on_device
def _loss_rows_triton(student_CV: Tensor, teacher_CV: Tensor, temperature: float, valid_C: Tensor | None, grad: bool):
    rows, words = student_CV.shape
    loss_C = torch.empty(rows, dtype=torch.float32, device=student_CV.device)
    mask = loss_C if valid_C is None else valid_C.to(torch.int8)
    block = min(triton.next_power_of_2(words), 2048)
    masked = valid_C is not None
    _kl_kernel[(rows,)](
        student_CV, teacher_CV, mask, loss_C, words, temperature, MASKED=masked, GRAD=grad, BLOCK=block, num_warps=8
    )
    return loss_C


def kl_and_gradients(
    x_TD: Tensor,
    w_VD: Tensor,
    teacher_x_TU: Tensor,
    teacher_w_VU: Tensor,
    valid_T: Tensor | None,
    temperature: float,
    chunk: int,
    need_x: bool,
    need_w: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the operator runs: the sum, dx_TD and dw_VD (empty where not needed). chunk of 0: the best."""
    run = _loss_rows_triton if choose(x_TD, w_VD) == "triton" else _loss_rows_torch

    def loss_rows(student_CV: Tensor, rows: slice, grad: bool) -> Tensor:
        teacher_CV = teacher_x_TU[rows] @ teacher_w_VU.t()
        return run(student_CV, teacher_CV, temperature, None if valid_T is None else valid_T[rows], grad)

    return head_loss(x_TD, w_VD, loss_rows, chunk_tokens(x_TD, w_VD.shape[0], chunk), (need_x, need_w))


_linear_kl = torch.library.custom_op("coterie::linear_kl", kl_and_gradients, mutates_args=())


@_linear_kl.register_fake
def _(x_TD, w_VD, teacher_x_TU, teacher_w_VU, valid_T, temperature, chunk, need_x, need_w):
    return fake_head_loss(x_TD, w_VD, need_x, need_w)


_linear_kl.register_autograd(scale_gradients, setup_context=save_gradients)
