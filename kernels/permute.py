"""Token rows into expert order and back: stable plans, a gather in, a weighted gather-and-sum out.

Shapes: T tokens, D model, E experts, K choices, R routed rows, A = T * K assignments.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import choose
from .permute_triton import permute_triton, plan_triton, unpermute_backward_triton, unpermute_triton


class Plan(NamedTuple):
    """Where every (token, choice) goes. All int64.

    source_R: t * K + k of the assignment in row r, -1 for an empty row.
    slot_TK: the row of assignment (t, k), -1 when it has none.
    counts_E: rows per expert; the rows of an expert are contiguous, experts ascending.
    """

    source_R: Tensor
    slot_TK: Tensor
    counts_E: Tensor


def plan_rows(ids_TK: Tensor, num_experts: int) -> Plan:
    """Orders the assignments by expert, stable in t * K + k, without capacity.

    R = T * K whatever the ids: an id of -1 has no row, and as many empty rows close the plan, outside counts_E.

    Raises:
        ValueError: on CPU, an id is not an expert's; on CUDA, where looking would wait, it gets no row.
    """
    if choose(ids_TK) == "reference":
        return plan_rows_reference(ids_TK, num_experts)
    return Plan(*_plan(ids_TK, num_experts, -1))


def plan_slots(ids_TK: Tensor, num_experts: int, capacity: int) -> Plan:
    """Gives expert e the rows e * capacity to (e + 1) * capacity, filled in the order t * K + k.

    R = E * capacity; counts_E is the capacity for each, empty rows included. Ids beyond the capacity should be -1
    already; those that are not get no row.

    Raises:
        ValueError: as `plan_rows`.
    """
    if capacity < 0:
        raise ValueError(f"capacity {capacity} is negative")
    if choose(ids_TK) == "reference":
        return plan_slots_reference(ids_TK, num_experts, capacity)
    return Plan(*_plan(ids_TK, num_experts, capacity))


def permute(x_TD: Tensor, plan: Plan) -> Tensor:
    """Copies (T, D) token rows into the plan's (R, D) order; empty rows are zero.

    Its gradient sums over a token's slots in the order of k, so that it is the same in every run.
    """
    _check("permute", x_TD, plan.slot_TK.shape[0], "tokens")
    if choose(x_TD) == "reference":
        return permute_reference(x_TD, plan)
    return _permute(x_TD, plan.source_R, plan.slot_TK)


def unpermute(y_RD: Tensor, plan: Plan, weights_TK: Tensor | None = None) -> Tensor:
    """y_t = sum_k w_tk * y[slot_tk], (R, D) to (T, D), in fp32 and in the order of k.

    Args:
        weights_TK: (T, K) fp32; None means ones. The weight of an assignment without a row counts for nothing.
    """
    _check("unpermute", y_RD, plan.source_R.shape[0], "rows")
    if weights_TK is not None and weights_TK.shape != plan.slot_TK.shape:
        raise ValueError(f"weights of shape {tuple(weights_TK.shape)} are not {tuple(plan.slot_TK.shape)}")
    if choose(y_RD) == "reference":
        return unpermute_reference(y_RD, plan, weights_TK)
    weights_TK = None if weights_TK is None else weights_TK.float()
    return _unpermute(y_RD, plan.source_R, plan.slot_TK, weights_TK)


def plan_rows_reference(ids_TK: Tensor, num_experts: int) -> Plan:
    """`plan_rows` in plain torch."""
    ids_A = ids_TK.flatten()
    order_R = torch.where(ids_A < 0, num_experts, ids_A).argsort(stable=True)
    slot_A = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(ids_A), device=ids_A.device))
    return Plan(
        torch.where(ids_A[order_R] < 0, -1, order_R),
        torch.where(ids_A < 0, -1, slot_A).view(ids_TK.shape),
        (ids_A[:, None] == torch.arange(num_experts, device=ids_A.device)).sum(0),
    )


def plan_slots_reference(ids_TK: Tensor, num_experts: int, capacity: int) -> Plan:
    """`plan_slots` in plain torch."""
    ids_A = ids_TK.flatten()
    chosen_AE = (ids_A[:, None] == torch.arange(num_experts, device=ids_A.device)).long()
    rank_A = ((chosen_AE.cumsum(0) - 1) * chosen_AE).sum(1)
    slot_A = torch.where((ids_A < 0) | (rank_A >= capacity), -1, ids_A * capacity + rank_A)
    rows = num_experts * capacity
    source_R = torch.full((rows + 1,), -1, dtype=torch.int64, device=ids_A.device)
    source_R.scatter_(0, torch.where(slot_A < 0, rows, slot_A), torch.arange(len(ids_A), device=ids_A.device))
    source_R[rows] = -1
    counts_E = torch.full((num_experts,), capacity, dtype=torch.int64, device=ids_A.device)
    return Plan(source_R[:rows].clone(), slot_A.view(ids_TK.shape), counts_E)


def permute_reference(x_TD: Tensor, plan: Plan) -> Tensor:
    """`permute` in plain torch, differentiated by autograd."""
    # -1 // K is -1: what is empty reads the row of zeros at the end.
    return F.pad(x_TD, (0, 0, 0, 1))[plan.source_R // plan.slot_TK.shape[1]]


def unpermute_reference(y_RD: Tensor, plan: Plan, weights_TK: Tensor | None = None) -> Tensor:
    """`unpermute` in plain torch, differentiated by autograd."""
    y_TKD = F.pad(y_RD, (0, 0, 0, 1))[plan.slot_TK].float()
    if weights_TK is not None:
        y_TKD = y_TKD * weights_TK[..., None].float()
    return y_TKD.sum(1).to(y_RD.dtype)


def _check(name: str, tensor: Tensor, rows: int, what: str) -> None:
    if tensor.dim() != 2 or tensor.shape[0] != rows:
        raise ValueError(f"{name} takes {rows} {what}, as the plan has, not a tensor of shape {tuple(tensor.shape)}")


@torch.library.custom_op("coterie::plan", mutates_args=())
def _plan(ids_TK: Tensor, num_experts: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    if choose(ids_TK) == "triton":
        return plan_triton(ids_TK, num_experts, capacity)
    if ids_TK.is_cpu:
        return _plan_cpu(ids_TK, num_experts, capacity)
    plan = plan_rows_reference(ids_TK, num_experts)
    if capacity >= 0:
        plan = plan_slots_reference(ids_TK, num_experts, capacity)
    return plan.source_R, plan.slot_TK, plan.counts_E


@_plan.register_fake
def _(ids_TK, num_experts, capacity):
    rows = ids_TK.numel() if capacity < 0 else num_experts * capacity
    shapes = (rows,), ids_TK.shape, (num_experts,)
    return tuple(ids_TK.new_empty(shape, dtype=torch.int64) for shape in shapes)


def _plan_cpu(ids_TK: Tensor, num_experts: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    ids_A = ids_TK.numpy().reshape(-1)
    if ids_A.size and (ids_A.max() >= num_experts or ids_A.min() < -1):
        raise ValueError(f"expert ids from {ids_A.min()} to {ids_A.max()} do not fit {num_experts} experts")
    # NumPy sorts small unsigned types by radix, over ten times faster than int64; -1 wraps to their largest value.
    narrow = np.uint8 if num_experts <= 255 else np.uint16 if num_experts <= 65535 else np.uint64
    order_R = ids_A.astype(narrow).argsort(kind="stable")
    counts_E = np.bincount(ids_A[ids_A >= 0] if ids_A.size else ids_A, minlength=num_experts)
    order_R = order_R[: counts_E.sum()]
    if capacity < 0:
        source_R, row_R = np.full(ids_A.size, -1), np.arange(len(order_R))
        source_R[: len(order_R)] = order_R
    else:
        first_E = counts_E.cumsum() - counts_E
        rank_R = np.arange(len(order_R)) - np.repeat(first_E, counts_E)
        fits_R = rank_R < capacity
        order_R = order_R[fits_R]
        row_R = ids_A[order_R] * capacity + rank_R[fits_R]
        source_R = np.full(num_experts * capacity, -1)
        source_R[row_R] = order_R
        counts_E = np.full(num_experts, capacity)
    slot_A = np.full(ids_A.size, -1)
    slot_A[order_R] = row_R
    return torch.from_numpy(source_R), torch.from_numpy(slot_A).view(ids_TK.shape), torch.from_numpy(counts_E)


@torch.library.custom_op("coterie::permute", mutates_args=())
def _permute(x_TD: Tensor, source_R: Tensor, slot_TK: Tensor) -> Tensor:
    if choose(x_TD) == "triton":
        return permute_triton(x_TD, source_R, slot_TK)
    if not x_TD.is_cpu:
        return permute_reference(x_TD, Plan(source_R, slot_TK, source_R))
    if x_TD.shape[0] == 0:
        return x_TD.new_zeros((source_R.shape[0], x_TD.shape[1]))
    x_RD = x_TD.index_select(0, source_R.clamp(min=0) // slot_TK.shape[1])
    return x_RD.index_fill_(0, (source_R < 0).nonzero()[:, 0], 0)


@_permute.register_fake
def _(x_TD, source_R, slot_TK):
    return x_TD.new_empty((source_R.shape[0], x_TD.shape[1]))


@torch.library.custom_op("coterie::unpermute", mutates_args=())
def _unpermute(y_RD: Tensor, source_R: Tensor, slot_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    if choose(y_RD) == "triton":
        return unpermute_triton(y_RD, slot_TK, weights_TK)
    if not y_RD.is_cpu:
        return unpermute_reference(y_RD, Plan(source_R, slot_TK, source_R), weights_TK)
    here_TK = slot_TK >= 0
    bags = {"mode": "sum", "per_sample_weights": weights_TK}
    if here_TK.all():
        indices = slot_TK
    else:
        kept_T = here_TK.sum(1)
        indices = slot_TK[here_TK]
        bags["offsets"] = kept_T.cumsum(0) - kept_T
        bags["per_sample_weights"] = None if weights_TK is None else weights_TK[here_TK]
    if indices.numel() == 0:
        return y_RD.new_zeros((slot_TK.shape[0], y_RD.shape[1]))
    # A bag of embeddings is exactly this sum, and torch has it as one pass in the order of k.
    return F.embedding_bag(indices, y_RD.float().contiguous(), **bags).to(y_RD.dtype)


@_unpermute.register_fake
def _(y_RD, source_R, slot_TK, weights_TK):
    return y_RD.new_empty((slot_TK.shape[0], y_RD.shape[1]))


@torch.library.custom_op("coterie::unpermute_backward", mutates_args=())
def _unpermute_backward(
    dy_TD: Tensor, y_RD: Tensor, source_R: Tensor, slot_TK: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    if choose(y_RD) == "triton":
        return unpermute_backward_triton(dy_TD, y_RD, source_R, slot_TK, weights_TK)
    if not slot_TK.numel() or not len(source_R):
        return y_RD.new_zeros(y_RD.shape), weights_TK.new_zeros(weights_TK.shape)
    dy_RD, dw_R = y_RD.new_empty(y_RD.shape), weights_TK.new_empty(source_R.shape)
    empty_R = source_R < 0
    token_R = source_R.clamp(min=0) // slot_TK.shape[1]
    w_R1 = weights_TK.flatten().index_select(0, source_R.clamp(min=0)).masked_fill_(empty_R, 0)[:, None]
    step = max(1, 2**17 // max(1, y_RD.shape[1]))  # blocks that stay in the cache between the three passes
    for first in range(0, len(source_R), step):
        block = slice(first, first + step)
        dy_BD = dy_TD.index_select(0, token_R[block]).masked_fill_(empty_R[block, None], 0).float()
        torch.linalg.vecdot(dy_BD, y_RD[block].float(), out=dw_R[block])
        torch.mul(dy_BD, w_R1[block], out=dy_RD[block])
    return dy_RD, dw_R[slot_TK.clamp(min=0)].masked_fill_(slot_TK < 0, 0)


@_unpermute_backward.register_fake
def _(dy_TD, y_RD, source_R, slot_TK, weights_TK):
    return y_RD.new_empty(y_RD.shape), weights_TK.new_empty(weights_TK.shape)


def _save_permute(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:])


def _differentiate_permute(ctx, dx_RD):
    source_R, slot_TK = ctx.saved_tensors
    return _unpermute(dx_RD, source_R, slot_TK, None), None, None


def _save_unpermute(ctx, inputs, output) -> None:
    y_RD, source_R, slot_TK, weights_TK = inputs
    ctx.save_for_backward(None if weights_TK is None else y_RD, source_R, slot_TK, weights_TK)


def _differentiate_unpermute(ctx, dy_TD):
    y_RD, source_R, slot_TK, weights_TK = ctx.saved_tensors
    if weights_TK is None:
        return _permute(dy_TD, source_R, slot_TK), None, None, None
    dy_RD, dw_TK = _unpermute_backward(dy_TD, y_RD, source_R, slot_TK, weights_TK)
    return dy_RD, None, None, dw_TK


_permute.register_autograd(_differentiate_permute, setup_context=_save_permute)
_unpermute.register_autograd(_differentiate_unpermute, setup_context=_save_unpermute)
