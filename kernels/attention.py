"""Causal self-attention of whole sequences: torch's own, and a faster way through large products on CPUs.

Shapes: B batch, S sequence, H query heads, G key heads, R = H / G queries per key, d head width, N = B * G.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import choose

BLOCK = 64


def causal_attention_reference(q_BSHd: Tensor, k_BSGd: Tensor, v_BSGd: Tensor) -> Tensor:
    """`causal_attention` in plain torch, in fp32 (fp64 for fp64), differentiated by autograd."""
    wide = torch.promote_types(q_BSHd.dtype, torch.float32)
    sequence, heads, width = q_BSHd.shape[1:]
    repeat = heads // k_BSGd.shape[2]
    k_BSHd, v_BSHd = (t.to(wide).repeat_interleave(repeat, 2) for t in (k_BSGd, v_BSGd))
    scores = torch.einsum("bqhd,bkhd->bhqk", q_BSHd.to(wide), k_BSHd) * width**-0.5
    future = torch.ones(sequence, sequence, dtype=torch.bool, device=scores.device).triu(1)
    probs = scores.masked_fill(future, float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", probs, v_BSHd).to(q_BSHd.dtype)


def causal_attention(q_BSHd: Tensor, k_BSGd: Tensor, v_BSGd: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over each query's own position and all before it; any strides, o_BSHd.

    Key head g serves the query heads g * R to (g + 1) * R.
    """
    heads, groups = q_BSHd.shape[2], k_BSGd.shape[2]
    if k_BSGd.shape != v_BSGd.shape or heads % groups or q_BSHd.shape[:2] != k_BSGd.shape[:2]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q_BSHd, k_BSGd, v_BSGd))
        raise ValueError(f"causal_attention: q, k and v of shapes {shapes} do not fit")
    if choose(q_BSHd) == "reference":
        return causal_attention_reference(q_BSHd, k_BSGd, v_BSGd)
    # torch's kernel for CPUs is slow in bf16, and runs grouped queries as if each had its own keys.
    if q_BSHd.device.type == "cpu" and (q_BSHd.dtype == torch.bfloat16 or heads != groups):
        return _attention(q_BSHd, k_BSGd, v_BSGd)
    o = F.scaled_dot_product_attention(
        q_BSHd.transpose(1, 2),
        k_BSGd.transpose(1, 2),
        v_BSGd.transpose(1, 2),
        is_causal=True,
        enable_gqa=heads != groups,
    )
    return o.transpose(1, 2)


class _Folded:
    """Queries with their R heads beside each other as rows, keys and values: one product a block for all heads."""

    def __init__(self, q_BSHd: Tensor, k_BSGd: Tensor, v_BSGd: Tensor) -> None:
        self.groups = k_BSGd.shape[2]
        self.batch, self.sequence, self.heads, self.width = q_BSHd.shape
        self.repeat = self.heads // self.groups
        self.q, self.k, self.v = self.rows(q_BSHd), self.rows(k_BSGd), self.rows(v_BSGd)
        self.scale = self.width**-0.5
        row = torch.arange(BLOCK * self.repeat) // self.repeat
        future = row[:, None] < torch.arange(BLOCK)
        self.mask = torch.zeros(future.shape, dtype=q_BSHd.dtype).masked_fill_(future, float("-inf"))

    def rows(self, x_BSHd: Tensor) -> Tensor:
        """(B, S, H, d) to (N, S * R, d)."""
        repeat = x_BSHd.shape[2] // self.groups
        apart = x_BSHd.reshape(self.batch, self.sequence, self.groups, repeat, self.width).transpose(1, 2)
        return apart.reshape(self.batch * self.groups, self.sequence * repeat, self.width)

    def heads_of(self, rows_Nrd: Tensor, heads: int) -> Tensor:
        """(N, S * R, d) back to (B, S, H, d), for R = H / G."""
        apart = rows_Nrd.view(self.batch, self.groups, self.sequence, heads // self.groups, self.width)
        return apart.transpose(1, 2).reshape(self.batch, self.sequence, heads, self.width).contiguous()

    def blocks(self) -> list[tuple[slice, int]]:
        """Rows of each block of queries, and the number of keys that its last query sees."""
        starts = range(0, self.sequence, BLOCK)
        ends = [min(s + BLOCK, self.sequence) for s in starts]
        return [(slice(s * self.repeat, e * self.repeat), e) for s, e in zip(starts, ends, strict=True)]

    def probs(self, rows: slice, keys: int) -> Tensor:
        """Attention of one block of queries to the first `keys` keys."""
        scores = torch.bmm(self.q[:, rows], self.k[:, :keys].mT).mul_(self.scale)
        first = rows.start // self.repeat
        scores[:, :, first:].add_(self.mask[: rows.stop - rows.start, : keys - first])
        return torch.softmax(scores, -1)


@torch.library.custom_op("coterie::causal_attention", mutates_args=())
def _attention(q_BSHd: Tensor, k_BSGd: Tensor, v_BSGd: Tensor) -> Tensor:
    folded = _Folded(q_BSHd, k_BSGd, v_BSGd)
    o = torch.empty(folded.q.shape, dtype=q_BSHd.dtype)
    for rows, keys in folded.blocks():
        o[:, rows] = torch.bmm(folded.probs(rows, keys), folded.v[:, :keys])
    return folded.heads_of(o, folded.heads)


@torch.library.custom_op("coterie::causal_attention_backward", mutates_args=())
def _attention_backward(
    do_BSHd: Tensor, q_BSHd: Tensor, k_BSGd: Tensor, v_BSGd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Repeats each block's attention, so that nothing of S * S is kept; sums over blocks are fp32."""
    folded = _Folded(q_BSHd, k_BSGd, v_BSGd)
    do = folded.rows(do_BSHd)
    wide = torch.promote_types(q_BSHd.dtype, torch.float32)
    dq = torch.empty(folded.q.shape, dtype=q_BSHd.dtype)
    dk, dv = (torch.zeros(folded.k.shape, dtype=wide) for _ in range(2))
    for rows, keys in folded.blocks():
        p = folded.probs(rows, keys)
        dp = torch.bmm(do[:, rows], folded.v[:, :keys].mT)
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype).mul_(folded.scale)
        dq[:, rows] = torch.bmm(ds, folded.k[:, :keys])
        dk[:, :keys] += torch.bmm(ds.mT, folded.q[:, rows])
        dv[:, :keys] += torch.bmm(p.mT, do[:, rows])
    dk, dv = dk.to(q_BSHd.dtype), dv.to(q_BSHd.dtype)
    groups = folded.groups
    return folded.heads_of(dq, folded.heads), folded.heads_of(dk, groups), folded.heads_of(dv, groups)


@_attention.register_fake
def _(q_BSHd: Tensor, k_BSGd: Tensor, v_BSGd: Tensor) -> Tensor:
    return q_BSHd.new_empty(q_BSHd.shape)


@_attention_backward.register_fake
def _(do_BSHd: Tensor, q_BSHd: Tensor, k_BSGd: Tensor, v_BSGd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q_BSHd.new_empty(q_BSHd.shape), k_BSGd.new_empty(k_BSGd.shape), v_BSGd.new_empty(v_BSGd.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, do_BSHd: Tensor):
    return _attention_backward(do_BSHd, *ctx.saved_tensors)


_attention.register_autograd(_differentiate, setup_context=_save)
