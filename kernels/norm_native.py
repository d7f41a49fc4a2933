"""Norms of inference on a CPU, by `native/norm.cpp`: root-mean-square, or layer norm where there is a bias.

Shapes: T tokens (all leading axes of x), D model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from ctypes import c_float, c_int, c_long, c_void_p

import torch
from torch import Tensor

from . import native


def ready(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> bool:
    """Whether `norm` and `norm_add` take these: `native.ready`, of one dtype, and of shapes that fit. Rows of x alone
    may lie at some distance, as the keys do that are made together with the values."""
    if not native.ready(weight) or x.dtype != weight.dtype or x.shape[-1] != weight.shape[0]:
        return False
    if not x.is_contiguous() and (residual is not None or not x.is_cpu or _layout(x) is None):
        return False
    if bias is not None and (bias.dtype != x.dtype or not native.ready(bias)):
        return False
    if residual is None:
        return x.is_cpu
    return residual.dtype == x.dtype and residual.shape == x.shape and native.ready(x, residual)


def _layout(x: Tensor) -> tuple[int, int] | None:
    """(rows side by side, numbers from the first of them to the first of the next) of (B, S, G, D) or (B, S, D)."""
    if x.is_contiguous():
        return 1, x.shape[-1]
    if x.dim() not in (3, 4):
        return None
    (across, along, *_), inner = x.stride(), x.shape[2] if x.dim() == 4 else 1
    packed = x[0, 0].is_contiguous() and (x.shape[0] == 1 or across == x.shape[1] * along)
    return (inner, along) if packed else None


def norm(x: Tensor, weight: Tensor, eps: float, bias: Tensor | None = None) -> Tensor:
    """`rms_norm`, or with a bias layer norm, of x (..., D). Contiguous output."""
    y = x.new_empty(x.shape)
    _run(x, None, weight, bias, y, None, eps)
    return y


def norm_add(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(norm(h), h) of h = x + residual, rounded to their dtype before it is normed."""
    y, h = torch.empty_like(x), torch.empty_like(x)
    _run(x, residual, weight, bias, y, h, eps)
    return y, h


def plus_(x: Tensor, y: Tensor) -> Tensor:
    """x + y of a sum x that nobody else needs: where inference runs on a CPU it is written to x."""
    if not native.ready(x, y) or x.dtype != y.dtype or x.shape != y.shape:
        return x + y
    _sums()[x.dtype](x.data_ptr(), y.data_ptr(), x.numel(), torch.get_num_threads())
    return x


def _run(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, y: Tensor, h: Tensor | None, eps):
    dim, layout = weight.shape[0], _layout(x)
    assert layout is not None
    _functions()[x.dtype](
        x.data_ptr(),
        None if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        None if h is None else h.data_ptr(),
        x.numel() // dim if dim else 0,
        dim,
        *layout,
        eps,
        bias is not None,
        torch.get_num_threads(),
    )


@functools.cache
def _functions() -> dict[torch.dtype, Callable[..., None]]:
    kinds = [c_void_p] * 6 + [c_long] * 4 + [c_float, c_int, c_int]
    names = {torch.bfloat16: "norm_bf16", torch.float32: "norm_fp32"}
    return {dtype: native.function(name, *kinds) for dtype, name in names.items()}


@functools.cache
def _sums() -> dict[torch.dtype, Callable[..., None]]:
    kinds = [c_void_p, c_void_p, c_long, c_int]
    names = {torch.bfloat16: "plus_bf16", torch.float32: "plus_fp32"}
    return {dtype: native.function(name, *kinds) for dtype, name in names.items()}
