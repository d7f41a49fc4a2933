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


def ready(x: Tensor, weight: Tensor, *others: Tensor) -> bool:
    """Whether `norm` and `norm_add` take these: `native.ready`, and all of one dtype."""
    if not native.ready(x, weight, *others):
        return False
    return x.dtype == weight.dtype and all(t.dtype == x.dtype for t in others)


def norm(x: Tensor, weight: Tensor, eps: float, bias: Tensor | None = None) -> Tensor:
    """`rms_norm`, or with a bias layer norm, of x (..., D)."""
    y = torch.empty_like(x)
    _run(x, None, weight, bias, y, None, eps)
    return y


def norm_add(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(norm(h), h) of h = x + residual, rounded to their dtype before it is normed."""
    y, h = torch.empty_like(x), torch.empty_like(x)
    _run(x, residual, weight, bias, y, h, eps)
    return y, h


def _run(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, y: Tensor, h: Tensor | None, eps):
    dim = weight.shape[0]
    _functions()[x.dtype](
        x.data_ptr(),
        None if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        None if h is None else h.data_ptr(),
        x.numel() // dim if dim else 0,
        dim,
        eps,
        bias is not None,
        torch.get_num_threads(),
    )


@functools.cache
def _functions() -> dict[torch.dtype, Callable[..., None]]:
    kinds = [c_void_p] * 6 + [c_long] * 2 + [c_float, c_int, c_int]
    names = {torch.bfloat16: "norm_bf16", torch.float32: "norm_fp32"}
    return {dtype: native.function(name, *kinds) for dtype, name in names.items()}
