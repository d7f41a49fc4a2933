"""Rows of a table: the embedding of tokens, and the positions of a step that get logits.

Shapes: V rows of the table, D model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from ctypes import c_long, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native


def rows(ids: Tensor, table_VD: Tensor) -> Tensor:
    """table_VD[ids]: (...) int64 to (..., D), `F.embedding`.

    An id that the table does not have raises IndexError, or gives NaN where inference runs on a CPU.
    """
    if not (native.ready(table_VD) and ids.dtype == torch.int64 and ids.is_contiguous()):
        return F.embedding(ids, table_VD)
    words, dim = table_VD.shape
    out = table_VD.new_empty((*ids.shape, dim))
    _function()(
        table_VD.data_ptr(), ids.data_ptr(), out.data_ptr(), ids.numel(), words, dim * table_VD.element_size()
    )
    return out


@functools.cache
def _function() -> Callable[..., None]:
    return native.function("rows", *[c_void_p] * 3, *[c_long] * 3)
