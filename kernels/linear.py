"""y = x w^T + b, where torch's own product is slow on CPUs: in fp32, and in inference, which has few rows.

Shapes: T tokens (all leading axes of x), D inputs, N outputs (all but the last axis of w).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from ctypes import c_int, c_long, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu_gemm, native
from .backend import choose


def linear(x: Tensor, w_ND: Tensor, b_N: Tensor | None = None) -> Tensor:
    """(..., D) -> (..., N): `F.linear`, with the products of `cpu_gemm` for fp32 on a CPU, forward and backward.

    The outputs may have several axes: w (*n, D) and b (*n) give (..., *n). In inference on a CPU a row's answer has
    the same bits whatever the other rows are: `native/linear.cpp`.
    """
    if native.ready(x, w_ND) and x.dtype == w_ND.dtype and (b_N is None or _fits(b_N, w_ND)):
        return _native(x, w_ND, b_N)
    if w_ND.dim() > 2:
        y = linear(x, w_ND.flatten(0, -2), None if b_N is None else b_N.flatten())
        return y.unflatten(-1, w_ND.shape[:-1])
    fast = x.device.type == "cpu" and x.dtype == w_ND.dtype == torch.float32 and choose(x) != "reference"
    if not fast or x.numel() == 0 or torch.is_autocast_enabled("cpu"):
        return F.linear(x, w_ND, b_N)
    # A registered operator costs as much as the product of a few rows, and is needed for its gradient alone.
    y = _linear(x, w_ND) if torch.is_grad_enabled() else _product(x, w_ND)
    return y if b_N is None else y + b_N


def _fits(b_N: Tensor, w_ND: Tensor) -> bool:
    return b_N.dtype == w_ND.dtype and b_N.is_contiguous()


def _native(x: Tensor, w_ND: Tensor, b_N: Tensor | None) -> Tensor:
    *axes, inputs = w_ND.shape
    *rows, given = x.shape
    if given != inputs:
        raise ValueError(f"linear: x {tuple(x.shape)} does not fit the weight {tuple(w_ND.shape)}")
    y = x.new_empty(rows + axes)
    _products()[x.dtype](
        x.data_ptr(),
        w_ND.data_ptr(),
        None if b_N is None else b_N.data_ptr(),
        y.data_ptr(),
        math.prod(rows),
        math.prod(axes),
        inputs,
        torch.get_num_threads(),
    )
    return y


@functools.cache
def _products() -> dict[torch.dtype, Callable[..., None]]:
    kinds = [c_void_p] * 4 + [c_long] * 3 + [c_int]
    names = {torch.bfloat16: "linear_bf16", torch.float32: "linear_fp32"}
    return {dtype: native.function(name, *kinds) for dtype, name in names.items()}


def _product(x: Tensor, w_ND: Tensor) -> Tensor:
    return cpu_gemm.product(x.reshape(-1, x.shape[-1]), w_ND.t()).view(*x.shape[:-1], -1)


_linear = torch.library.custom_op("coterie::linear", _product, mutates_args=())


@torch.library.custom_op("coterie::linear_backward", mutates_args=())
def _linear_backward(dy: Tensor, x: Tensor, w_ND: Tensor, need_x: bool, need_w: bool) -> tuple[Tensor, Tensor]:
    """dx and dw_ND, empty where not needed."""
    dy_TN, x_TD = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    dx = cpu_gemm.product(dy_TN, w_ND).view(x.shape) if need_x else x.new_empty(0)
    return dx, cpu_gemm.product(dy_TN.t(), x_TD) if need_w else w_ND.new_empty(0)


@_linear.register_fake
def _(x: Tensor, w_ND: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], w_ND.shape[0])


@_linear_backward.register_fake
def _(dy: Tensor, x: Tensor, w_ND: Tensor, need_x: bool, need_w: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_x else (0,)), w_ND.new_empty(w_ND.shape if need_w else (0,))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy: Tensor):
    need_x, need_w = ctx.needs_input_grad
    dx, dw_ND = _linear_backward(dy, *ctx.saved_tensors, need_x, need_w)
    return dx if need_x else None, dw_ND if need_w else None


_linear.register_autograd(_differentiate, setup_context=_save)
