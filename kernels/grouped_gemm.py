"""One matrix product per expert over contiguous ragged rows: y_r = W_e x_r, and its two gradients.

Shapes: E experts, R routed rows, K contracted width, N output width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import grouped_gemm_triton
from .backend import choose


def grouped_gemm(x_RK: Tensor, w_ENK: Tensor, counts_E: Tensor) -> Tensor:
    """Multiplies every row by the matrix of its expert.

    Args:
        x_RK: rows in expert order; rows after the last expert's may hold anything.
        w_ENK: one (N, K) matrix per expert, in the dtype of the rows.
        counts_E: int64 rows of each expert, on the rows' device; their sum is at most R. Zeros cost nothing.

    Returns:
        y_RN in the rows' dtype, summed in fp32; rows after the last expert's are zero.

    Raises:
        ValueError: shapes or dtypes that do not fit each other.
    """
    _check(x_RK, w_ENK, counts_E)
    if choose(x_RK, w_ENK) == "reference":
        return grouped_gemm_reference(x_RK, w_ENK, counts_E)
    return _rows(x_RK, w_ENK, counts_E, False)


def grouped_gemm_reference(x_RK: Tensor, w_ENK: Tensor, counts_E: Tensor) -> Tensor:
    """`grouped_gemm` as a loop over the experts, differentiated by autograd."""
    counts = counts_E.tolist()
    parts = [x @ w.t() for x, w in zip(x_RK[: sum(counts)].split(counts), w_ENK, strict=True)]
    return torch.cat([*parts, x_RK.new_zeros(x_RK.shape[0] - sum(counts), w_ENK.shape[1])])


def _check(x_RK: Tensor, w_ENK: Tensor, counts_E: Tensor) -> None:
    if x_RK.ndim != 2 or w_ENK.ndim != 3 or x_RK.shape[1] != w_ENK.shape[2]:
        raise ValueError(f"rows {tuple(x_RK.shape)} and weights {tuple(w_ENK.shape)} are not (R, K) and (E, N, K)")
    if counts_E.shape != w_ENK.shape[:1]:
        raise ValueError(f"{tuple(counts_E.shape)} counts were given for {w_ENK.shape[0]} experts")
    if x_RK.dtype != w_ENK.dtype:
        raise ValueError(f"rows are {x_RK.dtype} and weights are {w_ENK.dtype}; they must be the same")


@torch.library.custom_op("coterie::grouped_gemm", mutates_args=())
def _rows(x_RK: Tensor, w: Tensor, counts_E: Tensor, turned: bool) -> Tensor:
    # turned: the matrices are (K, N) and y_r = W_e^T x_r, which is the gradient of the rows.
    if choose(x_RK, w) == "triton":
        return grouped_gemm_triton.rows_gemm(x_RK, w, counts_E, turned=turned)
    w_EKN = w if turned else w.mT
    if _native(x_RK, w):
        offsets_E = counts_E.cumsum(0).to(torch.int32)
        y_RN = F.grouped_mm(x_RK.contiguous(), w_EKN, offs=offsets_E)
        rows_R = torch.arange(x_RK.shape[0], device=x_RK.device)
        return torch.where((rows_R < offsets_E[-1])[:, None], y_RN, 0)
    y_RN = x_RK.new_empty(x_RK.shape[0], w_EKN.shape[2])
    first = 0
    for e, count in enumerate(counts_E.tolist()):
        if count:
            torch.mm(x_RK[first : first + count], w_EKN[e], out=y_RN[first : first + count])
        first += count
    y_RN[first:] = 0
    return y_RN


@torch.library.custom_op("coterie::grouped_gemm_weights", mutates_args=())
def _weights(dy_RN: Tensor, x_RK: Tensor, counts_E: Tensor) -> Tensor:
    # (E, N, K): the sum over each expert's rows of dy_r (outer) x_r.
    if choose(dy_RN, x_RK) == "triton":
        return grouped_gemm_triton.weights_gemm(dy_RN, x_RK, counts_E, x_RK.dtype)
    if _native(dy_RN, x_RK):
        offsets_E = counts_E.cumsum(0).to(torch.int32)
        dw_ENK = F.grouped_mm(dy_RN.contiguous().t(), x_RK.contiguous(), offs=offsets_E)
        return dw_ENK.masked_fill((counts_E == 0)[:, None, None], 0)
    dw_ENK = x_RK.new_empty(counts_E.shape[0], dy_RN.shape[1], x_RK.shape[1])
    first = 0
    for e, count in enumerate(counts_E.tolist()):
        torch.mm(dy_RN[first : first + count].t(), x_RK[first : first + count], out=dw_ENK[e])
        first += count
    return dw_ENK


def _native(*operands: Tensor) -> bool:
    # On CUDA torch's own grouped product leaves the counts on the device; it wants rows of whole 16 bytes. The loop
    # that stands in for it reads them on the host, as it does on a CPU, where that is free.
    return operands[0].is_cuda and all(t.shape[-1] * t.element_size() % 16 == 0 for t in operands)


@_rows.register_fake
def _(x_RK: Tensor, w: Tensor, counts_E: Tensor, turned: bool) -> Tensor:
    return x_RK.new_empty(x_RK.shape[0], w.shape[2] if turned else w.shape[1])


@_weights.register_fake
def _(dy_RN: Tensor, x_RK: Tensor, counts_E: Tensor) -> Tensor:
    return x_RK.new_empty(counts_E.shape[0], dy_RN.shape[1], x_RK.shape[1])


def _save(ctx, inputs, output) -> None:
    x_RK, w, counts_E, ctx.turned = inputs
    ctx.save_for_backward(x_RK, w, counts_E)


def _backward(ctx, dy_RN: Tensor):
    x_RK, w, counts_E = ctx.saved_tensors
    dx_RK = _rows(dy_RN, w, counts_E, not ctx.turned) if ctx.needs_input_grad[0] else None
    dw = None
    if ctx.needs_input_grad[1]:
        dw = _weights(x_RK, dy_RN, counts_E) if ctx.turned else _weights(dy_RN, x_RK, counts_E)
    return dx_RK, dw, None, None


_rows.register_autograd(_backward, setup_context=_save)
