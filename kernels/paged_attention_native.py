"""Paged attention through the compiled CPU kernels of `native/attention.cpp`: store and attend in one call.

T new tokens, H query heads, G key heads, d head width.
"""

from __future__ import annotations

import functools
from ctypes import c_double, c_int, c_long, c_void_p

import torch
from torch import Tensor

from . import native
from .paged_kv import FP8, LayerKV, Ragged

_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "int8",
    FP8: "fp8",
}
_WIDEST = 256  # numbers of a head, and
_ROWS = 64  # query heads of a key head that the kernel has room for


def fits(q_THd: Tensor, kv: LayerKV) -> bool:
    """Whether the kernel can take these: everything else is torch's."""
    heads, width = q_THd.shape[1:]
    return (
        width % 8 == 0
        and 8 <= width <= _WIDEST
        and heads // kv.k.shape[2] <= _ROWS
        and kv.k.dtype in _NAMES
        and kv.k.is_contiguous()
        and kv.v.is_contiguous()
        and kv.k.is_cpu
        and native.ready(q_THd)
    )


def attend_native(
    q_THd: Tensor,
    kv: LayerKV,
    ragged: Ragged,
    *,
    scale: float,
    window: int,
    sinks_H: Tensor | None,
    new: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """o_THd, after storing `new`, the keys and values (T, G, d) of the new tokens, where they are given.

    The same bits for one token whatever else is in the step, however it was cut and wherever its blocks lie.

    Raises:
        IndexError: a table or a slot is outside the cache.
    """
    tokens, heads, width = q_THd.shape
    blocks, size, groups, _ = kv.k.shape
    out = torch.empty_like(q_THd)
    sinks_H = None if sinks_H is None else sinks_H.float().contiguous()
    k, v = (_rows(x, q_THd.dtype) for x in new) if new is not None else (q_THd, q_THd)
    failed = _kernel(f"attend_{_NAMES[q_THd.dtype]}_{_NAMES[kv.k.dtype]}")(
        *(q_THd.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), kv.k.data_ptr(), kv.v.data_ptr()),
        None if kv.k_scale is None else kv.k_scale.data_ptr(),
        None if kv.v_scale is None else kv.v_scale.data_ptr(),
        *(ragged.tables_NM.data_ptr(), ragged.starts_N1.data_ptr(), ragged.lengths_N.data_ptr()),
        ragged.slots_T.data_ptr(),
        None if sinks_H is None else sinks_H.data_ptr(),
        *(k.stride(0), v.stride(0), tokens),
        *(ragged.lengths_N.shape[0], ragged.tables_NM.stride(0), blocks, size),
        *(heads, groups, width, window, torch.get_num_threads(), new is not None),
        scale,
    )
    if failed:
        raise IndexError(f"a block table or a slot of this step is outside the {blocks} blocks of the cache")
    return out


@functools.cache
def _kernel(name: str) -> native.Function:
    function = native.function(name, *[c_void_p] * 13, *[c_long] * 13, c_double)
    function.restype = c_int
    return function


def _rows(x_TGd: Tensor, dtype: torch.dtype) -> Tensor:
    """The kernel takes any stride from one token to the next, and queries' type."""
    groups, width = x_TGd.shape[1:]
    if x_TGd.dtype == dtype and (x_TGd.stride(2) == 1 or width == 1) and (x_TGd.stride(1) == width or groups == 1):
        return x_TGd
    return x_TGd.to(dtype).contiguous()
