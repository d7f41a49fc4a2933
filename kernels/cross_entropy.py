"""Cross entropy of a linear head, chunk by chunk: the whole logits never exist.

The loss is the last use of the head, so the forward pass already makes both gradients (of the SUM) while a chunk's
logits are at hand; the backward pass only scales them.
Shapes: T tokens, D model, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu_gemm
from .backend import choose, jit, on_device, tl, triton

_CACHED = 1 << 20  # logits that a CPU's cache holds in fp32


def linear_cross_entropy_reference(
    x_TD: Tensor, w_VD: Tensor, targets_T: Tensor, *, ignore_index: int = -100
) -> Tensor:
    """`linear_cross_entropy` over the whole logits, differentiated by autograd."""
    logits_TV = (x_TD @ w_VD.t()).to(wide_dtype(x_TD))
    return F.cross_entropy(logits_TV, targets_T, ignore_index=ignore_index, reduction="sum")


def linear_cross_entropy(
    x_TD: Tensor, w_VD: Tensor, targets_T: Tensor, *, ignore_index: int = -100, chunk: int | None = None
) -> Tensor:
    """SUM over counted tokens of -log softmax(w x_t)[target_t].

    x_TD and w_VD of one dtype, in which the head's products run; the softmax, the loss and the sum of w's gradient
    over chunks are fp32 (fp64 for fp64). targets_T int64 in [0, V), or ignore_index: not counted, no gradient. Any
    other target is refused by torch, and on CUDA, where looking would wait, makes the loss NaN.
    chunk: tokens whose logits exist at a time; None: what runs fastest. Returns an fp32 scalar, 0 for no tokens.
    Gradients of gradients are not defined.
    """
    if x_TD.dim() != 2 or w_VD.dim() != 2 or x_TD.shape[1] != w_VD.shape[1] or x_TD.dtype != w_VD.dtype:
        raise ValueError(
            f"linear_cross_entropy: x {tuple(x_TD.shape)} {x_TD.dtype} with w {tuple(w_VD.shape)} {w_VD.dtype}"
        )
    if targets_T.shape != x_TD.shape[:1]:
        raise ValueError(f"linear_cross_entropy: {tuple(targets_T.shape)} targets for x {tuple(x_TD.shape)}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"linear_cross_entropy: chunk is {chunk}, it must be at least 1")
    if choose(x_TD, w_VD) == "reference":
        return linear_cross_entropy_reference(x_TD, w_VD, targets_T, ignore_index=ignore_index)
    grad = torch.is_grad_enabled()
    return _linear_cross_entropy(
        x_TD, w_VD, targets_T, ignore_index, chunk or 0, grad and x_TD.requires_grad, grad and w_VD.requires_grad
    )[0]


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of softmax and sums: fp32, or fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def chunk_tokens(x_TD: Tensor, words: int, chunk: int) -> int:
    """Tokens of a chunk: as asked, or so many that a pass over the logits costs no more than one over w's gradient.

    Fewer tokens would keep the logits in cache, but every chunk reads and writes the whole gradient of w: measured on
    two CPU cores, 512 tokens are best for 4 thousand and for 50 thousand words. A GPU wants larger products.
    """
    least, elements = (1024, 1 << 26) if x_TD.is_cuda else (512, 1 << 21)
    return min(chunk or max(least, elements // words), max(x_TD.shape[0], 1))


def head_loss(
    x_TD: Tensor,
    w_VD: Tensor,
    loss_rows: Callable[[Tensor, slice, bool], Tensor],
    chunk: int,
    need: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs a head's loss chunk by chunk; returns the loss's sum, dx_TD and dw_VD (empty where not needed).

    loss_rows(logits_CV, rows, grad) returns the loss of each of these rows in the wide dtype and, with grad, leaves
    the gradient of the logits in logits_CV.
    """
    tokens, wide = x_TD.shape[0], wide_dtype(x_TD)
    need_x, need_w = need
    loss_T = torch.empty(tokens, dtype=wide, device=x_TD.device)
    dx_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format) if need_x else x_TD.new_empty(0)
    dw_VD = _SumOfProducts(w_VD, wide) if need_w else None
    for first in range(0, tokens, chunk):
        rows = slice(first, min(first + chunk, tokens))
        logits_CV = cpu_gemm.product(x_TD[rows], w_VD.t())
        loss_T[rows] = loss_rows(logits_CV, rows, need_x or need_w)
        if need_x:
            dx_TD[rows] = cpu_gemm.product(logits_CV, w_VD)
        if dw_VD is not None:
            dw_VD.add(logits_CV, x_TD[rows])
        del logits_CV  # before the next ones are made
    return loss_T.sum(), dx_TD, x_TD.new_empty(0) if dw_VD is None else dw_VD.result()


class _SumOfProducts:
    """w's gradient: the sum over chunks of g^T x, summed in the wide dtype, in the order of the chunks."""

    def __init__(self, w_VD: Tensor, wide: torch.dtype) -> None:
        self.like, self.wide = w_VD, wide
        self.sum: Tensor | None = None

    def add(self, g_CV: Tensor, x_CD: Tensor) -> None:
        if self.sum is None:
            self.sum = cpu_gemm.product(g_CV.t(), x_CD)
        elif self.like.is_cuda and self.like.dtype == self.wide:
            self.sum.addmm_(g_CV.t(), x_CD)
        else:
            self.sum = self.sum.to(self.wide).add_(cpu_gemm.product(g_CV.t(), x_CD))

    def result(self) -> Tensor:
        return self.like.new_zeros(self.like.shape) if self.sum is None else self.sum.to(self.like.dtype)


def _loss_rows_torch(targets_R: Tensor, scratch_RV: Tensor | None, logits_RV: Tensor, grad: bool) -> Tensor:
    """Softmax in the wide dtype (in scratch_RV when that is not the logits' own); every target is counted."""
    wide_RV = logits_RV if scratch_RV is None else scratch_RV[: len(logits_RV)].copy_(logits_RV)
    hit_R, top_R = wide_RV.gather(1, targets_R[:, None])[:, 0], wide_RV.amax(1)
    if not grad:
        return torch.exp(wide_RV.sub_(top_R[:, None]), out=wide_RV).sum(1).log_().add_(top_R).sub_(hit_R)
    torch.softmax(wide_RV, 1, out=wide_RV)
    # The largest probability is exp(top - logsumexp), and never underflows as the target's own may.
    loss_R = top_R.sub_(wide_RV.amax(1).log_()).sub_(hit_R)
    wide_RV.scatter_add_(1, targets_R[:, None], wide_RV.new_full((1, 1), -1).expand(len(targets_R), 1))
    if scratch_RV is not None:
        logits_RV.copy_(wide_RV)
    return loss_R


def _run_torch(
    x_TD: Tensor, w_VD: Tensor, targets_T: Tensor, ignore_index: int, chunk: int, need: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Leaves the tokens that are not counted out of every product, then puts zeros back for them."""
    counted_T = (targets_T != ignore_index).nonzero()[:, 0]
    some = counted_T.shape[0] < x_TD.shape[0]
    x_CD, t_C = (x_TD[counted_T], targets_T[counted_T]) if some else (x_TD, targets_T)
    chunk = chunk_tokens(x_CD, w_VD.shape[0], chunk)
    wide = wide_dtype(x_TD)
    # A CPU goes over a few rows at a time: they stay in its cache from one pass to the next.
    block = chunk if x_TD.is_cuda else max(1, min(chunk, _CACHED // w_VD.shape[0]))
    scratch = None if x_TD.dtype == wide else x_TD.new_empty(block, w_VD.shape[0], dtype=wide)

    def loss_rows(logits_CV: Tensor, rows: slice, grad: bool) -> Tensor:
        blocks = zip(t_C[rows].split(block), logits_CV.split(block), strict=True)
        return torch.cat([_loss_rows_torch(targets_R, scratch, logits_RV, grad) for targets_R, logits_RV in blocks])

    loss, dx_CD, dw_VD = head_loss(x_CD, w_VD, loss_rows, chunk, need)
    if some and need[0]:
        dx_CD = x_TD.new_zeros(x_TD.shape).index_copy_(0, counted_T, dx_CD)
    return loss, dx_CD, dw_VD


@jit
def _loss_kernel(logits, targets, loss, V, ignore_index, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row: one pass for maximum and sum together, one that turns logits into their gradient."""
    row = tl.program_id(0).to(tl.int64)
    z = logits + row * V
    target = tl.load(targets + row)
    counted = target != ignore_index
    # Read before the sums, whose barriers keep another thread's gradient from taking its place.
    hit = tl.load(z + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32)
    v = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, V, BLOCK):
        value = tl.load(z + first + v, mask=first + v < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, value)
        # A lane that has seen no word yet holds -inf: exp(-inf - -inf) would be NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - base) + tl.exp(value - base)
        top = higher
    best = tl.max(top, axis=0)
    log_sum = best + tl.log(tl.sum(total * tl.exp(top - best), axis=0))
    tl.store(loss + row, tl.where(counted, log_sum - hit, 0.0))
    if GRAD:
        for first in range(0, V, BLOCK):
            keep = first + v < V
            value = tl.load(z + first + v, mask=keep, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(value - log_sum) - tl.where(first + v == target, 1.0, 0.0)
            gradient = tl.where(counted, gradient, 0.0)
            tl.store(z + first + v, gradient.to(logits.dtype.element_ty), mask=keep)


@on_device
def _run_triton(
    x_TD: Tensor, w_VD: Tensor, targets_T: Tensor, ignore_index: int, chunk: int, need: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Reads no count on the host: a token that is not counted takes part with a gradient of zero."""
    targets_T = targets_T.contiguous()
    vocabulary = w_VD.shape[0]
    block = min(triton.next_power_of_2(vocabulary), 4096)

    def loss_rows(logits_CV: Tensor, rows: slice, grad: bool) -> Tensor:
        loss_C = torch.empty(logits_CV.shape[0], dtype=torch.float32, device=logits_CV.device)
        _loss_kernel[(logits_CV.shape[0],)](
            logits_CV, targets_T[rows], loss_C, vocabulary, ignore_index, GRAD=grad, BLOCK=block, num_warps=8
        )
        return loss_C

    return head_loss(x_TD, w_VD, loss_rows, chunk_tokens(x_TD, vocabulary, chunk), need)


def loss_and_gradients(
    x_TD: Tensor, w_VD: Tensor, targets_T: Tensor, ignore_index: int, chunk: int, need_x: bool, need_w: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What the operator runs: the loss's sum, dx_TD and dw_VD (empty where not needed). chunk of 0: the best."""
    run = _run_triton if choose(x_TD, w_VD) == "triton" else _run_torch
    return run(x_TD, w_VD, targets_T, ignore_index, chunk, (need_x, need_w))


_linear_cross_entropy = torch.library.custom_op("coterie::linear_cross_entropy", loss_and_gradients, mutates_args=())


def fake_head_loss(x_TD: Tensor, w_VD: Tensor, need_x: bool, need_w: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of what `head_loss` returns."""
    return (
        x_TD.new_empty((), dtype=wide_dtype(x_TD)),
        x_TD.new_empty(x_TD.shape if need_x else (0,)),
        w_VD.new_empty(w_VD.shape if need_w else (0,)),
    )


def save_gradients(ctx, inputs, output) -> None:
    """Keeps what `head_loss` made; ends in need_x, need_w among the inputs."""
    ctx.need, ctx.inputs = tuple(inputs[-2:]), len(inputs)
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def scale_gradients(ctx, dloss: Tensor | None, *_: Tensor | None):
    """Multiplies the kept gradients by the loss's own."""
    made = ctx.saved_tensors
    given = [grad * dloss if need and dloss is not None else None for grad, need in zip(made, ctx.need, strict=True)]
    return (*given, *[None] * (ctx.inputs - 2))


@_linear_cross_entropy.register_fake
def _(x_TD, w_VD, targets_T, ignore_index, chunk, need_x, need_w):
    return fake_head_loss(x_TD, w_VD, need_x, need_w)


_linear_cross_entropy.register_autograd(scale_gradients, setup_context=save_gradients)
