"""The formulas of the exchanges against plain loops over tokens, and the choice that follows from them."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.parallel.cost import Batch, Rate, choose_exchange, expect, observe, phases, seconds, sent
from coterie.parallel.traffic import Nodes, Sent, find_nodes, launched_per_node, link

SLOW = {"intra": Rate(1e-5, 1e10), "inter": Rate(1e-3, 1e8, 1e-4)}


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Nodes, Batch, list[np.ndarray]]:
    nodes = Nodes(draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    experts = nodes.ranks * draw(st.integers(1, 3))
    top_k = draw(st.integers(1, min(4, experts)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ids = []
    for _ in range(nodes.ranks):
        tokens = int(rng.integers(0, 6))
        chosen = [rng.permutation(experts)[:top_k] for _ in range(tokens)]
        ids_TK = np.array(chosen, int).reshape(tokens, top_k)
        ids.append(np.where(rng.random(ids_TK.shape) < 0.2, -1, ids_TK))
    return nodes, Batch(0, draw(st.integers(1, 5)), top_k, experts), ids


def _bytes(matrices: list[np.ndarray], nodes: Nodes) -> Counter:
    total: Counter = Counter()
    for rank in range(nodes.ranks):
        total += Counter({kind: s.bytes for kind, s in sent(matrices, nodes, rank).items()})
    return total


@settings(deadline=None, max_examples=60)
@given(worlds())
def test_bytes_are_those_of_a_loop_over_tokens(world: tuple[Nodes, Batch, list[np.ndarray]]) -> None:
    nodes, batch, ids = world
    routed, row, here = observe(ids, batch.experts, nodes), batch.dim * 4, batch.experts // nodes.ranks
    flat, within, crossing = Counter(), Counter(), Counter()
    for p, ids_TK in enumerate(ids):
        for token in ids_TK:
            targets = [int(e) // here for e in token if e >= 0]
            for q in targets:
                flat[link(p, q, nodes.per_node)] += row
                middle = p // nodes.per_node * nodes.per_node + q % nodes.per_node
                within[link(p, middle, nodes.per_node)] += row
            for m in {q // nodes.per_node for q in targets}:
                there = m * nodes.per_node + p % nodes.per_node
                crossing[link(p, there, nodes.per_node)] += row + 4 * batch.top_k
    if nodes.ranks > 1:
        assert _bytes(phases("flat", routed, nodes, batch)[1:2], nodes) == flat
    two = nodes.nodes > 1 and nodes.per_node > 1
    if two:
        assert _bytes(phases("hierarchical", routed, nodes, batch)[2:3], nodes) == within
        assert _bytes(phases("deduplicated", routed, nodes, batch)[2:3], nodes) == crossing


@settings(deadline=None, max_examples=60)
@given(worlds())
def test_hierarchy_keeps_the_bytes_between_nodes_and_few_messages(
    world: tuple[Nodes, Batch, list[np.ndarray]],
) -> None:
    nodes, batch, ids = world
    routed = observe(ids, batch.experts, nodes)
    flat, steps = phases("flat", routed, nodes, batch)[1:], phases("hierarchical", routed, nodes, batch)
    rows = steps[len(steps) // 5 :]
    assert len(rows) == 4 * (len(steps) // 5)
    assert _bytes(rows, nodes)["inter"] == _bytes(flat, nodes)["inter"]
    assert sum(_bytes(rows, nodes).values()) <= 2 * sum(_bytes(flat, nodes).values())
    for rank in range(nodes.ranks):
        messages = sum(s.messages for s in sent(rows, nodes, rank).values())
        assert messages <= 4 * (nodes.per_node + nodes.nodes)
        assert sent(rows, nodes, rank)["inter"].messages <= 4 * (nodes.nodes - 1)


@settings(deadline=None, max_examples=30)
@given(worlds())
def test_backward_costs_two_exchanges_of_rows(world: tuple[Nodes, Batch, list[np.ndarray]]) -> None:
    nodes, batch, ids = world
    routed = observe(ids, batch.experts, nodes)
    for name in ("flat", "hierarchical", "deduplicated"):
        both, forward = (phases(name, routed, nodes, batch, backward) for backward in (True, False))
        assert all((a == b).all() for a, b in zip(both, forward, strict=False))
        assert (
            (sum(both) - sum(forward)).sum()
            == 2
            * routed.rows_PP.sum()
            * batch.dim
            * 4
            * ((nodes.nodes > 1) + (nodes.per_node > 1) if name == "hierarchical" else nodes.ranks > 1)
            if nodes.ranks > 1
            else not both
        )


def test_even_routing_is_what_many_tokens_show() -> None:
    nodes, batch = Nodes(2, 4), Batch(4000, 8, 3, 16)
    rng = np.random.default_rng(0)
    ids = [np.stack([rng.permutation(16)[:3] for _ in range(4000)]) for _ in range(8)]
    for mean, counted in zip(expect(batch, nodes), observe(ids, 16, nodes), strict=True):
        np.testing.assert_allclose(mean, counted, rtol=0.1)


def test_a_phase_takes_its_slowest_ranks_time() -> None:
    matrix = np.array([[0, 100, 50, 0], [0, 0, 0, 0], [0, 0, 7, 0], [0, 0, 0, 0]])
    rates = {"intra": Rate(1.0, 100.0), "inter": Rate(2.0, 10.0, 0.5)}
    assert seconds([matrix, matrix], Nodes(2, 2), rates) == pytest.approx(2 * (2.0 + 1.0 + 0.5 + 5.0))
    assert sent([matrix], Nodes(2, 2), 0) == {"self": Sent(), "intra": Sent(1, 100), "inter": Sent(1, 50)}


def test_the_choice_follows_latency_and_bandwidth() -> None:
    nodes = Nodes(4, 8)
    few, many = Batch(4, 512, 2, 128), Batch(8192, 4096, 8, 128, 2)
    slow = {"intra": Rate(1e-5, 1e11), "inter": Rate(1e-4, 1e9, 1e-4)}
    assert choose_exchange(few, nodes, slow).name == "hierarchical"
    assert choose_exchange(many, nodes, slow).name == "deduplicated"
    one = many._replace(top_k=1)  # no token goes to two ranks: nothing to leave out
    free = {kind: rate._replace(message=0.0) for kind, rate in slow.items()}
    assert choose_exchange(one, nodes, free).name == "flat"
    assert choose_exchange(one, Nodes(1, 8), free).name == "flat"
    forced = choose_exchange(many, nodes, slow, override="flat")
    assert forced.name == "flat"
    assert forced.predictions == choose_exchange(many, nodes, slow).predictions
    assert str(forced).startswith("exchange flat (deduplicated ")
    with pytest.raises(ValueError, match="exchange 'fast' is not one of flat, hierarchical, deduplicated"):
        choose_exchange(many, nodes, slow, override="fast")


def test_nodes_are_found_from_global_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_nodes(range(8), 4) == Nodes(2, 4)
    assert find_nodes([4, 5, 6, 7], 4) == Nodes(1, 4)
    assert find_nodes([0, 2, 4, 6], 4) == Nodes(2, 2)  # a group that takes every second rank
    assert find_nodes([1, 5, 9], 4) == Nodes(3, 1)
    assert find_nodes(range(6), 4) is None
    assert find_nodes([0, 4, 1, 5], 4) is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert launched_per_node(16) == 4
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert launched_per_node(16) == 16
