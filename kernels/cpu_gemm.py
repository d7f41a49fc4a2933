"""Matrix products and large buffers on CPU, each by the fastest way that torch offers there."""

from __future__ import annotations

import functools
import math
import weakref

import numpy as np
import torch
from torch import Tensor

_LARGE = 4 << 20
_KEEP = 512 << 20
_free: dict[int, list[np.ndarray]] = {}


@functools.cache
def _onednn_fp32() -> bool:
    # torch sends fp32 products to MKL, which runs at half of oneDNN's rate on AMD processors. The choice rests on
    # the build alone, so that a run's bits do not depend on a timing.
    op = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return op is not None and torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()


def product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """a @ b, contiguous. Operands may be transposed views."""
    if a_MK.dtype == torch.float32 and a_MK.device.type == "cpu" and _onednn_fp32() and torch.backends.mkldnn.enabled:
        return torch.ops.mkldnn._linear_pointwise(a_MK, b_KN.t(), None, "none", [], "")
    return torch.mm(a_MK, b_KN)


def matmul(a_MK: Tensor, b_KN: Tensor, out_MN: Tensor) -> None:
    """Writes a @ b into `out`, which has contiguous rows: a copy more than `product` where that is oneDNN's."""
    if a_MK.dtype == torch.float32 and _onednn_fp32() and torch.backends.mkldnn.enabled:
        out_MN.copy_(product(a_MK, b_KN))
    else:
        torch.mm(a_MK, b_KN, out=out_MN)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor. The memory of a large one is used again once the tensor is gone.

    malloc gives large blocks back to the system at once, and touching new ones costs more than a pass over them: for
    the weight gradients of a layer as much as a tenth of its step. Up to 512 MiB of free blocks are kept. They come
    from numpy, which asks Linux for huge pages.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _LARGE:
        return torch.empty(shape, dtype=dtype)
    try:
        block = _free[size].pop()  # one step: another thread may take the last one
    except (KeyError, IndexError):
        block = np.empty(size + 64, np.uint8)
    first = -block.ctypes.data % 64
    view = block[first : first + size]
    weakref.finalize(view, _keep, size, block).atexit = False
    return torch.from_numpy(view).view(dtype).view(shape)


def _keep(size: int, block: np.ndarray) -> None:
    # A copy: collecting garbage may call this again in the midst of the sum.
    if size + sum(length * len(blocks) for length, blocks in list(_free.items())) <= _KEEP:
        _free.setdefault(size, []).append(block)
