"""Triton kernels of the row plans: a stable counting sort, the gather, and the weighted gather-and-sum.

Shapes: T tokens, D model, E experts, K choices, R routed rows, A = T * K assignments, B blocks of assignments.
No kernel adds floats atomically, and nothing is read back by the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import jit, on_device, tl, triton

_BLOCK_A = 128


@jit
def _rank_kernel(ids_A, rank_A, load_EB, assignments, blocks, E, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """The place of every assignment among those of its block and expert, and the block's load of every expert."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    step_A = tl.arange(0, BLOCK)
    id_A = tl.load(ids_A + start + step_A, mask=start + step_A < assignments, other=-1)
    chosen_A = (id_A >= 0) & (id_A < E)
    narrow_A = tl.where(chosen_A, id_A, -1).to(tl.int32)
    before_A = tl.zeros((BLOCK,), tl.int32)
    total_A = tl.zeros((BLOCK,), tl.int32)
    for chunk in range(0, BLOCK, CHUNK):  # the same ids once more, a few at a time, to keep the table in registers
        step_J = chunk + tl.arange(0, CHUNK)
        id_J = tl.load(ids_A + start + step_J, mask=start + step_J < assignments, other=-1).to(tl.int32)
        same_AJ = narrow_A[:, None] == id_J[None, :]
        total_A += tl.sum(same_AJ.to(tl.int32), 1)
        before_A += tl.sum((same_AJ & (step_J[None, :] < step_A[:, None])).to(tl.int32), 1)
    tl.store(rank_A + start + step_A, before_A.to(tl.int64), mask=start + step_A < assignments)
    # One assignment speaks for its expert: the last of them in this block.
    speaks_A = chosen_A & (before_A == total_A - 1)
    tl.store(load_EB + id_A * blocks + tl.program_id(0), total_A, mask=speaks_A)


@jit
def _place_kernel(
    ids_A,
    slot_A,
    source_R,
    first_EB,
    assignments,
    blocks,
    E,
    capacity,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Turns ranks (in `slot_A`) into rows. `first_EB` counts what precedes a block's part of an expert."""
    block = tl.program_id(0).to(tl.int64)
    at_A = block * BLOCK + tl.arange(0, BLOCK)
    id_A = tl.load(ids_A + at_A, mask=at_A < assignments, other=-1)
    placed_A = (id_A >= 0) & (id_A < E)
    rank_A = tl.load(slot_A + at_A, mask=placed_A, other=0)
    row_A = rank_A + tl.load(first_EB + id_A * blocks + block, mask=placed_A, other=0)
    if SLOTS:
        row_A -= tl.load(first_EB + id_A * blocks, mask=placed_A, other=0)
        placed_A = placed_A & (row_A < capacity)
        row_A += id_A * capacity
    tl.store(source_R + row_A, at_A, mask=placed_A)
    tl.store(slot_A + at_A, tl.where(placed_A, row_A, -1), mask=at_A < assignments)


@jit
def _permute_kernel(
    x_TD, source_R, x_RD, rows, D: tl.constexpr, K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    row_R = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    at_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    source = tl.load(source_R + row_R, mask=row_R < rows, other=-1)
    inside_RD = (row_R < rows)[:, None] & (at_D < D)[None, :]
    token_R = tl.maximum(source, 0) // K
    x = tl.load(x_TD + token_R[:, None] * D + at_D[None, :], mask=inside_RD & (source >= 0)[:, None], other=0.0)
    tl.store(x_RD + row_R[:, None] * D + at_D[None, :], x, mask=inside_RD)


@jit
def _unpermute_kernel(
    y_RD,
    slot_TK,
    weights_TK,
    y_TD,
    tokens,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    at_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    sum_TD = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for k in tl.static_range(K):  # unrolled, so that the choices' loads overlap
        slot_T = tl.load(slot_TK + token_T * K + k, mask=token_T < tokens, other=-1)
        mask_TD = (slot_T >= 0)[:, None] & (at_D < D)[None, :]
        y = tl.load(y_RD + slot_T[:, None] * D + at_D[None, :], mask=mask_TD, other=0.0).to(tl.float32)
        if weights_TK is not None:
            y *= tl.load(weights_TK + token_T * K + k, mask=slot_T >= 0, other=0.0)[:, None]
        sum_TD += y
    mask_TD = (token_T < tokens)[:, None] & (at_D < D)[None, :]
    tl.store(y_TD + token_T[:, None] * D + at_D[None, :], sum_TD.to(y_TD.dtype.element_ty), mask=mask_TD)


@jit
def _unpermute_backward_kernel(
    dy_TD,
    y_RD,
    source_R,
    weights_TK,
    dy_RD,
    dweights_TK,
    rows,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A row serves one (token, choice): both gradients are written once, by the row's program."""
    row_R = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    source = tl.load(source_R + row_R, mask=row_R < rows, other=-1)
    used_R = source >= 0
    token_R = tl.maximum(source, 0) // K
    weight_R = tl.load(weights_TK + source, mask=used_R, other=0.0)
    dot_RD = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        at_D = start + tl.arange(0, BLOCK_D)
        mask_RD = used_R[:, None] & (at_D < D)[None, :]
        here_RD = row_R[:, None] * D + at_D[None, :]
        dy = tl.load(dy_TD + token_R[:, None] * D + at_D[None, :], mask=mask_RD, other=0.0).to(tl.float32)
        dot_RD += dy * tl.load(y_RD + here_RD, mask=mask_RD, other=0.0).to(tl.float32)
        inside_RD = (row_R < rows)[:, None] & (at_D < D)[None, :]
        tl.store(dy_RD + here_RD, (dy * weight_R[:, None]).to(dy_RD.dtype.element_ty), mask=inside_RD)
    tl.store(dweights_TK + source, tl.sum(dot_RD, 1), mask=used_R)


def _blocks(width: int) -> tuple[int, int]:
    """(rows, columns) of a tile: 2048 elements give a thread several loads in flight and spill no register."""
    columns = min(triton.next_power_of_2(width), 1024)
    return max(1, min(64, 2048 // columns)), columns


@on_device
def plan_triton(ids_TK: Tensor, num_experts: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """(source, slot, counts) of `plan_rows` (capacity -1) or `plan_slots`: a counting sort over blocks of ids."""
    ids_A = ids_TK.contiguous().view(-1)
    assignments, blocks = len(ids_A), triton.cdiv(len(ids_A), _BLOCK_A)
    slots = capacity >= 0
    source_R = ids_A.new_full((num_experts * capacity if slots else assignments,), -1)
    slot_A = torch.empty_like(ids_A)
    load_EB = ids_A.new_zeros((num_experts, blocks), dtype=torch.int32)
    if blocks:
        _rank_kernel[(blocks,)](ids_A, slot_A, load_EB, assignments, blocks, num_experts, BLOCK=_BLOCK_A, CHUNK=32)
        # Summed expert by expert, block by block: the order of the rows.
        first_EB = load_EB.view(-1).cumsum(0) - load_EB.view(-1)
        _place_kernel[(blocks,)](
            ids_A,
            slot_A,
            source_R,
            first_EB,
            assignments,
            blocks,
            num_experts,
            capacity,
            SLOTS=slots,
            BLOCK=_BLOCK_A,
        )
    counts_E = ids_A.new_full((num_experts,), capacity) if slots else load_EB.sum(1)
    return source_R, slot_A.view(ids_TK.shape), counts_E


@on_device
def permute_triton(x_TD: Tensor, source_R: Tensor, slot_TK: Tensor) -> Tensor:
    """`permute` by one kernel."""
    rows, width = source_R.shape[0], x_TD.shape[1]
    x_RD = x_TD.new_empty((rows, width))
    if x_RD.numel():
        block_r, block_d = _blocks(width)
        grid = (triton.cdiv(rows, block_r), triton.cdiv(width, block_d))
        shape = {"D": width, "K": slot_TK.shape[1], "BLOCK_R": block_r, "BLOCK_D": block_d}
        _permute_kernel[grid](x_TD.contiguous(), source_R.contiguous(), x_RD, rows, **shape)
    return x_RD


@on_device
def unpermute_triton(y_RD: Tensor, slot_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """`unpermute` by one kernel."""
    (tokens, choices), width = slot_TK.shape, y_RD.shape[1]
    y_TD = y_RD.new_empty((tokens, width))
    if y_TD.numel():
        block_t, block_d = _blocks(width)
        grid = (triton.cdiv(tokens, block_t), triton.cdiv(width, block_d))
        shape = {"D": width, "K": choices, "BLOCK_T": block_t, "BLOCK_D": block_d}
        weights_TK = None if weights_TK is None else weights_TK.contiguous()
        _unpermute_kernel[grid](y_RD.contiguous(), slot_TK.contiguous(), weights_TK, y_TD, tokens, **shape)
    return y_TD


@on_device
def unpermute_backward_triton(
    dy_TD: Tensor, y_RD: Tensor, source_R: Tensor, slot_TK: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of a weighted `unpermute` to its rows and its weights, in one pass over the rows."""
    rows, width = y_RD.shape
    dy_RD = torch.empty_like(y_RD, memory_format=torch.contiguous_format)
    dweights_TK = torch.zeros_like(weights_TK, memory_format=torch.contiguous_format)
    if dy_RD.numel():
        block_r, block_d = _blocks(width)
        shape = {"D": width, "K": slot_TK.shape[1], "BLOCK_R": block_r, "BLOCK_D": block_d}
        _unpermute_backward_kernel[(triton.cdiv(rows, block_r),)](
            dy_TD.contiguous(),
            y_RD.contiguous(),
            source_R.contiguous(),
            weights_TK.contiguous(),
            dy_RD,
            dweights_TK,
            rows,
            **shape,
        )
    return dy_RD, dweights_TK
