"""Expert slicing: neighbouring ranks hold slices of the same experts' width, and share their rows and answers."""

# Shapes: P ranks of a group, L experts of this rank, R rows of it, Q rows of all ranks, T tokens, K choices, D model.

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.permute import Plan, permute, plan_rows, unpermute
from ..parallel.collectives import all_gather_rows
from ..parallel.tensor import gather_rows, scatter_rows
from .dispatch import RunExperts


class Slices:
    """The slices of `group` as one set of experts, behind any dispatch: every rank gets the rows of all, answers with
    its slice's part, and the parts are summed at home, in the order of the ranks."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(self, experts: RunExperts, x_TD: Tensor, plan: Plan, weights_TK: Tensor | None) -> Tensor:
        """y_t = sum_k w_tk * expert(x_t) over the rows of `plan`, as `Experts` on one device. Every rank must call,
        with or without rows. The sizes are read on the host once."""
        counts_PL = all_gather_rows(plan.counts_E, self.group)
        rows_P = counts_PL.sum(1).tolist()
        plan = plan._replace(source_R=plan.source_R[: rows_P[self.group.rank()]])  # empty rows stay at home
        x_QD = gather_rows(permute(x_TD, plan), rows_P, self.group)
        y_QD = experts(x_QD, _by_expert(counts_PL, len(x_QD)), None)
        return unpermute(scatter_rows(y_QD, rows_P, self.group), plan, weights_TK)


def _by_expert(counts_PL: Tensor, rows: int) -> Plan:
    """A plan for rows that lie by (rank, expert)."""
    ranks, experts = counts_PL.shape
    experts_PL = torch.arange(experts, device=counts_PL.device).repeat(ranks)
    ids_Q = experts_PL.repeat_interleave(counts_PL.flatten(), output_size=rows)
    return plan_rows(ids_Q[:, None], experts)
