"""Token rows into expert order and back: stable plans, a gather in, a weighted gather-and-sum out."""

# Shapes: T tokens, D model, E experts, K choices, R routed rows.

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Plan(NamedTuple):
    """Where every (token, choice) goes. All int64.

    source_R: t * K + k of the assignment in row r, -1 for an empty row.
    slot_TK: the row of assignment (t, k), -1 when it was dropped.
    counts_E: rows per expert; the rows of an expert are contiguous, experts ascending.
    """

    source_R: Tensor
    slot_TK: Tensor
    counts_E: Tensor


def plan_rows(ids_TK: Tensor, num_experts: int) -> Plan:
    """Orders the assignments by expert, stable in t * K + k. R = T * K; empty rows (ids of -1) come last."""
    return plan_rows_reference(ids_TK, num_experts)


def plan_slots(ids_TK: Tensor, num_experts: int, capacity: int) -> Plan:
    """Gives expert e the rows e * capacity to (e + 1) * capacity, filled in the order t * K + k."""
    return plan_slots_reference(ids_TK, num_experts, capacity)


def permute(x_TD: Tensor, plan: Plan) -> Tensor:
    """Copies token rows into the plan's order; empty rows are zero."""
    return permute_reference(x_TD, plan)


def unpermute(y_RD: Tensor, plan: Plan, weights_TK: Tensor | None = None) -> Tensor:
    """y_t = sum_k w_tk * y[slot_tk], in fp32 and in the order of k; weights of None mean ones."""
    return unpermute_reference(y_RD, plan, weights_TK)


def plan_rows_reference(ids_TK: Tensor, num_experts: int) -> Plan:
    """`plan_rows` in plain torch."""
    ids_R = ids_TK.flatten()
    order_R = torch.where(ids_R < 0, num_experts, ids_R).argsort(stable=True)
    slot_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(ids_R), device=ids_R.device))
    counts_E = (ids_R[:, None] == torch.arange(num_experts, device=ids_R.device)).sum(0)
    return Plan(
        torch.where(ids_R[order_R] < 0, -1, order_R),
        torch.where(ids_R < 0, -1, slot_R).view(ids_TK.shape),
        counts_E,
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
    counts_E = torch.full((num_experts,), capacity, dtype=torch.int64, device=ids_A.device)
    return Plan(source_R[:rows].clone(), slot_A.view(ids_TK.shape), counts_E)


def permute_reference(x_TD: Tensor, plan: Plan) -> Tensor:
    """`permute` in plain torch."""
    token_R = plan.source_R.clamp(min=0) // plan.slot_TK.shape[1]
    return x_TD[token_R].masked_fill(plan.source_R[:, None] < 0, 0)


def unpermute_reference(y_RD: Tensor, plan: Plan, weights_TK: Tensor | None = None) -> Tensor:
    """`unpermute` in plain torch."""
    y_TKD = y_RD[plan.slot_TK.clamp(min=0)].float().masked_fill(plan.slot_TK[..., None] < 0, 0)
    if weights_TK is not None:
        y_TKD = y_TKD * weights_TK[..., None].float()
    return y_TKD.sum(1).to(y_RD.dtype)
