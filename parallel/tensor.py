"""Tensor parallelism's collectives, differentiable: the sequence gathered and scattered, what ranks share or own.

Shapes: P ranks of a group, B sequences, S positions in all, s = S / P of one rank, R rows of one rank, Q rows of all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import all_reduce_sum

Way = Callable[[Tensor], Tensor]

# torch 2.13 renamed them; the older names warn there.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def is_cut(tensor: Any) -> bool:
    """Whether this is a DTensor. Its module takes half a second to import: where nobody has, there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """The local values of a tensor that a mesh has cut, shared with it: writing to them writes to it."""
    return tensor.to_local() if is_cut(tensor) else tensor  # type: ignore[attr-defined]


def gather_sequence(x_BsD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(B, s, ...) of every rank to the whole (B, S, ...). Backward sums the ranks' gradients and returns each its
    own positions' part."""
    return _carry(x_BsD, _gather, _scatter, group)


def scatter_sequence(x_BSD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sums the ranks' (B, S, ...) and returns each its own positions, (B, s, ...): the inverse of a gather.

    Raises:
        ValueError: the sequence does not divide over the ranks.
    """
    return _carry(x_BSD, _scatter, _gather, group)


def share(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Identity. Its gradient is summed over the ranks: for a weight that all hold and each uses for another part."""
    return _carry(x, lambda x, _: x.view_as(x), all_reduce_sum, group)


def sum_over(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the ranks, which all use, each for another part: the gradient is their gradients' sum."""
    return _carry(x, all_reduce_sum, all_reduce_sum, group)


def once(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The value on the first rank and zeros on the others, so that a sum over the ranks holds it once.

    The gradient passes on every rank as it is: after the sum, all ranks have that of the whole.
    """
    return _carry(x, lambda x, g: x.view_as(x) if g.rank() == 0 else torch.zeros_like(x), lambda x, _: x, group)


def own_positions(x_BS: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's positions of (S,) or (B, S). No gradient passes between ranks."""
    ranks, axis = group.size(), min(x_BS.dim() - 1, 1)
    _check(x_BS.shape[axis], ranks)
    return x_BS.chunk(ranks, axis)[group.rank()]


def gather_rows(x_RD: Tensor, rows_P: list[int], group: dist.ProcessGroup) -> Tensor:
    """The rows of all ranks in their order, (Q, D), rank p having rows_P[p]. Backward sums, as `scatter_rows`."""
    return _carry(x_RD, _gather_rows, _scatter_rows, group, rows_P)


def scatter_rows(x_QD: Tensor, rows_P: list[int], group: dist.ProcessGroup) -> Tensor:
    """Sums the ranks' (Q, D), in their order, and returns each its own rows, (R, D): the inverse of a gather."""
    return _carry(x_QD, _scatter_rows, _gather_rows, group, rows_P)


def _carry(x: Tensor, there: Callable[..., Tensor], back: Callable[..., Tensor], group: Any, *sizes: Any) -> Tensor:
    if group.size() == 1:
        return x
    return _Carry.apply(x, lambda x: there(x, *sizes, group), lambda x: back(x, *sizes, group))


class _Carry(torch.autograd.Function):
    """A linear way `there`; the gradient takes the way `back`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Way, back: Way) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.back(grads[0]), None, None


def _gather(x_BsD: Tensor, group: dist.ProcessGroup) -> Tensor:
    ranks = group.size()
    parts = x_BsD.new_empty(ranks, *x_BsD.shape)
    all_gather_single(parts.flatten(0, 1), x_BsD.contiguous(), group=group)
    return parts.transpose(0, 1).flatten(1, 2)


def _scatter(x_BSD: Tensor, group: dist.ProcessGroup) -> Tensor:
    ranks = group.size()
    _check(x_BSD.shape[1], ranks)
    parts = x_BSD.unflatten(1, (ranks, -1)).transpose(0, 1).contiguous()
    out = torch.empty_like(parts[0])
    reduce_scatter_single(out, parts.flatten(0, 1), group=group)
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
