"""The experts of a MoE layer as one operation: gather, up projection, activation, down projection, weighted sum.

Shapes: T tokens, D model, E experts, K choices, R routed rows, F expert hidden, N = 2F (swiglu) or F (gelu).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .permute import Plan


def _activate(z_RN: Tensor, activation: str) -> Tensor:
    if activation == "swiglu":
        gate_RF, up_RF = z_RN.chunk(2, -1)
        return F.silu(gate_RF) * up_RF
    return F.gelu(z_RN, approximate="tanh")


def expert_mlp_reference(
    x_TD: Tensor,
    plan: Plan,
    w_in_END: Tensor,
    w_out_EDF: Tensor,
    *,
    weights_TK: Tensor | None = None,
    b_in_EN: Tensor | None = None,
    b_out_ED: Tensor | None = None,
    activation: str = "swiglu",
) -> Tensor:
    """`expert_mlp` as a readable loop over the experts, differentiated by autograd; in the operands' own precision."""
    choices = plan.slot_TK.shape[1]
    y_RD = x_TD.new_zeros(plan.source_R.shape[0], x_TD.shape[1])
    first = 0
    for e, count in enumerate(plan.counts_E.tolist()):
        rows = torch.arange(first, first + count, device=x_TD.device)
        rows = rows[plan.source_R[rows] >= 0]
        first += count
        z_RN = x_TD[plan.source_R[rows] // choices] @ w_in_END[e].t()
        z_RN = z_RN if b_in_EN is None else z_RN + b_in_EN[e]
        out_RD = _activate(z_RN, activation) @ w_out_EDF[e].t()
        out_RD = out_RD if b_out_ED is None else out_RD + b_out_ED[e]
        y_RD = y_RD.index_copy(0, rows, out_RD)
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    here_TK = (plan.slot_TK >= 0).to(wide)
    here_TK = here_TK if weights_TK is None else here_TK * weights_TK.to(wide)
    return (y_RD[plan.slot_TK.clamp(min=0)].to(wide) * here_TK[..., None]).sum(1).to(x_TD.dtype)


def expert_mlp(
    x_TD: Tensor,
    plan: Plan,
    w_in_END: Tensor,
    w_out_EDF: Tensor,
    *,
    weights_TK: Tensor | None = None,
    b_in_EN: Tensor | None = None,
    b_out_ED: Tensor | None = None,
    activation: str = "swiglu",
) -> Tensor:
    """Runs every token through its experts and sums what they answer."""
    return expert_mlp_reference(
        x_TD,
        plan,
        w_in_END,
        w_out_EDF,
        weights_TK=weights_TK,
        b_in_EN=b_in_EN,
        b_out_ED=b_out_ED,
        activation=activation,
    )
