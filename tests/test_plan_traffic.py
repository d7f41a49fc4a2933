"""The planner's messages and bytes against counts by brute force, and what must hold for any layout."""

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import DENSE, H200, MODERN

from coterie.models.config import ModelConfig
from coterie.models.gpt import Recompute
from coterie.moe.config import MoEConfig
from coterie.parallel.cost import Batch, Rate, choose_exchange
from coterie.parallel.layout import Layout
from coterie.parallel.traffic import Nodes
from coterie.train.config import ParallelConfig, TrainConfig
from coterie.train.plan import run_of
from coterie.train.plan_memory import Run, memory
from coterie.train.plan_shards import groups
from coterie.train.plan_traffic import Flow, Span, exchange, ring, span, traffic


@pytest.mark.parametrize(
    ("world", "ranks", "stride", "node"), [(16, 4, 2, 4), (16, 8, 1, 4), (24, 3, 1, 8), (8, 2, 4, 4)]
)
def test_spans_are_those_of_the_groups(world: int, ranks: int, stride: int, node: int) -> None:
    found = span(world, ranks, stride, node)
    nodes = []
    for rank in range(world):
        block = rank // (ranks * stride) * ranks * stride
        mine = range(block + rank % stride, block + ranks * stride, stride)
        nodes.append(len({r // node for r in mine}))
    assert found == (ranks, max(nodes))


def _count_all_to_all(ep: int, etp: int, node: int, rows: int, row_bytes: int) -> tuple[float, float, int]:
    """(bytes sent, bytes to other nodes, messages) of a rank, over all ranks and rows of a uniform routing."""
    ranks, sent, inter, messages = ep * etp, 0, 0, set()
    for rank in range(ranks):
        for row in range(rows):
            target = row % ep * etp + rank % etp
            if target != rank:
                sent += row_bytes
                inter += row_bytes * (target // node != rank // node)
                messages.add((rank, target))
    return sent / ranks, inter / ranks, len(messages) // ranks


@pytest.mark.parametrize(("ep", "etp", "node"), [(4, 1, 4), (4, 1, 2), (8, 1, 4), (4, 2, 4), (2, 4, 8)])
def test_flat_exchanges_are_those_of_a_routing(ep: int, etp: int, node: int) -> None:
    """Where the flat exchange is the fastest: counts, and four times the rows."""
    rows, row_bytes, far = 48, 64, replace(H200, inter=H200.intra)
    sent, inter, messages = _count_all_to_all(ep, etp, node, rows, row_bytes)
    counts = 8 * (ep - 1)
    flow = exchange(span(ep * etp, ep, etp, node), Batch(rows, row_bytes // 2, 1, ep, 2), far)
    assert (flow.calls, flow.messages, flow.sent) == pytest.approx((5, 5 * messages, 4 * sent + counts))
    assert flow.inter == pytest.approx(4 * inter + counts * inter / max(sent, 1))


def test_the_exchange_is_the_one_that_a_run_takes() -> None:
    """The cost model's choice, its seconds and its bytes."""
    batch = Batch(4096, 1024, 8, 64, 2)
    slow = replace(H200, inter=Rate(1e-4, 1e9, 1e-5))
    flow = exchange(Span(16, 2), batch, slow)
    choice = choose_exchange(batch, Nodes(2, 8), {"intra": slow.intra, "inter": slow.inter})
    assert choice.name == "deduplicated"
    assert flow.seconds == choice.predictions["deduplicated"]
    crossing = 4096 * (1 - math.comb(32, 8) / math.comb(64, 8)) * (1024 + 8) * 2
    answers = 3 * 4096 * 8 / 2 * 1024 * 2  # back, their gradients there, and gradients of rows back
    assert flow.inter == pytest.approx(crossing + answers, rel=1e-3)
    assert exchange(Span(6, 4), batch._replace(experts=6, top_k=2), H200).calls == 5, "uneven: one rank a node"


def _walk_ring(ranks: int, node: int, shard: int) -> tuple[float, float, int]:
    """(bytes sent, bytes to other nodes, messages) of a rank, while every shard goes once around."""
    sent = inter = messages = 0
    for _, rank in itertools.product(range(ranks - 1), range(ranks)):
        target = (rank + 1) % ranks
        sent += shard
        messages += 1
        inter += shard * (target // node != rank // node)
    return sent / ranks, inter / ranks, messages // ranks


@pytest.mark.parametrize(("ranks", "node"), [(4, 4), (4, 2), (8, 4), (8, 1)])
def test_ring_counts_are_those_of_a_walk(ranks: int, node: int) -> None:
    flow = ring(span(ranks, ranks, 1, node), 100, H200.ring("gather"))
    assert (flow.sent, flow.inter, flow.messages) == pytest.approx(_walk_ring(ranks, node, 100))


def test_a_steps_collectives_are_counted_one_by_one() -> None:
    """MODERN on 4 ranks, two micro-batches: blocks are fetched twice a pass, the root once; exchanges are 4 and one
    of counts; recomputation repeats the forward exchanges."""
    layout, run = Layout(1, 4, ep=4), Run(32, 1, 2, 2)
    sent = traffic(MODERN, layout, run, H200, 4)
    units = {layer: groups(MODERN, layout, layer, 2) for layer in (0, 1, 2, None)}
    several = [g for layer in (0, 1, 2) for g in units[layer] if g.ranks > 1]
    root = [g for g in units[None] if g.ranks > 1]
    assert sent.gather.calls == 2 * (2 * len(several) + len(root))
    assert sent.reduce.calls == len(several) + len(root)
    assert sent.exchange.calls == 2 * 2 * 5
    payload = 32 * MODERN.moe.top_k * MODERN.dim * 2
    assert sent.exchange.sent == pytest.approx(2 * 3 / 4 * (2 * 4 * payload + 8 * (4 + 8)))
    assert sent.exchange.inter == 0
    again = traffic(MODERN, layout, run._replace(recompute="full"), H200, 4)
    assert again.exchange.calls == 2 * 2 * 8
    every = traffic(MODERN, layout, run._replace(sync_every_micro=True), H200, 4)
    assert every.reduce.sent == 2 * sent.reduce.sent


def test_one_rank_sends_nothing() -> None:
    assert all(flow == Flow() for flow in traffic(MODERN, Layout(), Run(32, 1, 1, 4), H200, 1))


def test_tensor_parallel_bytes_in_numbers() -> None:
    """DENSE, tp 2: each of 3 layers gathers and scatters twice forward and backward, and both ends of the model; the
    gradients of its two norms of heads are summed."""
    sent = traffic(DENSE, Layout(tp=2), Run(32, 2, 1, 2), H200, 2).tensor
    slice_bytes = 32 * DENSE.dim * 2
    assert sent.calls == 4 * 6 + 4 + 3 + 3 * 2
    assert sent.sent == (4 * 6 + 4) * slice_bytes + 3 * 2 * 4 * 32 + 3 * 2 * 2 * DENSE.width_per_head


POWERS = st.sampled_from([1, 2, 4, 8])


def _round(scale: int) -> ModelConfig:
    moe = MoEConfig(top_k=2, hidden=64 * scale, residual=True)
    return replace(MODERN, dim=128, hidden=256, heads=8, kv_heads=8, qk_norm="none", experts=(0, 8, 8), moe=moe)


@given(POWERS, POWERS, st.sampled_from([1, 2, 4]), st.sampled_from(["none", "selective", "full"]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_more_ranks_never_need_more_memory(shards: int, ep: int, tp: int, recompute: Recompute, even: bool) -> None:
    """At a fixed global batch, where every dimension divides, and beyond one rank (which keeps no copies)."""
    config = TrainConfig(
        model=_round(1 + even),
        seq_len=64,
        batch_size=32,
        micro_batch=1,
        parallel=ParallelConfig(dtype="bfloat16", recompute=recompute),
    )
    peaks = []
    for number in (2 * shards, 4 * shards):
        layout = Layout(1, number, tp, min(ep, number * tp))
        run = run_of(config, layout, H200)
        peaks.append(memory(config.model, Layout(1, number, tp, min(ep, 2 * shards * tp)), run).peak)
    assert peaks[1] <= peaks[0]


@given(POWERS, POWERS, POWERS)
@settings(max_examples=60, deadline=None)
def test_copies_cost_memory_and_experts_apart_save_fetches(shards: int, copies: int, ep: int) -> None:
    config, run = _round(1), Run(64, 1, 1, 2)
    world = 8 * copies
    one, more = Layout(1, world, ep=ep), Layout(copies, 8, ep=ep)
    assert memory(config, more, run).parameters >= memory(config, one, run).parameters
    spread, together = Layout(1, 8, ep=8), Layout(1, 8, ep=ep)
    assert memory(config, spread, run).peak <= memory(config, together, run).peak
    assert traffic(config, spread, run, H200, 8).gather.sent <= traffic(config, together, run, H200, 8).gather.sent


@given(st.integers(2, 64), st.integers(1, 8), st.integers(1, 1 << 30))
def test_a_second_node_never_makes_a_ring_faster(ranks: int, nodes: int, size: int) -> None:
    near, far = (ring(Span(ranks, n), size, H200.ring("gather")).seconds for n in (1, min(nodes, ranks)))
    assert near <= far * (1 + 1e-9)
