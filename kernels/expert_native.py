"""The experts of a MoE layer, or a dense feed-forward network, in one call for inference on a CPU:
`native/experts.cpp`.

Shapes: T tokens, D model, E experts, K choices, F hidden, P 2 (swiglu: gate, up) or 1 (gelu).
"""

from __future__ import annotations

import functools
from ctypes import c_int, c_long, c_void_p

import torch
from torch import Tensor

from . import native

_AT_ONCE = 2048  # tokens: more of them take turns, so that what they need in between stays small
_GAPS = 8 * 64
_GROUP, _PART = 16, 512  # rows: tiles.h, plan.h


def ready(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether the two functions below take these: `native.ready`, all of x's dtype."""
    given = [w for w in weights if w is not None]
    return native.ready(x, *given) and all(w.dtype == x.dtype for w in given)


def experts(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor | None,
    w_in: Tensor,
    w_out_EDF: Tensor,
    b_in: Tensor | None = None,
    b_out_ED: Tensor | None = None,
    activation: str = "swiglu",
) -> Tensor:
    """`expert_mlp` of a router's choices: y_t = sum_k w_tk * expert(ids_tk)(x_t), an id of -1 adding nothing.

    w_in is (E, P, F, D) or (E, P F, D), b_in alike. The activation is computed in fp32 and rounded to x's dtype, and
    the sum runs in the order of k in fp32. A token's answer has the same bits whatever the other tokens are, and
    however many threads there are.

    Raises:
        ValueError: a shape does not fit, or an id is not an expert's.
    """
    count = len(w_out_EDF)
    if ids_TK.dim() != 2 or len(ids_TK) != len(x_TD):
        raise ValueError(f"experts: ids of shape {tuple(ids_TK.shape)} are not (T, K) with T = {len(x_TD)}")
    if weights_TK is not None:
        if weights_TK.shape != ids_TK.shape:
            raise ValueError(f"experts: weights of {tuple(weights_TK.shape)} for ids of {tuple(ids_TK.shape)}")
        weights_TK = _of(weights_TK, torch.float32)
    ids_TK = _of(ids_TK, torch.int64)
    return _call(x_TD, ids_TK, weights_TK, (w_in, w_out_EDF, b_in, b_out_ED), (count, ids_TK.shape[1]), activation)


def feed_forward(
    x: Tensor, w_in: Tensor, w_out_DF: Tensor, b_in: Tensor | None, b_out_D: Tensor | None, activation: str
) -> Tensor:
    """(..., D) -> (..., D): one dense network, as the only expert of all rows; w_in is (P, F, D) or (P F, D).

    Raises:
        ValueError: a shape does not fit.
    """
    return _call(x, None, None, (w_in, w_out_DF, b_in, b_out_D), (1, 1), activation)


def _call(
    x: Tensor,
    ids_TK: Tensor | None,
    weights_TK: Tensor | None,
    parameters: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    sizes: tuple[int, int],
    activation: str,
) -> Tensor:
    w_in, w_out, b_in, b_out = parameters
    count, choices = sizes
    dim, hidden = w_out.shape[-2:]
    parts = 2 if activation == "swiglu" else 1
    _check(x, parameters, count * hidden, parts, dim)
    y, tokens = torch.empty_like(x), x.numel() // max(dim, 1)
    rows = min(tokens, _AT_ONCE) * choices
    # As experts.cpp divides it: offsets of experts, plan of the rows, outputs in fp32, and hidden rows; tiles have
    # inputs and hidden rows in groups, of which each part of an expert begins its own.
    packed = 0 if x.dtype == torch.float32 else (rows // _GROUP + min(rows, count + rows // _PART)) * _GROUP
    inner = max(rows * hidden, packed * (dim + hidden)) * x.element_size()
    room = x.new_empty(_GAPS + 8 * (count + 1) + rows * (40 + dim * 4) + inner, dtype=torch.uint8)
    failed = _functions()[x.dtype](
        x.data_ptr(),
        None if ids_TK is None else ids_TK.data_ptr(),
        None if weights_TK is None else weights_TK.data_ptr(),
        w_in.data_ptr(),
        None if b_in is None else b_in.data_ptr(),
        w_out.data_ptr(),
        None if b_out is None else b_out.data_ptr(),
        y.data_ptr(),
        room.data_ptr(),
        tokens,
        choices,
        dim,
        count,
        hidden,
        parts,
        _AT_ONCE,
        torch.get_num_threads(),
    )
    if failed:
        raise ValueError(f"experts: an id is not below the number of experts, {count}")
    return y


def _of(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == dtype and t.is_contiguous() else t.to(dtype).contiguous()


def _check(
    x: Tensor, parameters: tuple[Tensor, Tensor, Tensor | None, Tensor | None], rows: int, parts: int, dim: int
) -> None:
    """Raises ValueError where the sizes do not fit: the kernel reads memory by them."""
    w_in, _, b_in, b_out = parameters
    fits = x.shape[-1] == w_in.shape[-1] == dim and w_in.numel() == parts * rows * dim
    fits = fits and (b_in is None or b_in.numel() == parts * rows)
    fits = fits and (b_out is None or b_out.shape == parameters[1].shape[:-1])
    if not fits:
        shapes = {n: None if p is None else tuple(p.shape) for n, p in zip(_NAMES, (x, *parameters), strict=True)}
        raise ValueError(f"experts: these shapes do not fit one another: {shapes}")


_NAMES = ("x", "w_in", "w_out", "b_in", "b_out")


@functools.cache
def _functions() -> dict[torch.dtype, native.Function]:
    kinds = [c_void_p] * 9 + [c_long] * 7 + [c_int]
    names = {torch.bfloat16: "experts_bf16", torch.float32: "experts_fp32"}
    functions = {dtype: native.function(name, *kinds) for dtype, name in names.items()}
    for function in functions.values():
        function.restype = c_int
    return functions
