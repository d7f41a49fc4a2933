"""`expert_mlp` on CPU: a loop over the experts, every product written in place, nothing kept but z.

Shapes: T tokens, D model, E experts, K choices, R routed rows, S rows of one expert, F expert hidden,
N = 2F (swiglu) or F (gelu).
"""

from __future__ import annotations

from bisect import bisect_left

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu_gemm import empty, matmul

_BLOCK = 256


def bucket(rows: int) -> int:
    """The number of rows to compute for `rows`: at most a sixteenth more, and one of 16 between two powers of two.

    oneDNN compiles a product for every new shape, which takes as long as one to three products of an expert. Routing
    gives new row counts at every step, so without buckets a training step never stops compiling.
    """
    step = 1 << max((rows - 1).bit_length() - 5, 0)
    return -(-rows // step) * step


def saved_rows(rows: int) -> int:
    """Rows of z for R routed rows: the most that `bucket` can make of them."""
    return rows + rows // 16


class Rows:
    """The plan as this file reads it: the token of each row, and blocks of consecutive rows to work on.

    Every expert's rows are filled up to their bucket with empty ones. A block is one expert, or several small ones of
    at most 256 rows together: what is not a product runs once for all of them, while their rows are in the cache.
    """

    def __init__(self, source_R: Tensor, slot_TK: Tensor, counts_E: Tensor) -> None:
        counts: list[int] = counts_E.tolist()
        self.counts = [bucket(count) for count in counts]
        self.used = sum(self.counts)
        self.most = max(_BLOCK, *self.counts) if self.counts else 0
        source_R, self.slot_TK = source_R[: sum(counts)], slot_TK
        if self.used > len(source_R):
            source_R, self.slot_TK = self._fill_up(source_R, slot_TK, counts_E)
        self.source_R = source_R
        self.token_R = source_R.clamp(min=0) // slot_TK.shape[1]
        self.here_R = source_R >= 0
        self.empty = (~self.here_R).nonzero()[:, 0]
        self._empty: list[int] = self.empty.tolist()

    def _fill_up(self, source_R: Tensor, slot_TK: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor]:
        extra_E = torch.tensor(self.counts) - counts_E
        place_R = torch.arange(len(source_R)) + (extra_E.cumsum(0) - extra_E).repeat_interleave(counts_E)
        filled = source_R.new_full((self.used,), -1).index_copy_(0, place_R, source_R)
        return filled, place_R[slot_TK.clamp(min=0)].where(slot_TK >= 0, -1)

    def blocks(self) -> list[tuple[slice, list[tuple[int, slice]]]]:
        """The rows of each block, and its experts with their rows inside the block."""
        blocks: list[tuple[slice, list[tuple[int, slice]]]] = []
        first = last = 0
        for e, count in enumerate(self.counts):
            if not count:
                continue
            if blocks and last + count - first <= _BLOCK:
                parts = blocks[-1][1]
            else:
                first, parts = last, []
                blocks.append((slice(first, last), parts))
            parts.append((e, slice(last - first, last - first + count)))
            last += count
            blocks[-1] = (slice(first, last), parts)
        return blocks

    def gather(self, x_TD: Tensor, block: slice, out_SD: Tensor) -> Tensor:
        """The token of each row; zeros for an empty row, so that it adds nothing to any gradient."""
        torch.index_select(x_TD, 0, self.token_R[block], out=out_SD)
        first, last = bisect_left(self._empty, block.start), bisect_left(self._empty, block.stop)
        if first < last:
            out_SD.index_fill_(0, self.empty[first:last] - block.start, 0)
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
        """Each row's combine weight as a column, zero in an empty row."""
        if weights_TK is None:
            return None
        weights_R = weights_TK.flatten()[self.source_R.clamp(min=0)].to(dtype)
        return weights_R.index_fill_(0, self.empty, 0)[:, None]

    def scatter(self, values_R: Tensor) -> Tensor:
        """Each row's value where its assignment is in (T, K); zero where that was dropped."""
        values_A = values_R.new_zeros(self.slot_TK.numel())
        values_A[self.source_R[self.here_R]] = values_R[self.here_R]
        return values_A.view(self.slot_TK.shape)

    def gradient_like(self, weight_E: Tensor) -> Tensor:
        """Room for the gradient of stacked weights: zero for experts without rows, not yet written for the others."""
        gradient_E = empty(tuple(weight_E.shape), weight_E.dtype)
        for e, count in enumerate(self.counts):
            if not count:
                gradient_E[e].zero_()
        return gradient_E


def activate(z_SN: Tensor, activation: str, out_SF: Tensor, silu_SF: Tensor) -> Tensor:
    """act(z); `silu_SF`, which may be `out_SF`, gets silu(gate)."""
    if activation == "gelu":
        return torch.ops.aten.gelu.out(z_SN, approximate="tanh", out=out_SF)
    gate_SF, up_SF = z_SN.chunk(2, 1)
    torch.ops.aten.silu.out(gate_SF, out=silu_SF)
    return torch.mul(silu_SF, up_SF, out=out_SF)


def _activate_backward(da_SF: Tensor, z_SN: Tensor, activation: str, silu_SF: Tensor, dz_SN: Tensor) -> None:
    """dz from da, which is lost, and silu(gate)."""
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
    """(y_TD, z_RN): see `expert_mlp`; z has `saved_rows`, zero past the last expert's."""
    rows = Rows(source_R, slot_TK, counts_E)
    dim, dtype, hidden = x_TD.shape[1], x_TD.dtype, w_out_EDF.shape[2]
    w_in_EDN, w_out_EFD = w_in_END.transpose(1, 2).unbind(), w_out_EDF.transpose(1, 2).unbind()
    z_RN = empty((saved_rows(len(source_R)), w_in_END.shape[1]), dtype)
    z_RN[rows.used :].zero_()
    y_RD = empty((rows.used, dim), dtype)
    x_MD, a_MF = empty((rows.most, dim), dtype), empty((rows.most, hidden), dtype)
    for block, parts in rows.blocks():
        size = block.stop - block.start
        x_SD, z_SN, y_SD = rows.gather(x_TD, block, x_MD[:size]), z_RN[block], y_RD[block]
        for e, part in parts:
            matmul(x_SD[part], w_in_EDN[e], z_SN[part])
            if b_in_EN is not None:
                z_SN[part] += b_in_EN[e]
        a_SF = activate(z_SN, activation, a_MF[:size], a_MF[:size])
        for e, part in parts:
            matmul(a_SF[part], w_out_EFD[e], y_SD[part])
            if b_out_ED is not None:
                y_SD[part] += b_out_ED[e]
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
    rows, dtype = Rows(source_R, slot_TK, counts_E), x_TD.dtype
    w_in, w_out, weights_R1 = w_in_END.unbind(), w_out_EDF.unbind(), rows.weights(weights_TK, dtype)
    dw_in, dw_out = rows.gradient_like(w_in_END), rows.gradient_like(w_out_EDF)
    db_in = None if b_in_EN is None else torch.zeros_like(b_in_EN)
    db_out = None if b_out_ED is None else torch.zeros_like(b_out_ED)
    _, dim, hidden = w_out_EDF.shape
    wide = torch.promote_types(dtype, torch.float32)
    dx_RD, dweights_R = empty((rows.used, dim), dtype), torch.zeros(rows.used, dtype=wide)
    scratch = [empty((rows.most, width), dtype) for width in (dim, dim, hidden, hidden, hidden, z_RN.shape[1])]
    for block, parts in rows.blocks():
        x_SD, dy_SD, da_SF, silu_SF, a_SF, dz_SN = (buffer[: block.stop - block.start] for buffer in scratch)
        z_SN, dx_SD = z_RN[block], dx_RD[block]
        rows.gather(x_TD, block, x_SD)
        rows.gather(dy_TD, block, dy_SD)
        for e, part in parts:
            matmul(dy_SD[part], w_out[e], da_SF[part])
        activate(z_SN, activation, a_SF, silu_SF)
        if weights_R1 is not None:
            torch.sum(torch.mul(da_SF, a_SF, out=dz_SN[:, :hidden]), 1, dtype=wide, out=dweights_R[block])
            if b_out_ED is not None:
                for e, part in parts:
                    dweights_R[block][part] += dy_SD[part] @ b_out_ED[e]
            da_SF *= weights_R1[block]
            dy_SD *= weights_R1[block]
        _activate_backward(da_SF, z_SN, activation, silu_SF, dz_SN)
        for e, part in parts:
            matmul(dy_SD[part].t(), a_SF[part], dw_out[e])
            matmul(dz_SN[part].t(), x_SD[part], dw_in[e])
            matmul(dz_SN[part], w_in[e], dx_SD[part])
        _sum_rows(dz_SN, parts, db_in)
        _sum_rows(dy_SD, parts, db_out)
    dweights_TK = None if weights_TK is None else rows.scatter(dweights_R).to(weights_TK.dtype)
    return rows.combine(dx_RD, None), dw_in, dw_out, dweights_TK, db_in, db_out


def _sum_rows(d_SN: Tensor, parts: list[tuple[int, slice]], db_EN: Tensor | None) -> None:
    if db_EN is not None:
        for e, part in parts:
            torch.sum(d_SN[part], 0, out=db_EN[e])
