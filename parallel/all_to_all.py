"""The all-to-all of one process group, started now and awaited later, counted and timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch.distributed as dist
from torch import Tensor

from .traffic import Nodes, Traffic, find_nodes, launched_per_node, link

Land = Callable[[], Tensor]
"""Waits for what is under way and returns it; called once."""


class Lane:
    """A process group as this rank uses it: the kind of link to each member, and where traffic is counted."""

    def __init__(
        self, group: dist.ProcessGroup, links: Sequence[str], traffic: Traffic | None = None, overlap: bool = True
    ) -> None:
        self.group, self.links, self.overlap = group, links, overlap
        self.traffic = Traffic() if traffic is None else traffic

    def swap(self, x: Tensor, send: list[int] | None = None, receive: list[int] | None = None) -> Land:
        """Starts to send rows to the ranks of the group: the first `send[0]` to rank 0, and so on.

        Args:
            send, receive: rows to and from each rank; zeros are fine, but every rank must call. None: equal shares.
        """
        if len(self.links) == 1:
            return lambda: x
        x = x.contiguous()
        shares = [len(x) // len(self.links)] * len(self.links)
        out = x.new_empty(x.shape if receive is None else (sum(receive), *x.shape[1:]))
        width = x[0:1].numel() * x.element_size() if len(x) else 0
        self.traffic.count(self.links, [rows * width for rows in (shares if send is None else send)])
        clock = self.traffic.clock
        started = clock.start(x.device)
        work = dist.all_to_all_single(out, x, receive, send, group=self.group, async_op=self.overlap)
        clock.stop(started)

        def land() -> Tensor:
            if work is not None:
                started = clock.start(x.device)
                work.wait()
                clock.stop(started)
            return out

        return land


class Network:
    """An expert-parallel group and the machines that its ranks are on. Layers share one, so that its parts are made
    once; all ranks must make and use them in the same order.

    Args:
        group: its ranks, in the order of their experts.
        ranks_per_node: consecutive global ranks of one machine. None: what the launcher says.
    """

    def __init__(self, group: dist.ProcessGroup, ranks_per_node: int | None = None) -> None:
        self.group = group
        self.members = dist.get_process_group_ranks(group)
        self.per_node = ranks_per_node or launched_per_node(dist.get_world_size())
        self.nodes = find_nodes(self.members, self.per_node)

    def whole(self, traffic: Traffic, overlap: bool = True) -> Lane:
        """All ranks of the group."""
        return self._lane(self.group, self.members, traffic, overlap)

    def within(self, traffic: Traffic, overlap: bool = True) -> Lane:
        """The ranks of this rank's node."""
        return self._lane(*self._parts[0], traffic, overlap)

    def across(self, traffic: Traffic, overlap: bool = True) -> Lane:
        """The ranks of the same place on every node."""
        return self._lane(*self._parts[1], traffic, overlap)

    def grid(self) -> Nodes:
        """The nodes; ValueError where their ranks differ in number."""
        if self.nodes is None:
            raise ValueError(
                f"expert-parallel ranks {self.members} do not fill nodes of {self.per_node} ranks evenly: "
                "use the flat exchange"
            )
        return self.nodes

    def _lane(self, group: dist.ProcessGroup, members: Sequence[int], traffic: Traffic, overlap: bool) -> Lane:
        return Lane(group, [link(dist.get_rank(), member, self.per_node) for member in members], traffic, overlap)

    @cached_property
    def _parts(self) -> list[tuple[dist.ProcessGroup, list[int]]]:
        nodes = self.grid()
        node, place = divmod(self.group.rank(), nodes.per_node)
        within = self.members[node * nodes.per_node : (node + 1) * nodes.per_node]
        across = self.members[place :: nodes.per_node]
        return [(self._subgroup(ranks), ranks) for ranks in (within, across)]

    def _subgroup(self, ranks: list[int]) -> dist.ProcessGroup:
        if len(ranks) in (1, len(self.members)):
            return self.group  # a lane of one rank never uses it
        group = dist.new_group(ranks, use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup)
        return group
