"""What a layout sends in one optimizer step, and how long it takes, by formula: bytes and messages of one rank.

Bytes are those that a rank sends; it receives as many. Collectives are rings (n - 1 messages, NCCL's for all-gather
and reduce-scatter). Routing is taken as uniform.

D model, K choices.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, replace
from functools import cache
from typing import NamedTuple

from ..models.config import ModelConfig
from ..parallel.cost import Batch, Links, choose_exchange, expect, phases, ring_seconds, sent
from ..parallel.layout import Layout
from ..parallel.traffic import Nodes
from .machines import Machine
from .plan_memory import Run, layers
from .plan_shards import Group, groups


class Span(NamedTuple):
    """A group of ranks as the nodes see it; of groups that lie differently, the worst."""

    ranks: int
    nodes: int
    """Nodes that a group touches."""


@dataclass(frozen=True)
class Flow:
    """All collectives of one kind in a step, of one rank."""

    calls: float = 0
    messages: float = 0
    sent: float = 0
    """Bytes to other ranks."""
    inter: float = 0
    """Of these, bytes that leave the node."""
    seconds: float = 0

    def __add__(self, other: Flow) -> Flow:
        return Flow(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def times(self, number: float) -> Flow:
        """So many of these."""
        return Flow(*(number * value for value in astuple(self)))


class Traffic(NamedTuple):
    """One step of one rank."""

    gather: Flow
    """FSDP's all-gathers of weights."""
    reduce: Flow
    """FSDP's reduce-scatters of gradients, and HSDP's all-reduces of their shards."""
    tensor: Flow
    """Gathers and scatters of the sequence over tp."""
    exchange: Flow
    """All-to-alls of tokens, and the gathers and scatters of their rows over etp."""
    control: Flow
    """All-reduces of a few numbers over all ranks: counts of tokens, of the routers' choices, and the norm."""


@cache
def span(world: int, ranks: int, stride: int, node: int) -> Span:
    """The groups {first, first + stride, ...} of `ranks` ranks, when a node holds `node` consecutive ones."""
    nodes = 1
    for start in range(0, world, ranks * stride):
        for first in range(start, start + stride):
            nodes = max(nodes, len({rank // node for rank in range(first, first + ranks * stride, stride)}))
    return Span(ranks, nodes)


def ring(where: Span, shard: float, links: Links, *, rounds: int = 1) -> Flow:
    """An all-gather of, or a reduce-scatter to, `shard` bytes of each rank; rounds=2: an all-reduce of n shards."""
    n = where.ranks
    if n == 1:
        return Flow()
    messages, sent = rounds * (n - 1), rounds * (n - 1) * shard
    leaves = sent * where.nodes / n if where.nodes > 1 else 0.0
    return Flow(1, messages, sent, leaves, ring_seconds(n, where.nodes, shard, links, rounds))


def tell(where: Span, size: float, machine: Machine) -> Flow:
    """An all-reduce of `size` bytes that are few: NCCL goes up and down a tree, gloo around a ring."""
    around = ring(where, size / where.ranks, machine.ring("total"), rounds=2)
    if machine.rings is not None or where.ranks == 1:
        return around
    far = math.ceil(math.log2(where.nodes))
    near = math.ceil(math.log2(where.ranks / where.nodes))
    hops = far * machine.inter.message + near * machine.intra.message
    latency = machine.inter.latency if where.nodes > 1 else machine.intra.latency
    return replace(around, seconds=latency + 2 * hops)


@cache
def exchange(where: Span, batch: Batch, machine: Machine, backward: bool = True) -> Flow:
    """One MoE layer's exchange of rows, by `parallel.cost`: flat on one node, else the fastest, as a run with
    exchange=auto takes it. Ranks that do not share their nodes evenly are taken to have one each."""
    if where.ranks == 1:
        return Flow()
    even = where.ranks % where.nodes == 0
    nodes = Nodes(where.nodes, where.ranks // where.nodes) if even else Nodes(where.ranks, 1)
    rates = {"intra": machine.intra, "inter": machine.inter}
    override = "flat" if nodes.nodes == 1 else None
    choice = choose_exchange(batch, nodes, rates, backward=backward, override=override)
    matrices = phases(choice.name, expect(batch, nodes), nodes, batch, backward)
    moved = sent(matrices, nodes, 0)
    messages, size = (sum(moved[kind][field] for kind in ("intra", "inter")) for field in (0, 1))
    return Flow(len(matrices), messages, size, moved["inter"].bytes, choice.predictions[choice.name])


def traffic(config: ModelConfig, layout: Layout, run: Run, machine: Machine, node: int) -> Traffic:
    """All that one rank sends in a step."""
    gather, reduce, exchange = Flow(), Flow(), Flow()
    for layer, number in [*layers(config), (None, 1)]:
        for group in groups(config, layout, layer, run.work):
            fetches = run.micros * (2 if run.reshard and layer is not None else 1)
            one, other = _sharded(group, layout, run, machine, node)
            gather += one.times(number * fetches)
            reduce += other.times(number * (run.micros if run.sync_every_micro else 1))
        if layer is not None and config.experts_of(layer):
            exchange += _experts(config, layout, config.experts_of(layer), run, machine, node).times(number)
    tensor = _tensor(config, layout, run, machine, node)
    return Traffic(gather, reduce, tensor, exchange, _control(config, layout, run, machine, node))


def _control(config: ModelConfig, layout: Layout, run: Run, machine: Machine, node: int) -> Flow:
    """A step counts its tokens and sums up norm, losses and statistics; a MoE layer's router counts its choices over
    all ranks, again when it is repeated."""
    where = span(layout.world, layout.world, 1, node)
    routers = sum(config.experts_of(layer) > 0 for layer in range(config.layers))
    passes = run.micros * (2 if run.recompute == "full" else 1)
    return tell(where, 8 * max(config.experts, default=1), machine).times(2 + routers * passes)


def _sharded(group: Group, layout: Layout, run: Run, machine: Machine, node: int) -> tuple[Flow, Flow]:
    """One all-gather of a group's weights, and one reduction of its gradients (fp32)."""
    where = span(layout.world, group.ranks, group.stride, node)
    gather = ring(where, group.shard * (4 if group.wide else run.work), machine.ring("gather"))
    reduce = ring(where, 4 * group.shard, machine.ring("scatter"))
    copies = span(layout.world, group.copies, group.copy_stride, node)
    return gather, reduce + ring(copies, 4 * group.shard / group.copies, machine.ring("total"), rounds=2)


def _tensor(config: ModelConfig, layout: Layout, run: Run, machine: Machine, node: int) -> Flow:
    """Sequence-parallel tp: a gather at the entry and a scatter at the exit of attention and of a dense MLP, and the
    same in backward; a scatter after the embedding and a gather before the head, and back. The loss all-reduces
    three fp32 numbers a token (maximum, sum of exponentials, the target's logit). A repeated forward pass does it
    again, but for a dense MLP's exit, on which nothing else depends.
    """
    if layout.tp == 1:
        return Flow()
    where = span(layout.world, layout.tp, 1, node)
    slice_bytes = run.tokens // layout.tp * config.dim * run.work
    dense = sum(config.experts_of(layer) == 0 for layer in range(config.layers))
    again = {"none": 0, "selective": 2 * config.layers, "full": 2 * config.layers + dense}[run.recompute]
    calls = 4 * (config.layers + dense) + again + 4
    loss = ring(where, 4 * run.tokens / layout.tp, machine.ring("total"), rounds=2).times(3)
    gathers, scatters = (ring(where, slice_bytes, machine.ring(kind)) for kind in ("gather", "scatter"))
    norms = _norms(config, run, layout.tp, where, machine)
    return (gathers.times(calls / 2) + scatters.times(calls / 2) + loss + norms).times(run.micros)


def _norms(config: ModelConfig, run: Run, tp: int, where: Span, machine: Machine) -> Flow:
    """All-reduces over tp of the norms of queries and of keys: their weights' gradients, and, where a norm is over
    all heads, an fp32 sum of squares a token forward and its gradient backward."""
    if config.qk_norm == "none":
        return Flow()
    heads = (config.heads, config.num_kv_heads) if config.qk_norm == "all" else (1, 1)
    found = Flow()
    for number in heads:
        weight = number * config.width_per_head
        found += ring(where, run.work * weight / tp, machine.ring("total"), rounds=2)
    if config.qk_norm == "all":
        squares = ring(where, 4 * run.tokens / tp, machine.ring("total"), rounds=2)
        found += squares.times(4 if run.recompute == "none" else 6)
    return found.times(config.layers)


def _experts(config: ModelConfig, layout: Layout, experts: int, run: Run, machine: Machine, node: int) -> Flow:
    """One MoE layer, forward and backward; a repeated forward pass does its part again. Under etp every slice of an
    expert gets its rows: those that came are gathered over the slices, and what the slices made is summed and
    scattered.
    """
    spread, K = layout.experts(experts), config.moe.top_k
    tokens, again = run.tokens // layout.tp, run.recompute == "full"
    batch = Batch(tokens, config.dim, K, experts, run.work)
    where = span(layout.world, spread.ep, spread.etp, node)
    moved = exchange(where, batch, machine)
    moved += exchange(where, batch, machine, backward=False) if again else Flow()
    slices = span(layout.world, spread.etp, 1, node)
    rows = tokens * K * config.dim * run.work
    gathers, scatters = (ring(slices, rows, machine.ring(kind)) for kind in ("gather", "scatter"))
    each = 3 if again else 2
    return (moved + gathers.times(each) + scatters.times(each)).times(run.micros)
