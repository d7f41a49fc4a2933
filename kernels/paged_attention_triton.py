"""Attention over a paged cache in Triton: one launch for a step of chunks and decodes, two for long contexts.

Keys are taken in parts of PART at fixed positions, tiles of BLOCK_N inside them, and the parts are merged in order.
One tile shape serves every step. So what a query gets does not depend on chunking, batch mates or which blocks are
used. Where there are few queries, the parts of a long context are computed side by side (Flash-Decoding) and merged
by a second launch; elsewhere one program goes through them.

Shapes: T new tokens, N sequences, H query heads, G key-value heads, d head width, M rows of a tile (tokens x query
heads of one group), P parts.
"""
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backend import jit, on_device, tl, triton
from .grouped_gemm_triton import INTERPRETED

PART = 32 if INTERPRETED else 512
_ROWS = 16 if INTERPRETED else 64  # of a tile: what one tensor-core instruction of Hopper takes
_KEYS = 16 if INTERPRETED else 64
_FEW = 16  # new tokens of the widest sequence, up to which the parts run side by side
_LOG2E = 1.4426950408889634


@jit
def _merge(m_M, l_M, o_Md, part_m_M, part_l_M, part_o_Md):
    """Two partial softmax sums as one; a maximum of -inf stands for nothing seen."""
    new_M = tl.maximum(m_M, part_m_M)
    safe_M = tl.where(new_M == float("-inf"), 0.0, new_M)
    old_M, part_M = tl.exp2(m_M - safe_M), tl.exp2(part_m_M - safe_M)
    return new_M, l_M * old_M + part_l_M * part_M, o_Md * old_M[:, None] + part_o_Md * part_M[:, None]


@jit
def _finish(m_M, l_M, o_Md, sink_M):
    """The softmax's answer; a sink takes part in the sum alone (-inf: there is none)."""
    new_M = tl.maximum(m_M, sink_M)
    old_M = tl.exp2(m_M - new_M)
    return o_Md * (old_M / (l_M * old_M + tl.exp2(sink_M - new_M)))[:, None]


@jit
def _sequence(starts_ptr, place, N, BLOCK_T: tl.constexpr):
    """Whose a tile is, or with BLOCK_T 0 a token. The tiles of sequence n begin at starts[n] // BLOCK_T + n: no sum
    over the sequences before it is needed."""
    low, high = 0, N
    while low < high:
        middle = (low + high) // 2
        start = tl.load(starts_ptr + middle)
        if BLOCK_T:
            start = start // BLOCK_T + middle
        if start <= place:
            low = middle + 1
        else:
            high = middle
    return low - 1


@jit
def _part(
    q_Md,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    table_ptr,
    g,
    pos_M,
    begin,
    end,
    rate,
    G: tl.constexpr,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Maximum, sum and weighted values over keys begin to end, base 2; `begin` is a multiple of BLOCK_N."""
    M: tl.constexpr = q_Md.shape[0]
    d_d = tl.arange(0, BLOCK_D)
    m_M = tl.full((M,), float("-inf"), tl.float32)
    l_M = tl.zeros((M,), tl.float32)
    o_Md = tl.zeros((M, BLOCK_D), tl.float32)
    for first in range(begin, end, BLOCK_N):
        key_N = first + tl.arange(0, BLOCK_N)
        live_N = key_N < end
        block_N = tl.load(table_ptr + key_N // SIZE, mask=live_N, other=0).to(tl.int64)
        row_N = (block_N * SIZE + key_N % SIZE) * G + g
        at_Nd, mask_Nd = row_N[:, None] * D + d_d[None, :], live_N[:, None] & (d_d < D)[None, :]
        k_Nd = tl.load(k_ptr + at_Nd, mask=mask_Nd, other=0.0)
        v_Nd = tl.load(v_ptr + at_Nd, mask=mask_Nd, other=0.0)
        if SCALED:
            k_Nd = k_Nd.to(tl.float32) * tl.load(k_scale_ptr + row_N, mask=live_N, other=0.0)[:, None]
            v_Nd = v_Nd.to(tl.float32) * tl.load(v_scale_ptr + row_N, mask=live_N, other=0.0)[:, None]
        score_MN = tl.dot(q_Md, tl.trans(k_Nd.to(q_Md.dtype)), input_precision="ieee") * rate
        seen_MN = live_N[None, :] & (key_N[None, :] <= pos_M[:, None])
        if WINDOW:
            seen_MN = seen_MN & (key_N[None, :] > pos_M[:, None] - WINDOW)
        score_MN = tl.where(seen_MN, score_MN, float("-inf"))
        new_M = tl.maximum(m_M, tl.max(score_MN, 1))
        safe_M = tl.where(new_M == float("-inf"), 0.0, new_M)
        p_MN, old_M = tl.exp2(score_MN - safe_M[:, None]), tl.exp2(m_M - safe_M)
        l_M = l_M * old_M + tl.sum(p_MN, 1)
        o_Md = tl.dot(p_MN.to(q_Md.dtype), v_Nd.to(q_Md.dtype), o_Md * old_M[:, None], input_precision="ieee")
        m_M = new_M
    return m_M, l_M, o_Md


@jit
def _attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    tables_ptr,
    starts_ptr,
    lengths_ptr,
    sinks_ptr,
    out_ptr,
    parts_ptr,
    sums_ptr,
    T,
    N,
    table_stride,
    rate,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SPLIT: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program a tile of queries and key-value head; under SPLIT also a part, whose sums it leaves behind."""
    tile, g = tl.program_id(0), tl.program_id(1)
    n = _sequence(starts_ptr, tile, N, BLOCK_T)
    start, stop = tl.load(starts_ptr + n), tl.load(starts_ptr + n + 1)
    first = (tile - (start // BLOCK_T + n)) * BLOCK_T
    length = tl.load(lengths_ptr + n)
    earlier = length - (stop - start)
    if first >= stop - start:
        return
    row_M = tl.arange(0, BLOCK_T * BLOCK_H)
    t_M, head_M = first + row_M // BLOCK_H, row_M % BLOCK_H
    live_M = (t_M < stop - start) & (head_M < H // G)
    pos_M = earlier + t_M
    at_M = (start + t_M).to(tl.int64) * H + g * (H // G) + head_M
    d_d = tl.arange(0, BLOCK_D)
    mask_Md = live_M[:, None] & (d_d < D)[None, :]
    q_Md = tl.load(q_ptr + at_M[:, None] * D + d_d[None, :], mask=mask_Md, other=0.0)
    table_ptr = tables_ptr + n.to(tl.int64) * table_stride
    last = tl.minimum(earlier + first + BLOCK_T, length)
    oldest = tl.maximum(earlier + first - WINDOW + 1, 0) if WINDOW else 0
    if SPLIT:
        part = tl.program_id(2)
        if (part * PART >= last) | ((part + 1) * PART <= oldest):
            return
        m_M, l_M, o_Md = _part(
            q_Md, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, g, pos_M, part * PART,
            tl.minimum((part + 1) * PART, last), rate, G, D, SIZE, WINDOW, SCALED, BLOCK_D, BLOCK_N,
        )  # fmt: skip
        row = part * T * H + at_M
        tl.store(parts_ptr + row[:, None] * D + d_d[None, :], o_Md, mask=mask_Md)
        tl.store(sums_ptr + row * 2, m_M, mask=live_M)
        tl.store(sums_ptr + row * 2 + 1, l_M, mask=live_M)
    else:
        m_M = tl.full((BLOCK_T * BLOCK_H,), float("-inf"), tl.float32)
        l_M = tl.zeros((BLOCK_T * BLOCK_H,), tl.float32)
        o_Md = tl.zeros((BLOCK_T * BLOCK_H, BLOCK_D), tl.float32)
        for begin in range(oldest // PART * PART, last, PART):
            part_m_M, part_l_M, part_o_Md = _part(
                q_Md, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, g, pos_M, begin,
                tl.minimum(begin + PART, last), rate, G, D, SIZE, WINDOW, SCALED, BLOCK_D, BLOCK_N,
            )  # fmt: skip
            m_M, l_M, o_Md = _merge(m_M, l_M, o_Md, part_m_M, part_l_M, part_o_Md)
        sink_M = tl.full((BLOCK_T * BLOCK_H,), float("-inf"), tl.float32)
        if HAS_SINKS:
            sink_M = tl.load(sinks_ptr + g * (H // G) + head_M, mask=live_M, other=0.0)
        o_Md = _finish(tl.where(live_M, m_M, 0.0), tl.where(live_M, l_M, 1.0), o_Md, sink_M)
        tl.store(out_ptr + at_M[:, None] * D + d_d[None, :], o_Md.to(out_ptr.dtype.element_ty), mask=mask_Md)


@jit
def _combine_kernel(
    parts_ptr,
    sums_ptr,
    starts_ptr,
    lengths_ptr,
    sinks_ptr,
    out_ptr,
    T,
    N,
    H: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Merges the parts of one token, all its heads, in order."""
    token = tl.program_id(0)
    n = _sequence(starts_ptr, token, N, 0)
    pos = tl.load(lengths_ptr + n) - tl.load(starts_ptr + n + 1) + token
    oldest = tl.maximum(pos - WINDOW + 1, 0) if WINDOW else 0
    h_H, d_d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    live_H = h_H < H
    mask_Hd = live_H[:, None] & (d_d < D)[None, :]
    m_H = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    l_H = tl.zeros((BLOCK_H,), tl.float32)
    o_Hd = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    for part in range(oldest // PART, pos // PART + 1):
        row_H = (part * T + token) * H + h_H.to(tl.int64)
        part_m_H = tl.load(sums_ptr + row_H * 2, mask=live_H, other=0.0)
        part_l_H = tl.load(sums_ptr + row_H * 2 + 1, mask=live_H, other=1.0)
        part_o_Hd = tl.load(parts_ptr + row_H[:, None] * D + d_d[None, :], mask=mask_Hd, other=0.0)
        m_H, l_H, o_Hd = _merge(m_H, l_H, o_Hd, part_m_H, part_l_H, part_o_Hd)
    sink_H = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    if HAS_SINKS:
        sink_H = tl.load(sinks_ptr + h_H, mask=live_H, other=0.0)
    o_Hd = _finish(m_H, l_H, o_Hd, sink_H)
    at_Hd = (token * H + h_H.to(tl.int64))[:, None] * D + d_d[None, :]
    tl.store(out_ptr + at_Hd, o_Hd.to(out_ptr.dtype.element_ty), mask=mask_Hd)


@on_device
def paged_attention_triton(
    q_THd: Tensor, kv: Any, ragged: Any, scale: float, window: int = 0, sinks_H: Tensor | None = None
) -> Tensor:
    """See `paged_attention`: o_THd."""
    (tokens, heads, width), (_, size, groups, _) = q_THd.shape, kv.k.shape
    q_THd, out_THd = q_THd.contiguous(), torch.empty_like(q_THd)
    sequences = len(ragged.lengths_N)
    if not tokens:
        return out_THd
    grouped, wide = triton.next_power_of_2(heads // groups), max(triton.next_power_of_2(width), 16)
    rows = max(_ROWS // grouped, 1)
    split = ragged.widest <= _FEW and ragged.longest > PART
    parts = -(-ragged.longest // PART) if split else 1
    parts_PTHd = q_THd.new_empty((parts, tokens, heads, width) if split else (1,), dtype=torch.float32)
    sums_PTH2 = q_THd.new_empty((parts, tokens, heads, 2) if split else (1,), dtype=torch.float32)
    # exp2 is the faster one: logits are measured in factors of two.
    sinks_H = None if sinks_H is None else sinks_H.float() * _LOG2E
    shape = {"H": heads, "D": width, "WINDOW": window, "HAS_SINKS": sinks_H is not None, "PART": PART}
    step = ragged.starts_N1, ragged.lengths_N, sinks_H, out_THd
    counts = tokens, sequences
    _attention_kernel[(tokens // rows + sequences, groups, parts)](
        *(q_THd, *kv, ragged.tables_NM, *step, parts_PTHd, sums_PTH2, *counts, ragged.tables_NM.stride(0)),
        scale * _LOG2E,
        **shape,
        G=groups,
        SIZE=size,
        SCALED=kv.k_scale is not None,
        SPLIT=split,
        BLOCK_H=grouped,
        BLOCK_T=rows,
        BLOCK_D=wide,
        BLOCK_N=_KEYS,
        num_warps=4,
        num_stages=2,
    )
    if split:
        tile = {"BLOCK_H": triton.next_power_of_2(heads), "BLOCK_D": wide}
        _combine_kernel[(tokens,)](parts_PTHd, sums_PTH2, *step, *counts, **shape, **tile, num_warps=4)
    return out_THd
