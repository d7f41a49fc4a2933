"""Reductions and exchanges that cost nothing without other ranks, and never write into their argument."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


def size(group: Group = None) -> int:
    """Ranks in the group (None: all ranks); 1 where no process group exists."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(tensor: Tensor, group: Group = None) -> Tensor:
    """The sum over the ranks, as a new tensor; the tensor itself where there is one rank. No gradient."""
    return _reduce(tensor, dist.ReduceOp.SUM, group)


def all_reduce_max(tensor: Tensor, group: Group = None) -> Tensor:
    """The greatest over the ranks, as a new tensor; the tensor itself where there is one rank. No gradient."""
    return _reduce(tensor, dist.ReduceOp.MAX, group)


def all_reduce_sums(tensors: Sequence[Tensor], group: Group = None) -> list[Tensor]:
    """Sums of several tensors of one dtype by one collective."""
    if not tensors or size(group) == 1:
        return list(tensors)
    flat = all_reduce_sum(torch.cat([t.detach().reshape(-1) for t in tensors]), group)
    parts = flat.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def any_rank(flag: bool, device: torch.device | str = "cpu", group: Group = None) -> bool:
    """True on all ranks when it is true on one: a signal, a full disk, a bad number."""
    if size(group) == 1:
        return flag
    return bool(all_reduce_max(torch.tensor(int(flag), device=device), group).item())


def all_gather_rows(tensor: Tensor, group: Group = None) -> Tensor:
    """Tensors of equal shape from all ranks, stacked by rank along a new first axis. No gradient."""
    ranks = size(group)
    if ranks == 1:
        return tensor.detach()[None]
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(ranks)]
    dist.all_gather(parts, tensor.detach().contiguous(), group=group)
    return torch.stack(parts)


def broadcast(tensor: Tensor, group: Group = None) -> Tensor:
    """The first rank's tensor, as a new one."""
    if size(group) == 1:
        return tensor
    out = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.broadcast(out, group=group, group_src=0)
    return out


def barrier(group: Group = None) -> None:
    """Waits for all ranks."""
    if size(group) > 1:
        dist.barrier(group)


def _reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType, group: Group) -> Tensor:
    if size(group) == 1:
        return tensor
    out = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, op, group=group)
    return out
