"""Matrix products and large buffers on CPU, each by the fastest way that torch offers there."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

_HUGE = 4 << 20


@functools.cache
def _onednn_fp32() -> bool:
    # torch sends fp32 products to MKL, which runs at half of oneDNN's rate on AMD processors and no faster
    # on Intel's. The choice rests on the build alone, so that a run's bits do not depend on a timing.
    op = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return op is not None and torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()


def matmul(a_MK: Tensor, b_KN: Tensor, out_MN: Tensor) -> None:
    """Writes a @ b into `out`. Operands may be transposed views; `out` has contiguous rows."""
    if a_MK.dtype == torch.float32 and _onednn_fp32() and torch.backends.mkldnn.enabled:
        out_MN.copy_(torch.ops.mkldnn._linear_pointwise(a_MK, b_KN.t(), None, "none", [], ""))
    else:
        torch.mm(a_MK, b_KN, out=out_MN)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor; a large one comes from numpy, which asks Linux for huge pages.

    The first touch of 64 MiB costs 25 ms in small pages on a machine whose GEMM takes 50.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _HUGE:
        return torch.empty(shape, dtype=dtype)
    buffer = np.empty(size + 64, np.uint8)
    first = -buffer.ctypes.data % 64
    return torch.from_numpy(buffer[first : first + size]).view(dtype).view(shape)
