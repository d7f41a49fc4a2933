"""Tokens that several ranks hold alike: each takes its share of them, and the answers are gathered."""

# Shapes: T tokens, L replicas, S = ceil(T / L) tokens of a share, D model.

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .collectives import all_gather_rows
from .traffic import Traffic, launched_per_node, link


def shared(total: int, ranks: int, place: int) -> range:
    """Of `total` rows those of one of the ranks that share them."""
    each = -(-total // ranks)
    first = min(place * each, total)
    return range(first, min(first + each, total))


class Replicas:
    """The ranks that hold the same tokens, as tensor-parallel ones do.

    What they compute from gathered answers is the same on all of them, and so are its gradients: taking a share
    gathers gradients, and gathering takes a share of them. Nothing is summed.

    Args:
        group: these ranks.
        traffic: the counters; None: its own.
        ranks_per_node: consecutive global ranks of one machine. None: what the launcher says.
    """

    def __init__(
        self, group: dist.ProcessGroup, traffic: Traffic | None = None, ranks_per_node: int | None = None
    ) -> None:
        self.group = group
        self.traffic = Traffic() if traffic is None else traffic
        per_node = ranks_per_node or launched_per_node(dist.get_world_size())
        self.links = [link(dist.get_rank(), other, per_node) for other in dist.get_process_group_ranks(group)]

    def share(self, total: int) -> slice:
        """This rank's rows among `total`."""
        own = shared(total, len(self.links), self.group.rank())
        return slice(own.start, own.stop)

    def take(self, x_TD: Tensor) -> Tensor:
        """This rank's rows of what all hold."""
        return _Take.apply(x_TD, self)

    def gather(self, y_SD: Tensor, total: int) -> Tensor:
        """All `total` rows, from the ranks' shares."""
        return _Gather.apply(y_SD, total, self)

    def whole(self, part: Tensor, total: int) -> Tensor:
        """`gather` without a gradient."""
        ranks, each = len(self.links), -(-total // len(self.links))
        if ranks == 1 or total == 0:
            return part
        padded = F.pad(part, (0, 0, 0, each - len(part)))
        size = padded.numel() * padded.element_size()
        self.traffic.count(self.links, [0 if to == "self" else size for to in self.links])
        started = self.traffic.clock.start(part.device)
        gathered = all_gather_rows(padded, self.group)
        self.traffic.clock.stop(started)
        return gathered.flatten(0, 1)[:total]


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, replicas: Replicas) -> Tensor:
        ctx.settings = len(x_TD), replicas
        return x_TD[replicas.share(len(x_TD))].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        total, replicas = ctx.settings
        return replicas.whole(grads[0], total), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_SD: Tensor, total: int, replicas: Replicas) -> Tensor:
        ctx.settings = total, replicas
        return replicas.whole(y_SD, total).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        total, replicas = ctx.settings
        return grads[0][replicas.share(total)].contiguous(), None, None
