"""The experts of a few tokens in Triton: two launches, no sort, and every visited expert's weights read once.

A program belongs to an assignment (t, k) that is the first one of its expert, so it knows without any table which
experts are visited; it computes all tokens of its expert together. The last program to finish a tile of outputs adds
the answers up, in the order of k: a fixed order, so that a run repeats bit by bit.

Shapes: T tokens, D model, E experts, K choices, A = T K assignments, F hidden, N = 2F (swiglu) or F (gelu).
"""
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import torch
from torch import Tensor

from .backend import choose, jit, on_device, tl, triton
from .expert_mlp_triton import _gelu
from .grouped_gemm_triton import INTERPRETED

MOST_TOKENS = 16
"""For more of them the grouped product reads each weight as seldom, and its tiles are fuller."""
_ROWS = 16  # what one tensor-core instruction takes; fewer tokens leave some of them empty
UP = DOWN = (16, 16, 4, 2) if INTERPRETED else (32, 128, 4, 3)
"""Of the two launches: columns of a program, the depth of one step, warps, and stages in flight."""


@jit
def _visit(ids_ptr, A, K: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_T: tl.constexpr):
    """Of this program's assignment: its expert (-1: dropped, or an earlier one is the first), and for each token the
    assignment that goes to it (-1: none). Also how many experts are visited in all."""
    mine = tl.program_id(0)
    a_A = tl.arange(0, BLOCK_A)
    ids_A = tl.load(ids_ptr + a_A, mask=a_A < A, other=-1)
    expert = tl.load(ids_ptr + mine)
    earlier = tl.sum(((ids_A == expert) & (a_A < mine)).to(tl.int32))
    same_AA = (ids_A[:, None] == ids_A[None, :]) & (a_A[None, :] < a_A[:, None])
    visited = tl.sum(((tl.sum(same_AA.to(tl.int32), 1) == 0) & (ids_A >= 0)).to(tl.int32))
    t_T, k_A = tl.arange(0, BLOCK_T), a_A % K
    here_TA = (a_A[None, :] // K == t_T[:, None]) & (ids_A == expert)[None, :] & (a_A < A)[None, :]
    slot_T = tl.max(tl.where(here_TA, t_T[:, None] * K + k_A[None, :], -1), 1)
    return tl.where(earlier > 0, -1, expert), slot_T, visited


@jit
def _up_kernel(
    x_ptr,
    ids_ptr,
    w_ptr,
    bias_ptr,
    a_ptr,
    A,
    D: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # a[t, k] = activation(W_in x_t) for the assignments of one expert, some columns of F.
    expert, slot_T, _ = _visit(ids_ptr, A, K, BLOCK_A, BLOCK_T)
    if expert < 0:
        return
    N: tl.constexpr = 2 * F if GATED else F
    dtype: tl.constexpr = a_ptr.dtype.element_ty
    t_T, f_F = tl.arange(0, BLOCK_T), tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    live_T, inside_F = slot_T >= 0, f_F < F
    w_tile = w_ptr + expert.to(tl.int64) * N * D
    gate_TF = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
    up_TF = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
    for first in range(0, D, BLOCK_D):
        d_d = first + tl.arange(0, BLOCK_D)
        x_Td = tl.load(x_ptr + t_T[:, None] * D + d_d[None, :], mask=live_T[:, None] & (d_d < D)[None, :], other=0.0)
        w_dF, mask_dF = d_d[:, None] + f_F[None, :] * D, (d_d < D)[:, None] & inside_F[None, :]
        gate_TF = tl.dot(x_Td, tl.load(w_tile + w_dF, mask=mask_dF, other=0.0), gate_TF, input_precision="ieee")
        if GATED:
            w_up = tl.load(w_tile + F * D + w_dF, mask=mask_dF, other=0.0)
            up_TF = tl.dot(x_Td, w_up, up_TF, input_precision="ieee")
    if HAS_BIAS:
        gate_TF += tl.load(bias_ptr + expert * N + f_F, mask=inside_F, other=0.0)[None, :]
        if GATED:
            up_TF += tl.load(bias_ptr + expert * N + F + f_F, mask=inside_F, other=0.0)[None, :]
    # Rounded as the grouped product rounds z, which training keeps.
    gate_TF = gate_TF.to(dtype).to(tl.float32)
    if GATED:
        a_TF = gate_TF * tl.sigmoid(gate_TF) * up_TF.to(dtype).to(tl.float32)
    else:
        a_TF, _ = _gelu(gate_TF)
    tl.store(a_ptr + slot_T[:, None] * F + f_F[None, :], a_TF.to(dtype), mask=live_T[:, None] & inside_F[None, :])


@jit
def _down_kernel(
    a_ptr,
    ids_ptr,
    weights_ptr,
    w_ptr,
    bias_ptr,
    part_ptr,
    done_ptr,
    y_ptr,
    A,
    D: tl.constexpr,
    F: tl.constexpr,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    # part[t, k] = W_out a[t, k] for one expert and some columns of D; the last to come adds them up to y.
    expert, slot_T, visited = _visit(ids_ptr, A, K, BLOCK_A, BLOCK_T)
    t_T, d_D = tl.arange(0, BLOCK_T), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside_D = d_D < D
    if (visited == 0) & (tl.program_id(0) == 0):
        there_TD = (t_T < A // K)[:, None] & inside_D[None, :]
        zeros_TD = tl.zeros((BLOCK_T, BLOCK_D), y_ptr.dtype.element_ty)
        tl.store(y_ptr + t_T[:, None] * D + d_D[None, :], zeros_TD, mask=there_TD)
    if expert < 0:
        return
    live_T = slot_T >= 0
    w_tile = w_ptr + expert.to(tl.int64) * D * F
    y_TD = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for first in range(0, F, BLOCK_F):
        f_f = first + tl.arange(0, BLOCK_F)
        a_Tf = tl.load(
            a_ptr + slot_T[:, None] * F + f_f[None, :], mask=live_T[:, None] & (f_f < F)[None, :], other=0.0
        )
        w_fD = f_f[:, None] + d_D[None, :] * F
        w_fD = tl.load(w_tile + w_fD, mask=(f_f < F)[:, None] & inside_D[None, :], other=0.0)
        y_TD = tl.dot(a_Tf, w_fD, y_TD, input_precision="ieee")
    if HAS_BIAS:
        y_TD += tl.load(bias_ptr + expert * D + d_D, mask=inside_D, other=0.0)[None, :]
    mask_TD = live_T[:, None] & inside_D[None, :]
    tl.store(part_ptr + slot_T[:, None] * D + d_D[None, :], y_TD, mask=mask_TD)
    tl.debug_barrier()  # every thread's part is written before one of them counts this program
    came = tl.atomic_add(done_ptr + tl.program_id(1), 1, sem="acq_rel")
    if came == visited - 1:
        sum_TD = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for k in range(K):
            there_T = t_T < A // K
            id_T = tl.load(ids_ptr + t_T * K + k, mask=there_T, other=-1)
            part_TD = part_ptr + (t_T * K + k)[:, None] * D + d_D[None, :]
            # Written by other programs: not from this one's cache.
            part_TD = tl.load(part_TD, mask=(id_T >= 0)[:, None] & inside_D[None, :], other=0.0, cache_modifier=".cg")
            if HAS_WEIGHTS:
                part_TD *= tl.load(weights_ptr + t_T * K + k, mask=there_T, other=0.0).to(tl.float32)[:, None]
            sum_TD += part_TD
        mask_TD = (t_T < A // K)[:, None] & inside_D[None, :]
        tl.store(y_ptr + t_T[:, None] * D + d_D[None, :], sum_TD.to(y_ptr.dtype.element_ty), mask=mask_TD)
        tl.store(done_ptr + tl.program_id(1), 0)  # ready for the next call


_counters: dict[tuple[torch.device, int], Tensor] = {}


def _counter(device: torch.device, tiles: int) -> Tensor:
    """Zeros, which every call leaves as zeros; calls of one stream come one after another."""
    key = device, tiles
    if key not in _counters:
        _counters[key] = torch.zeros(tiles, dtype=torch.int32, device=device)
    return _counters[key]


def ready(x_TD: Tensor, *weights: Tensor | None) -> bool:
    """Whether the function below takes these: a few tokens in inference mode, where Triton runs."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return False
    few = 0 < len(x_TD) <= MOST_TOKENS and choose(x_TD) == "triton"
    return few and all(w is None or (w.dtype == x_TD.dtype and w.is_contiguous()) for w in weights)


@on_device
def expert_decode_triton(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor | None,
    w_in_END: Tensor,
    w_out_EDF: Tensor,
    b_in_EN: Tensor | None = None,
    b_out_ED: Tensor | None = None,
    activation: str = "swiglu",
) -> Tensor:
    """y_t = sum_k weights[t, k] * expert ids[t, k] (x_t), without gradients; ids of -1 add nothing.

    Args:
        x_TD: 1 to MOST_TOKENS tokens, contiguous.
        ids_TK: int64; a token names an expert at most once.
        weights_TK: None: ones.

    Raises:
        ValueError: more tokens than that.
    """
    (tokens, dim), choices, hidden = x_TD.shape, ids_TK.shape[1], w_out_EDF.shape[2]
    if not 0 < tokens <= MOST_TOKENS:
        raise ValueError(f"expert_decode: {tokens} tokens, but it is made for 1 to {MOST_TOKENS}")
    x_TD, ids_TK, rows = x_TD.contiguous(), ids_TK.contiguous(), tokens * choices
    a_AF, y_TD = x_TD.new_empty(rows, hidden), torch.empty_like(x_TD)
    part_AD = x_TD.new_empty(rows, dim, dtype=torch.float32)
    shape = {"D": dim, "F": hidden, "K": choices, "BLOCK_T": _ROWS, "BLOCK_A": triton.next_power_of_2(rows)}
    columns, tiles = triton.cdiv(hidden, UP[0]), triton.cdiv(dim, DOWN[0])
    _up_kernel[(rows, columns)](
        *(x_TD, ids_TK, w_in_END, b_in_EN, a_AF, rows),
        **shape,
        GATED=activation == "swiglu",
        HAS_BIAS=b_in_EN is not None,
        BLOCK_F=UP[0],
        BLOCK_D=UP[1],
        num_warps=UP[2],
        num_stages=UP[3],
    )
    _down_kernel[(rows, tiles)](
        *(a_AF, ids_TK, weights_TK, w_out_EDF, b_out_ED, part_AD, _counter(x_TD.device, tiles), y_TD, rows),
        **shape,
        HAS_BIAS=b_out_ED is not None,
        HAS_WEIGHTS=weights_TK is not None,
        BLOCK_D=DOWN[0],
        BLOCK_F=DOWN[1],
        num_warps=DOWN[2],
        num_stages=DOWN[3],
    )
    return y_TD
