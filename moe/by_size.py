"""Serving over ranks: the ways that tokens can take to a layer's experts, and the fastest for each size of step."""

# Shapes: T tokens, D model, K choices, E experts.

from __future__ import annotations

import logging
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from ..parallel.collectives import all_reduce_max
from ..parallel.exchange_dedup import EXCHANGES
from ..parallel.exchange_replicas import Replicas
from ..parallel.mesh import Mesh
from .dispatch import Coordinated, Dispatch, Finish, LocalDispatch
from .exchanging import Dispatchers, Exchanging
from .gate import Gate, Routing
from .gathered import Gathered, Own, Placed, Summed, Turn

WAYS = ("gathered", *EXCHANGES)
SIZES = (1, 4, 16, 64, 256, 1024)
"""Tokens of a lane at which the ways are timed; each is right up to half way to the next, by ratio."""
_REPEATS = 4
log = logging.getLogger("coterie")


class BySize:
    """Takes for each pass the way that is fastest for the tokens of its fullest lane. All ranks take the same."""

    def __init__(self, ways: Mapping[str, Dispatch], turn: Turn, best: Mapping[int, str]) -> None:
        self.ways, self.turn = ways, turn
        sizes = sorted(best)
        self._ends = [(a * b) ** 0.5 for a, b in pairwise(sizes)]
        self._names = [best[size] for size in sizes]

    def name(self) -> str:
        """The way of the pass under way."""
        return self._names[bisect_left(self._ends, max(self.turn.lanes, default=0))]

    def start(self, x_TD: Tensor, routing: Routing) -> Finish:
        """Sends the rows on their way."""
        return self.ways[self.name()].start(x_TD, routing)

    def rows(self, routing: Routing) -> Tensor:
        """Rows that experts compute for these tokens."""
        return self.ways[self.name()].rows(routing)


class Serving:
    """Gives the layers of a served model their dispatch. Every rank makes one, and asks in the same order.

    Args:
        mesh: the ranks; tp neighbours hold the same tokens.
        turn: told before each pass.
        exchange: one of WAYS for steps of any size; auto: the fastest by size, measured now.
        ranks_per_node: consecutive ranks of one machine; 0: what the launcher says, all where it says nothing.
        spare: slots of a rank in each layer beyond what its experts need, for copies of others.

    Attributes:
        owns: per layer, in the order they were asked for, where its experts are; None: all on each rank.

    Raises:
        ValueError: there is no such exchange, or ranks were told different numbers of ranks on a node.
    """

    def __init__(
        self,
        mesh: Mesh,
        turn: Turn,
        *,
        exchange: str = "auto",
        ranks_per_node: int = 0,
        spare: int = 0,
    ) -> None:
        if exchange not in ("auto", *WAYS):
            raise ValueError(f"exchange {exchange!r} is not one of auto, {', '.join(WAYS)}")
        self.mesh, self.turn, self.exchange, self.spare = mesh, turn, exchange, spare
        self.owns: list[Own | None] = []
        self.dispatchers = Dispatchers(Exchanging(ranks_per_node=ranks_per_node), mesh.device_type)
        self._replicas: Replicas | None = None
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._best: dict[tuple[object, ...], dict[int, str]] = {}

    def make(self, gate: Gate, dtype: torch.dtype) -> Dispatch:
        """The dispatch of a layer, by its router; its experts are cut over their ranks already.

        Raises:
            ValueError: the exchange does not fit the nodes.
        """
        degrees = self.mesh.layout.experts(gate.num_experts)
        if degrees.ep == degrees.etp == 1:  # what tp ranks hold alike each computes: messages take longer
            self.owns.append(None)
            return LocalDispatch()
        members = self._members(degrees.ep * degrees.etp)
        slots = min(gate.num_experts // degrees.ep + self.spare, gate.num_experts)
        own = Own(self._group(members), gate.num_experts, degrees.etp, slots=slots)
        self.owns.append(own)
        ways = {name: self._way(name, gate, own, members) for name in self._names(degrees.ep, gate)}
        key = gate.num_experts, gate.top_k, gate.weight.shape[1]
        if key not in self._best:
            self._best[key] = _fastest(ways, gate, self.turn, torch.device(self.mesh.device_type), dtype)
            told = ", ".join(f"{size}: {name}" for size, name in self._best[key].items())
            if len(ways) > 1:
                log.info(f"{gate.num_experts} experts on {len(members)} ranks, tokens of a lane: {told}")
        return BySize(ways, self.turn, self._best[key])

    def nodes(self, shares: int) -> int:
        """Nodes over which so many shares of experts are divided evenly; 1 where they are not."""
        nodes = max(1, self.mesh.world // self.dispatchers.per_node)
        return nodes if shares % nodes == 0 and self.mesh.layout.ep * self.mesh.layout.etp == self.mesh.world else 1

    def _names(self, ep: int, gate: Gate) -> list[str]:
        if self.exchange != "auto":
            return [self.exchange if ep > 1 else "gathered"]
        if ep == 1:
            return ["gathered"]
        nodes = self.dispatchers.network(self.mesh.experts(gate.num_experts).ep.get_group()).nodes
        several = nodes is not None and nodes.nodes > 1
        return ["gathered", *(EXCHANGES if several else ["flat"])]

    def _way(self, name: str, gate: Gate, own: Own, members: tuple[int, ...]) -> Dispatch:
        tp = self.mesh.layout.tp
        if name == "gathered" and members == self._members(tp):
            return Summed(own)
        if name == "gathered":
            way = Gathered(own, self.turn)
        else:
            group = self.mesh.experts(gate.num_experts).ep.get_group()
            way = Placed(self.dispatchers.make_slots(group, own.shares * own.slots, name), own)
        if tp == 1:
            return way
        if self._replicas is None:
            self._replicas = Replicas(self.mesh.tp.get_group(), ranks_per_node=self.dispatchers.per_node)
        return Coordinated(way, self._replicas)

    def _members(self, count: int) -> tuple[int, ...]:
        first = self.mesh.rank // count * count
        return tuple(range(first, first + count))

    def _group(self, members: tuple[int, ...]) -> dist.ProcessGroup:
        if members == self._members(self.mesh.layout.tp) and len(members) > 1:
            return self.mesh.tp.get_group()
        if members not in self._groups:
            group = dist.new_group(members, use_local_synchronization=True)
            assert isinstance(group, dist.ProcessGroup)
            self._groups[members] = group
        return self._groups[members]


@torch.inference_mode()
def _fastest(
    ways: Mapping[str, Dispatch], gate: Gate, turn: Turn, device: torch.device, dtype: torch.dtype
) -> dict[int, str]:
    """The way for each of SIZES: what the slowest rank took, with experts that cost nothing."""
    names = list(ways)
    if len(names) == 1:
        return dict.fromkeys(SIZES, names[0])
    best = {}
    for size in SIZES:
        turn.begin([size] * (dist.get_world_size() // turn.tp))
        x_TD = torch.zeros(size, gate.weight.shape[1], device=device, dtype=dtype)
        runs = [_trip(way, gate, x_TD) for way in ways.values()]
        taken: list[list[float]] = [[] for _ in names]
        for _ in range(_REPEATS + 1):
            for run, seconds in zip(runs, taken, strict=True):
                seconds.append(_time(run, device))
        medians = [statistics.median(seconds[1:]) for seconds in taken]
        slowest = all_reduce_max(torch.tensor(medians, dtype=torch.float64).to(device)).tolist()
        best[size] = names[slowest.index(min(slowest))]
    return best


def _trip(way: Dispatch, gate: Gate, x_TD: Tensor) -> Callable[[], object]:
    """A layer's way there and back with even routing, the same for all that hold the same tokens."""
    generator = torch.Generator().manual_seed(len(x_TD))
    ids_TK = torch.rand(len(x_TD), gate.num_experts, generator=generator).topk(gate.top_k).indices.to(x_TD.device)
    weights_TK = torch.ones_like(ids_TK, dtype=torch.float32)
    routing = Routing(ids_TK, ids_TK, weights_TK, *[None] * 3)  # type: ignore[arg-type]
    return lambda: way.start(x_TD, routing)(lambda rows_RD, *_, **__: rows_RD)


def _time(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
