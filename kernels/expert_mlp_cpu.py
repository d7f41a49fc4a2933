"""`expert_mlp` on CPU: a loop over the experts, every product written in place, nothing kept but z.

Shapes: T tokens, D model, E experts, K choices, R routed rows, S rows of one expert, F expert hidden,
N = 2F (swiglu) or F (gelu).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu_gemm import empty, matmul


class _Rows:
    """The plan as this file reads it: token and validity of each row, and the span of every expert that has rows."""

    def __init__(self, source_R: Tensor, slot_TK: Tensor, counts_E: Tensor) -> None:
        self.counts = counts_E.tolist()
        self.used = sum(self.counts)
        self.most = max(self.counts, default=0)
        self.slot_TK = slot_TK
        self.source_R = source_R[: self.used]
        self.token_R = self.source_R.clamp(min=0) // slot_TK.shape[1]
        empty_R = self.source_R < 0
        self.empty_R = empty_R if bool(empty_R.any()) else None

    def spans(self) -> Iterator[tuple[int, int, int]]:
        first = 0
        for e, count in enumerate(self.counts):
            if count:
                yield e, first, first + count
            first += count

    def gather(self, x_TD: Tensor, first: int, last: int, out_SD: Tensor) -> Tensor:
        """The token of each row; zeros for an empty row, so that it adds nothing to any gradient."""
        torch.index_select(x_TD, 0, self.token_R[first:last], out=out_SD)
        if self.empty_R is not None:
            out_SD.masked_fill_(self.empty_R[first:last, None], 0)
        return out_SD

    def combine(self, y_RD: Tensor, weights_TK: Tensor | None) -> Tensor:
        """sum_k w_tk * y[slot_tk] in the order of k; dropped choices are left out, not multiplied by zero."""
        slot_A, offsets_T = self.slot_TK.flatten(), None
        here_TK = self.slot_TK >= 0
        if weights_TK is not None:
            weights_TK = weights_TK.to(y_RD.dtype)
        if not bool(here_TK.all()):
            offsets_T = here_TK.sum(1).cumsum(0) - here_TK.sum(1)
            slot_A = self.slot_TK[here_TK]
            weights_A = None if weights_TK is None else weights_TK[here_TK]
            return F.embedding_bag(slot_A, y_RD, offsets_T, mode="sum", per_sample_weights=weights_A)
        return F.embedding_bag(self.slot_TK, y_RD, mode="sum", per_sample_weights=weights_TK)

    def weights(self, weights_TK: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Each row's combine weight as a column."""
        if weights_TK is None:
            return None
        return weights_TK.flatten()[self.source_R.clamp(min=0)].to(dtype)[:, None]


def _activate(z_SN: Tensor, activation: str, out_SF: Tensor) -> Tensor:
    if activation == "gelu":
        return torch.ops.aten.gelu.out(z_SN, approximate="tanh", out=out_SF)
    gate_SF, up_SF = z_SN.chunk(2, 1)
    torch.ops.aten.silu.out(gate_SF, out=out_SF)
    return out_SF.mul_(up_SF)


def _activate_backward(da_SF: Tensor, z_SN: Tensor, activation: str, silu_SF: Tensor, dz_SN: Tensor) -> None:
    """dz from da. `silu_SF` holds silu(gate) and is lost, as is `da_SF`."""
    if activation == "gelu":
        torch.ops.aten.gelu_backward.grad_input(da_SF, z_SN, approximate="tanh", grad_input=dz_SN)
        return
    gate_SF, up_SF = z_SN.chunk(2, 1)
    dgate_SF, dup_SF = dz_SN.chunk(2, 1)
    torch.mul(da_SF, silu_SF, out=dup_SF)
    torch.ops.aten.silu_backward.grad_input(da_SF.mul_(up_SF), gate_SF, grad_input=dgate_SF)


def forward(
    x_TD: Tensor,
    source_R: Tensor,
    slot_TK: Tensor,
    counts_E: Tensor,
    w_in_END: Tensor,
    w_out_EDF: Tensor,
    weights_TK: Tensor | None,
    b_in_EN: Tensor | None,
    b_out_ED: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """(y_TD, z_RN): see `expert_mlp`. Rows of z past the last expert's are zero."""
    rows = _Rows(source_R, slot_TK, counts_E)
    dim, dtype, hidden = x_TD.shape[1], x_TD.dtype, w_out_EDF.shape[2]
    z_RN = empty((len(source_R), w_in_END.shape[1]), dtype)
    z_RN[rows.used :].zero_()
    y_RD = empty((rows.used, dim), dtype)
    x_MD, a_MF = empty((rows.most, dim), dtype), empty((rows.most, hidden), dtype)
    for e, first, last in rows.spans():
        x_SD, a_SF = rows.gather(x_TD, first, last, x_MD[: last - first]), a_MF[: last - first]
        z_SN, y_SD = z_RN[first:last], y_RD[first:last]
        matmul(x_SD, w_in_END[e].t(), z_SN)
        if b_in_EN is not None:
            z_SN += b_in_EN[e]
        matmul(_activate(z_SN, activation, a_SF), w_out_EDF[e].t(), y_SD)
        if b_out_ED is not None:
            y_SD += b_out_ED[e]
    return rows.combine(y_RD, weights_TK), z_RN


def backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    z_RN: Tensor,
    source_R: Tensor,
    slot_TK: Tensor,
    counts_E: Tensor,
    w_in_END: Tensor,
    w_out_EDF: Tensor,
    weights_TK: Tensor | None,
    b_in_EN: Tensor | None,
    b_out_ED: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(dx_TD, dw_in, dw_out, dweights_TK, db_in, db_out); None where the operand is None."""
    rows = _Rows(source_R, slot_TK, counts_E)
    dtype, (_, dim, hidden) = x_TD.dtype, w_out_EDF.shape
    w_R1 = rows.weights(weights_TK, dtype)
    dw_in, dw_out = empty(tuple(w_in_END.shape), dtype), empty(tuple(w_out_EDF.shape), dtype)
    db_in = None if b_in_EN is None else torch.zeros_like(b_in_EN)
    db_out = None if b_out_ED is None else torch.zeros_like(b_out_ED)
    dx_RD, dweights_R = empty((rows.used, dim), dtype), torch.zeros(rows.used)
    scratch = [empty((rows.most, width), dtype) for width in (dim, dim, hidden, hidden, hidden, w_in_END.shape[1])]
    for e, count in enumerate(rows.counts):
        if not count:
            dw_in[e].zero_()
            dw_out[e].zero_()
    for e, first, last in rows.spans():
        x_SD, dy_SD, da_SF, s_SF, a_SF, dz_SN = (buffer[: last - first] for buffer in scratch)
        z_SN = z_RN[first:last]
        rows.gather(x_TD, first, last, x_SD)
        rows.gather(dy_TD, first, last, dy_SD)
        matmul(dy_SD, w_out_EDF[e], da_SF)
        if activation == "gelu":
            _activate(z_SN, activation, a_SF)
        else:
            torch.ops.aten.silu.out(z_SN[:, :hidden], out=s_SF)
            torch.mul(s_SF, z_SN[:, hidden:], out=a_SF)
        if w_R1 is not None:
            torch.mul(da_SF, a_SF, out=dz_SN[:, :hidden])
            torch.sum(dz_SN[:, :hidden], 1, dtype=torch.float32, out=dweights_R[first:last])
            if b_out_ED is not None:
                dweights_R[first:last] += dy_SD @ b_out_ED[e]
            da_SF *= w_R1[first:last]
            dy_SD *= w_R1[first:last]
        _activate_backward(da_SF, z_SN, activation, s_SF, dz_SN)
        matmul(dy_SD.t(), a_SF, dw_out[e])
        matmul(dz_SN.t(), x_SD, dw_in[e])
        matmul(dz_SN, w_in_END[e], dx_RD[first:last])
        if db_in is not None:
            torch.sum(dz_SN, 0, out=db_in[e])
        if db_out is not None:
            torch.sum(dy_SD, 0, out=db_out[e])
    dweights_TK = None
    if weights_TK is not None:
        dweights_A = torch.zeros(slot_TK.numel())
        here_R = torch.arange(rows.used) if rows.empty_R is None else (~rows.empty_R).nonzero()[:, 0]
        dweights_A[rows.source_R[here_R]] = dweights_R[here_R]
        dweights_TK = dweights_A.view(slot_TK.shape).to(weights_TK.dtype)
    return rows.combine(dx_RD, None), dw_in, dw_out, dweights_TK, db_in, db_out
