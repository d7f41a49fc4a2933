"""Sums that the experts' gradients need, without atomics and in a fixed order: of a choice, of an expert's rows.

Shapes: T tokens, D model, E experts, K choices, R routed rows, P partial sums of a row, C columns, V expert lanes.
"""
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import torch
from torch import Tensor

from .backend import jit, on_device, tl
from .grouped_gemm_triton import INTERPRETED, at, expert_span, lanes, live_sources


@jit
def _choices_kernel(
    parts_ptr,
    slot_ptr,
    dy_ptr,
    bias_ptr,
    counts_ptr,
    out_ptr,
    tokens,
    D: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    t_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    lanes_V = tl.arange(0, V)
    ends_V = tl.cumsum(tl.load(counts_ptr + lanes_V, mask=lanes_V < E, other=0))
    p_P = tl.arange(0, BLOCK_P)
    for k in range(K):
        slot_T = tl.load(slot_ptr + t_T * K + k, mask=t_T < tokens, other=-1)
        live_T = slot_T >= 0
        parts_TP = parts_ptr + slot_T[:, None] * P + p_P[None, :]
        sum_T = tl.sum(tl.load(parts_TP, mask=live_T[:, None] & (p_P < P)[None, :], other=0.0), axis=1)
        if HAS_BIAS:
            expert_T = tl.sum((ends_V[None, :] <= slot_T[:, None]).to(tl.int64), axis=1)
            for d in range(0, D, BLOCK_D):
                d_D = d + tl.arange(0, BLOCK_D)
                mask_TD = live_T[:, None] & (d_D < D)[None, :]
                dy_TD = tl.load(dy_ptr + t_T[:, None].to(tl.int64) * D + d_D[None, :], mask=mask_TD, other=0.0)
                bias_TD = tl.load(bias_ptr + expert_T[:, None] * D + d_D[None, :], mask=mask_TD, other=0.0)
                sum_T += tl.sum(dy_TD.to(tl.float32) * bias_TD.to(tl.float32), axis=1)
        tl.store(out_ptr + t_T * K + k, sum_T, mask=t_T < tokens)


@jit
def _columns_kernel(
    values_ptr,
    source_ptr,
    weights_ptr,
    counts_ptr,
    out_ptr,
    C: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    GATHER: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    expert = tl.program_id(0)
    c_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    lanes_V = tl.arange(0, V)
    first, count = expert_span(expert, tl.load(counts_ptr + lanes_V, mask=lanes_V < E, other=0), V)
    acc_RC = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, count, BLOCK_R):
        rows_R = start + tl.arange(0, BLOCK_R)
        source_R, live_R = live_sources(source_ptr + first, rows_R, rows_R < count)
        at_R = source_R // K if GATHER else first + rows_R
        mask_RC = live_R[:, None] & (c_C < C)[None, :]
        value_RC = tl.load(values_ptr + at_R[:, None] * C + c_C[None, :], mask=mask_RC, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            value_RC *= tl.load(weights_ptr + source_R, mask=live_R, other=0.0)[:, None]
        acc_RC += value_RC
    tl.store(at(out_ptr, expert, C) + c_C, tl.sum(acc_RC, axis=0).to(out_ptr.dtype.element_ty), mask=c_C < C)


@on_device
def choice_sums(parts_RP: Tensor, slot_TK: Tensor, dy_TD: Tensor, counts_E: Tensor, bias_ED: Tensor | None) -> Tensor:
    """(T, K) fp32: the sum of a choice's partial sums, and <dy_t, b_e> with a bias; 0 for a dropped choice."""
    tokens, choices = slot_TK.shape
    out_TK = torch.empty(tokens, choices, dtype=torch.float32, device=dy_TD.device)
    parts = parts_RP.shape[1]
    if out_TK.numel():
        _choices_kernel[(-(-tokens // 16),)](
            parts_RP,
            slot_TK.contiguous(),
            dy_TD.contiguous(),
            None if bias_ED is None else bias_ED.contiguous(),
            counts_E.contiguous(),
            out_TK,
            tokens,
            D=dy_TD.shape[1],
            E=counts_E.shape[0],
            K=choices,
            P=parts,
            HAS_BIAS=bias_ED is not None,
            V=lanes(counts_E.shape[0]),
            BLOCK_T=16,
            BLOCK_D=16 if INTERPRETED else 128,
            BLOCK_P=1 << (parts - 1).bit_length(),
        )
    return out_TK


@on_device
def column_sums(
    values: Tensor,
    source_R: Tensor,
    counts_E: Tensor,
    dtype: torch.dtype,
    *,
    choices: int,
    gather: bool,
    weights_TK: Tensor | None = None,
) -> Tensor:
    """(E, C): the sum of each expert's rows, or with `gather` of their tokens, by weight; -1 rows left out."""
    experts, width = counts_E.shape[0], values.shape[1]
    out_EC = torch.empty(experts, width, dtype=dtype, device=values.device)
    block = 16 if INTERPRETED else 64
    if out_EC.numel():
        _columns_kernel[(experts, -(-width // block))](
            values.contiguous(),
            source_R.contiguous(),
            None if weights_TK is None else weights_TK.contiguous(),
            counts_E.contiguous(),
            out_EC,
            C=width,
            E=experts,
            K=choices,
            GATHER=gather,
            HAS_WEIGHTS=weights_TK is not None,
            V=lanes(experts),
            BLOCK_R=block,
            BLOCK_C=block,
        )
    return out_EC
