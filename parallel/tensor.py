"""Tensor parallelism's collectives, differentiable: the sequence gathered and scattered, what ranks share or own.

Shapes: P ranks of a group, B sequences, S positions in all, s = S / P of one rank, R rows of one rank, Q rows of all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .collectives import all_reduce_sum

# torch 2.13 renamed them; the older names warn there.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def local_part(tensor: Tensor) -> Tensor:
    """The local values of a tensor that a mesh has cut, shared with it: writing to them writes to it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_sequence(x_BsD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(B, s, ...) of every rank to the whole (B, S, ...). Backward sums the ranks' gradients and returns each its
    own positions' part."""
    return x_BsD if group.size() == 1 else _Gather.apply(x_BsD, group)


def scatter_sequence(x_BSD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sums the ranks' (B, S, ...) and returns each its own positions, (B, s, ...): the inverse of a gather.

    Raises:
        ValueError: the sequence does not divide over the ranks.
    """
    return x_BSD if group.size() == 1 else _Scatter.apply(x_BSD, group)


def share(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Identity. Its gradient is summed over the ranks: for a weight that all hold and each uses for another part."""
    return x if group.size() == 1 else _Share.apply(x, group)


def once(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The value on the first rank and zeros on the others, so that a sum over the ranks holds it once.

    The gradient passes on every rank as it is: after the sum, all ranks have that of the whole.
    """
    return x if group.size() == 1 else _Once.apply(x, group.rank() == 0)


def own_positions(x_BS: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's positions of (S,) or (B, S). No gradient passes between ranks."""
    ranks, axis = group.size(), min(x_BS.dim() - 1, 1)
    _check(x_BS.shape[axis], ranks)
    return x_BS.chunk(ranks, axis)[group.rank()]


def gather_rows(x_RD: Tensor, rows_P: list[int], group: dist.ProcessGroup) -> Tensor:
    """The rows of all ranks in their order, (Q, D), rank p having rows_P[p]. Backward sums, as `scatter_rows`."""
    return x_RD if group.size() == 1 else _GatherRows.apply(x_RD, rows_P, group)


def scatter_rows(x_QD: Tensor, rows_P: list[int], group: dist.ProcessGroup) -> Tensor:
    """Sums the ranks' (Q, D), in their order, and returns each its own rows, (R, D): the inverse of a gather."""
    return x_QD if group.size() == 1 else _ScatterRows.apply(x_QD, rows_P, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BsD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather(x_BsD, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _scatter(grads[0], ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _scatter(x_BSD, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _gather(grads[0], ctx.group), None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, rows_P: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.settings = rows_P, group
        return _gather_rows(x_RD, rows_P, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _scatter_rows(grads[0], *ctx.settings), None, None


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_QD: Tensor, rows_P: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.settings = rows_P, group
        return _scatter_rows(x_QD, rows_P, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _gather_rows(grads[0], *ctx.settings), None, None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return all_reduce_sum(grads[0], ctx.group), None


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, first: bool) -> Tensor:
        return x.view_as(x) if first else torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def _gather(x_BsD: Tensor, group: dist.ProcessGroup) -> Tensor:
    ranks = group.size()
    parts = x_BsD.new_empty(ranks, *x_BsD.shape)
    _all_gather(parts.flatten(0, 1), x_BsD.contiguous(), group=group)
    return parts.transpose(0, 1).flatten(1, 2)


def _scatter(x_BSD: Tensor, group: dist.ProcessGroup) -> Tensor:
    ranks = group.size()
    _check(x_BSD.shape[1], ranks)
    parts = x_BSD.unflatten(1, (ranks, -1)).transpose(0, 1).contiguous()
    out = torch.empty_like(parts[0])
    _reduce_scatter(out, parts.flatten(0, 1), group=group)
    return out


# Ranks have different numbers of rows: an all-to-all takes them as they are, where an all-gather would need padding.
def _gather_rows(x_RD: Tensor, rows_P: list[int], group: dist.ProcessGroup) -> Tensor:
    out = x_RD.new_empty(sum(rows_P), *x_RD.shape[1:])
    same = [len(x_RD)] * len(rows_P)
    dist.all_to_all_single(out, x_RD.repeat(len(rows_P), 1), rows_P, same, group=group)
    return out


def _scatter_rows(x_QD: Tensor, rows_P: list[int], group: dist.ProcessGroup) -> Tensor:
    ranks, own = len(rows_P), rows_P[group.rank()]
    parts = x_QD.new_empty(ranks, own, *x_QD.shape[1:])
    dist.all_to_all_single(parts.flatten(0, 1), x_QD.contiguous(), [own] * ranks, rows_P, group=group)
    return parts.sum(0)


def _check(sequence: int, ranks: int) -> None:
    if sequence % ranks:
        raise ValueError(
            f"a sequence of {sequence} does not divide over tp={ranks}: use one of {sequence // ranks * ranks} or "
            f"{(sequence // ranks + 1) * ranks}"
        )
