"""Placements: what is refused, how copies are chosen, what a score counts, and what any plan must keep."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.benchmarks.placement_peers import eplb
from coterie.benchmarks.placement_routes import Source
from coterie.infer.placement import Cluster, Placement, moved, round_robin
from coterie.infer.placement_moves import adopt, align, follow, match
from coterie.infer.placement_plan import plan
from coterie.infer.placement_score import DECODE, PREFILL, Aim, costs, score
from coterie.infer.replicas import concentrate, spread
from coterie.infer.routes import Recorder, Routes

QUICK = settings(max_examples=10, deadline=None, derandomize=True)


@pytest.fixture(autouse=True, scope="module")
def _impatient():
    """A short last search: these tests are about what holds for any plan."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coterie.infer.placement_polish.PATIENCE", 3)
        yield


@st.composite
def clusters(draw) -> tuple[Cluster, tuple[int, ...]]:
    """A small cluster, and experts that fit."""
    nodes, ranks = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    slots = draw(st.integers(1, 3))
    experts = tuple(draw(st.lists(st.integers(1, nodes * ranks * slots), min_size=1, max_size=3)))
    least = sum(-(-count // (nodes * ranks)) for count in experts)
    copies = draw(st.none() | st.integers(least, least + 5))
    return Cluster(nodes, ranks, slots, copies), experts


@st.composite
def recordings(draw, experts: tuple[int, ...], steps: int = 3) -> Routes:
    """Any loads, with steps and layers that have none, and any tokens."""
    dice = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    top_k, sparse = draw(st.integers(1, 3)), draw(st.sampled_from([0.0, 0.5, 0.95]))
    recorder = Recorder(experts, top_k, sampled=3)
    for _ in range(steps):
        loads = [np.where(dice.random(E) < sparse, 0, dice.integers(0, 50, E) ** 2) for E in experts]
        ids_LTK = np.full((len(experts), 4, top_k), -1)
        for layer, E in enumerate(experts):
            for t in range(4):
                some = dice.choice(E, min(E, top_k), replace=False)
                ids_LTK[layer, t, : len(some)] = some
        recorder.add(loads, ids_LTK[:, : dice.integers(1, 5)], 0)
    routes = recorder.routes()
    routes.loads_SLE[0, :, 0] += 1  # a plan needs something
    return routes


cases = clusters().flatmap(lambda case: st.tuples(st.just(case[0]), recordings(case[1])))
aims = st.sampled_from([PREFILL, DECODE, Aim(crossings=0), Aim(1, 1, 1, follow=True)])


@QUICK
@given(cases, aims)
def test_every_plan_is_whole_fits_and_repeats(case, aim) -> None:
    cluster, routes = case
    found = plan(routes, cluster, aim)
    found.check(cluster)  # Placement itself checks that every expert is somewhere and no rank has one twice
    np.testing.assert_array_equal(found.slots_LRC, plan(routes, cluster, aim).slots_LRC)
    room = np.array(cluster.room(routes.experts))
    if cluster.copies is None:  # slots are filled as far as other ranks' experts go
        np.testing.assert_array_equal((found.slots_LRC >= 0).sum(2).min(1), room)


@QUICK
@given(cases, aims, st.integers(0, 40))
def test_movement_is_bounded_and_never_costs(case, aim, moves) -> None:
    cluster, routes = case
    present = round_robin(routes.experts, cluster)
    found = plan(routes, cluster, aim, present=present, moves=moves)
    found.check(cluster)
    assert moved(present, found).sum() <= moves
    free = plan(routes, cluster, aim, present=present)
    before, bounded, after = (costs(p, routes, aim) for p in (present, found, free))
    assert (bounded <= before).all()
    assert (after <= bounded).all()
    again = plan(routes, cluster, aim, present=free)
    np.testing.assert_array_equal(again.slots_LRC, free.slots_LRC)


@QUICK
@given(cases)
def test_a_score_equals_loops(case) -> None:
    cluster, routes = case
    placement = plan(routes, cluster)
    told = score(placement, routes)
    N, R = placement.nodes, placement.ranks
    prefill = decode = 0.0
    ratios, crossed, followed = [], 0, 0
    targets = [spread(held_RE, N) for held_RE in placement.held_LRE]
    for step in routes.loads_SLE.astype(int):
        for layer, loads_E in enumerate(step):
            held_RE = placement.held_LRE[layer]
            tokens = [sum(loads_E[e] / held_RE[:, e].sum() for e in np.flatnonzero(held_RE[r])) for r in range(R)]
            chosen = concentrate(loads_E[None], held_RE)[0].tolist()
            prefill += max(tokens)
            decode += max(chosen.count(r) for r in range(R))
            ratios += [max(tokens) / (sum(tokens) / R)] if sum(tokens) else []
    sample = [token_LK for step in routes.tokens_SMLK for token_LK in step if (token_LK >= 0).any()]
    for t, token_LK in enumerate(sample):
        home = at = t % R
        for layer, ids in enumerate(token_LK):
            ids = [e for e in ids if e >= 0]
            crossed += len({targets[layer][home, e] * N // R for e in ids} - {home * N // R})
            nodes = [targets[layer][at, e] * N // R for e in ids]
            followed += len(set(nodes) - {at * N // R})
            if ids:
                followed += len(set(nodes)) - 1
                at = nodes[0] * (R // N) + at % (R // N)
    per = len(sample) * len(routes.experts)
    assert (told.prefill, told.decode) == (pytest.approx(prefill), decode)
    assert told.imbalance == pytest.approx(np.mean(ratios))
    assert (told.crossings, told.following) == (pytest.approx(crossed / per), pytest.approx(followed / 2 / per))


def any_held(dice: np.random.Generator, ranks: int, experts: int) -> np.ndarray:
    held_RE = dice.random((ranks, experts)) < 0.3
    held_RE[dice.integers(0, ranks, experts), np.arange(experts)] = True
    return held_RE


@QUICK
@given(st.integers(0, 1 << 30), st.integers(1, 3), st.integers(1, 4))
def test_spread_is_local_balanced_and_holds_the_expert(seed, nodes, ranks) -> None:
    held_RE = any_held(np.random.default_rng(seed), nodes * ranks, 6)
    target_PE, P = spread(held_RE, nodes), nodes * ranks
    for e in range(6):
        holders = np.flatnonzero(held_RE[:, e])
        served = np.bincount(target_PE[:, e], minlength=P)
        assert served[~held_RE[:, e]].sum() == 0
        assert served[holders].max() - served[holders].min() <= 1
        assert (target_PE[holders, e] == holders).all()
        for p in range(P):  # who crosses to another node found its own node's copies taken by that node's ranks
            if target_PE[p, e] // ranks != p // ranks:
                mine = [h for h in holders if h // ranks == p // ranks]
                assert all(q // ranks == p // ranks for q in range(P) if target_PE[q, e] in mine)


@QUICK
@given(st.integers(0, 1 << 30), st.integers(1, 8))
def test_concentrate_computes_each_expert_once_where_it_is(seed, ranks) -> None:
    dice = np.random.default_rng(seed)
    held_RE, loads_BE = any_held(dice, ranks, 12), dice.integers(0, 3, (4, 12))
    rank_BE = concentrate(loads_BE, held_RE)
    assert ((rank_BE >= 0) == (loads_BE > 0)).all()
    for b, e in np.argwhere(rank_BE >= 0):
        assert held_RE[rank_BE[b, e], e]
    for b in range(4):  # a step's choice does not depend on the steps beside it
        np.testing.assert_array_equal(concentrate(loads_BE[b : b + 1], held_RE)[0], rank_BE[b])


def fewest(active: list[int], held_RE: np.ndarray) -> int:
    """The least maximum: a matching of experts to ranks with so much room each, by augmenting paths."""
    for room in range(1, len(active) + 1):
        at: dict[int, list[int]] = {r: [] for r in range(len(held_RE))}

        def put(e: int, seen: set[int], at=at, room=room) -> bool:
            for r in np.flatnonzero(held_RE[:, e]):
                if r not in seen:
                    seen.add(r)
                    if len(at[r]) < room or any(put(f, seen) and not at[r].remove(f) for f in list(at[r])):
                        at[r].append(e)
                        return True
            return False

        if all(put(e, set()) for e in active):
            return room
    return 0


def test_concentrate_is_close_to_the_best_matching() -> None:
    dice = np.random.default_rng(0)
    ours = best = 0
    for _ in range(30):
        held_RE, loads_E = any_held(dice, 8, 24), dice.integers(0, 3, 24)
        ours += np.bincount(concentrate(loads_E[None], held_RE)[0] + 1, minlength=9)[1:].max()
        best += fewest(np.flatnonzero(loads_E).tolist(), held_RE)
    assert best <= ours <= 1.03 * best


def beside_eplb(zipf: float, kind: str, aim: Aim, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """What each layer costs in the window of both plans: ours, and EPLB's with our choice of copies."""
    routes = Source(32, 4, 2, zipf, kind, tokens, 16).routes()
    theirs = []
    for layer in range(2):
        copies_RE = eplb(routes.loads_SLE[:, layer].sum(0), 40, 2, 8)
        rows = [np.flatnonzero(row).tolist() for row in copies_RE]
        filled = np.array([[row + [-1] * (5 - len(row)) for row in rows]])
        theirs.append(costs(Placement(filled, (32,), 2), routes.layers([layer]), aim)[0])
    return costs(plan(routes, Cluster(2, 4, 5), aim), routes, aim), np.array(theirs)


KINDS = [(zipf, kind) for zipf in (0.6, 1.4) for kind in ("steady", "drifting", "bursty")]


@pytest.mark.parametrize(("zipf", "kind"), KINDS)
def test_no_plan_for_prefill_is_worse_than_eplb_on_its_own_window(zipf, kind) -> None:
    ours, theirs = beside_eplb(zipf, kind, Aim(crossings=0), 256)
    assert (ours <= theirs + 1e-9).all()


def test_plans_for_decode_are_better_than_eplb_on_average() -> None:
    """Single layers can be worse: there the planner evens out chances and does not search."""
    pairs = [beside_eplb(zipf, kind, Aim(0, 1, 0), 24) for zipf, kind in KINDS]
    assert sum(ours.sum() for ours, _ in pairs) < sum(theirs.sum() for _, theirs in pairs)


def test_experts_that_meet_are_kept_apart_where_steps_are_small() -> None:
    """Tokens choose e and e + 16, one token a step: a rank that holds both computes two experts."""
    recorder = Recorder([32], 2)
    for step in range(64):
        both = np.array([step % 16, step % 16 + 16])
        recorder.add([np.bincount(both, minlength=32)], both[None, None], 0)
    routes = recorder.routes()
    assert score(plan(routes, Cluster(2, 8, 2), DECODE), routes).activated == 1


def test_small_recordings_are_looked_at_whole() -> None:
    """Of 128 steps 32 evenly spread ones make another expert the busiest."""
    loads_SLE = np.ones((128, 1, 8), np.uint32)
    seen = np.linspace(0, 127, 32).astype(int)
    loads_SLE[:, :, 5] = 9
    loads_SLE[seen, :, 5], loads_SLE[seen, :, 2] = 1, 9
    routes = Routes(loads_SLE, np.full((128, 1, 1, 1), -1, np.int16), np.zeros(128, np.uint32), (8,))
    assert plan(routes, Cluster(1, 3, 3)).copies_LE[0].tolist() == [1, 1, 1, 1, 1, 2, 1, 1]


def test_crossing_less_is_planned_for() -> None:
    routes = Source(32, 4, 2, 0.6, "steady", 256, 16).routes()
    near, far = (score(plan(routes, Cluster(4, 2, 5), Aim(crossings=c)), routes) for c in (1.0, 0.0))
    assert near.crossings < 0.95 * far.crossings


def test_nodes_are_named_so_that_tokens_stay() -> None:
    """Four groups of experts, and a token has one group in all layers: named well, no token ever leaves its node."""
    recorder = Recorder([16] * 4, 2, sampled=16)
    dice = np.random.default_rng(0)
    for _ in range(8):
        ids_LTK = np.empty((4, 16, 2), np.int64)
        for layer in range(4):
            for t in range(16):
                # Another numbering of the groups in each layer, so that nothing lines up by itself.
                ids_LTK[layer, t] = 4 * ((t % 4 * (2 * layer + 1) + layer) % 4) + dice.choice(4, 2, replace=False)
        recorder.add([np.bincount(ids.ravel(), minlength=16) for ids in ids_LTK], ids_LTK, 0)
    routes, cluster = recorder.routes(), Cluster(4, 2, 2)
    named, other = (plan(routes, cluster, Aim(crossings=2, follow=f)) for f in (True, False))
    assert score(named, routes).following < 0.25 < score(other, routes).following
    np.testing.assert_allclose(costs(named, routes, Aim()), costs(other, routes, Aim()))


def test_layers_that_win_the_most_for_a_copy_come_first() -> None:
    present = Placement(np.array([[[0], [1]]] * 4), (2,) * 4)
    fresh = Placement(np.array([[[1], [0]]] * 4), (2,) * 4)
    before, after = np.array([4.0, 4.0, 4.0, 4.0]), np.array([3.0, 5.0, 1.0, 4.0])

    def taken(moves: int | None) -> list[int]:
        return np.flatnonzero(moved(present, adopt(present, fresh, before, after, moves))).tolist()

    assert [taken(moves) for moves in (None, 4, 3, 2, 1)] == [[0, 2], [0, 2], [2], [2], []]


def test_aligning_finds_the_present_again() -> None:
    routes = Source(32, 4, 2, 1.0, "steady", 64, 4).routes()
    placement = plan(routes, Cluster(2, 4, 5))
    mixed = Placement(placement.slots_LRC[:, [6, 4, 7, 5, 1, 3, 0, 2]], placement.experts, 2)
    assert moved(placement, mixed).sum() > 0
    assert moved(placement, align(mixed, placement)).sum() == 0


def test_follow_and_match_lose_nobody() -> None:
    worth = np.random.default_rng(0).random((3, 5, 5))
    assert (np.sort(match(worth), axis=1) == np.arange(5)).all()
    routes = Source(16, 2, 3, 1.0, "steady", 64, 4).routes()
    placement = plan(routes, Cluster(4, 1, 5))
    again = follow(placement, routes.transitions_LEE)
    for before, after in zip(placement.slots_LRC, again.slots_LRC, strict=True):
        assert sorted(map(tuple, before.tolist())) == sorted(map(tuple, after.tolist()))


def test_round_robin_is_how_expert_parallelism_lays_out() -> None:
    found = round_robin((8, 4), Cluster(2, 2, 2))
    assert found.slots_LRC[0].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert found.slots_LRC[1].tolist() == [[0, 1], [1, 2], [2, 3], [0, 3]]


def test_memory_goes_to_the_layers_that_need_it() -> None:
    cluster = Cluster.of_bytes(1, 4, 3, rank_bytes=70, expert_bytes=10)
    assert cluster.copies == 7
    assert cluster.room((8, 8)) == (3, 3)
    assert Cluster(1, 4, 3, 5).room((8, 8)) == (3, 2)
    assert Cluster(1, 4, 3, 5).room((8, 8), (1.0, 2.0)) == (2, 3)
    assert Cluster(1, 4, 3, 5).room((8, 2), (9.0, 2.0)) == (3, 2)


SLOTS = np.array([[[0, 1], [2, 3]]])


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: Cluster(1, 0, 2), "hold nothing"),
        (lambda: Cluster(1, 2, 2).room((5,)), "need 3 slots"),
        (lambda: Cluster(1, 2, 2, 3).room((4, 4)), "need 2 slots and 4 copies on each of 2 ranks"),
        (lambda: Placement(SLOTS.astype(float), (4,)), "whole numbers"),
        (lambda: Placement(SLOTS, (4, 4)), "whole numbers"),
        (lambda: Placement(SLOTS, (4,), 3), "over 3 nodes"),
        (lambda: Placement(SLOTS, (3,)), "does not have"),
        (lambda: Placement(SLOTS - 2, (4,)), "does not have"),
        (lambda: Placement(SLOTS, (5,)), "expert 4 of layer 0 is on no rank"),
        (lambda: Placement(np.array([[[0, 0], [1, 2]]]), (3,)), "twice"),
        (lambda: Placement(SLOTS, (4,)).check(Cluster(1, 3, 2)), "is not one on"),
        (lambda: Placement(SLOTS, (4,)).check(Cluster(1, 2, 1)), "has 1 slots"),
        (lambda: Placement(SLOTS, (4,)).check(Cluster(1, 2, 2, 1)), "memory for 1"),
        (lambda: plan(Recorder([4], 2).routes(), Cluster(1, 2, 2)), "no step with tokens"),
        (lambda: score(Placement(SLOTS, (4,)), Recorder([5], 2).routes()), "is not one for routes"),
    ],
)
def test_what_cannot_be_is_refused(made, words) -> None:
    with pytest.raises(ValueError, match=words):
        made()


def test_a_present_placement_of_something_else_is_refused() -> None:
    routes = Source(8, 2, 1, 1.0, "steady", 8, 2).routes()
    with pytest.raises(ValueError, match="different layers"):
        plan(routes, Cluster(1, 2, 4), present=Placement(SLOTS, (4,)))
