"""What a decode step on paper is asked and meets, and the seconds of its collectives."""

from __future__ import annotations

from typing import NamedTuple

from ..models.config import ModelConfig
from ..parallel.cost import PARTS, Batch, Links, Rings, expect, phases, ring_seconds, seconds
from ..parallel.layout import Layout
from ..parallel.traffic import Nodes


class Pace(NamedTuple):
    """What one rank reaches while it computes a step."""

    memory_rate: float
    """Bytes per second that products read weights with."""
    flops: float
    """FLOP/s of products in the type of the weights."""
    links: Links
    """Of all-to-alls, all ranks at once."""
    rings: Rings | None = None
    """None: ring collectives are as fast as all-to-alls."""
    call: float = 0.0
    """Seconds that each operation takes beyond its bytes: its start and its end."""
    row: float = 0.0
    """Seconds of the first rank for each token that it draws."""

    def ring(self, kind: str) -> Links:
        """The links of a ring collective: gather, scatter or total."""
        return self.links if self.rings is None else getattr(self.rings, kind)


class Served(NamedTuple):
    """What is asked of the ranks, and how they lie."""

    sequences: int
    """Of each lane: the tp ranks that hold the same sequences. Each computes one token."""
    context: int
    """Tokens of a sequence, whose keys and values are read."""
    node: int
    """Consecutive ranks of one machine."""
    element_bytes: int = 2
    """Of weights, activations, keys and values."""
    exchange: str = "auto"
    """How tokens reach experts: gathered, flat, hierarchical, deduplicated; auto: the fastest."""


def ring(
    pace: Pace, served: Served, kind: str, shard: float, ranks: int, *, stride: int = 1, rounds: int = 1
) -> float:
    """Seconds of a ring of ranks, `stride` apart, with `shard` bytes of each: `parallel.cost.ring_seconds`."""
    return ring_seconds(ranks, _nodes(ranks, stride, served.node), shard, pace.ring(kind), rounds)


def sum_over_lane(pace: Pace, served: Served, layout: Layout, size: float) -> float:
    """Seconds of an all-reduce of `size` bytes over a lane's ranks."""
    return ring(pace, served, "total", size / layout.tp, layout.tp, rounds=2)


def experts_ways(config: ModelConfig, experts: int, layout: Layout, pace: Pace, served: Served) -> dict[str, float]:
    """Seconds of the collectives of a layer of so many experts, by way (docs/serving.md).

    local: nothing is cut. summed: experts lie on the ranks of one lane. gathered: tokens, choices and weights to all
    ranks, one sum home. The others: rows there and back by `parallel.cost`, with their counts; slices gather what
    came and sum what they made. Under tp each rank carries its share of a lane's tokens, and answers are gathered
    over the lane. Routing is even, and an exchange has a message for every rank.
    """
    spread, K = layout.experts(experts), config.moe.top_k
    cut, row, share = spread.ep * spread.etp, config.dim * served.element_bytes, -(-served.sequences // layout.tp)
    if cut == 1:
        return {"local": 0.0}
    if cut == layout.tp:
        return {"summed": sum_over_lane(pace, served, layout, served.sequences * row)}
    home = ring(pace, served, "gather", share * row, layout.tp)
    there = ring(pace, served, "gather", share * (row + 8 * K), cut)
    found = {"gathered": there + ring(pace, served, "scatter", share * row, cut) + home}
    if spread.ep == 1:
        return found
    sliced = sum(ring(pace, served, kind, share * K * row, spread.etp) for kind in ("gather", "scatter"))
    nodes = _even(spread.ep, _nodes(spread.ep, spread.etp, served.node))
    batch = Batch(share, config.dim, K, experts, served.element_bytes)
    rates, routed = pace.links._asdict(), expect(batch, nodes)
    for name in PARTS if nodes.nodes > 1 else ["flat"]:
        trip = seconds(phases(name, routed, nodes, batch, backward=False), nodes, rates, [0])
        found[name] = trip + sliced + home
    return found


def _nodes(ranks: int, stride: int, node: int) -> int:
    """That a group touches whose first rank is the first of a node."""
    return len({rank // node for rank in range(0, ranks * stride, stride)})


def _even(ranks: int, nodes: int) -> Nodes:
    """Ranks that do not share their nodes evenly are taken to have one each."""
    return Nodes(nodes, ranks // nodes) if ranks % nodes == 0 else Nodes(ranks, 1)
