"""The largest number of each row: what greedy decoding asks of the logits.

Shapes: B rows, V numbers of each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from ctypes import c_int, c_long, c_void_p

import torch
from torch import Tensor

from . import native


def argmax(x_BV: Tensor) -> tuple[Tensor, Tensor]:
    """(ids_B int64, x at these, fp32): the first of equals; a NaN counts as the largest. In inference on a CPU one
    call of `native/argmax.cpp`, without a copy in fp32."""
    if not native.ready(x_BV):
        ids_B = x_BV.argmax(dim=-1)
        return ids_B, x_BV.gather(1, ids_B[:, None])[:, 0].float()
    rows, size = x_BV.shape
    ids_B, best_B = x_BV.new_empty(rows, dtype=torch.int64), x_BV.new_empty(rows, dtype=torch.float32)
    _functions()[x_BV.dtype](
        x_BV.data_ptr(), ids_B.data_ptr(), best_B.data_ptr(), rows, size, torch.get_num_threads()
    )
    return ids_B, best_B


@functools.cache
def _functions() -> dict[torch.dtype, Callable[..., None]]:
    kinds = [c_void_p] * 3 + [c_long] * 2 + [c_int]
    names = {torch.bfloat16: "argmax_bf16", torch.float32: "argmax_fp32"}
    return {dtype: native.function(name, *kinds) for dtype, name in names.items()}
