"""Experts are planned and sent where that pays, in slices, and a plan that fails costs nothing but itself."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from coterie.infer import replan
from coterie.infer.moving import Movers, unpack_pieces, unpack_slots
from coterie.infer.replan import Replanner
from coterie.infer.wire import Kind
from coterie.moe.experts import Experts

EXPERTS, LAYERS = 8, 2
SKEWED = [[90, 80, 70, 60, 1, 1, 1, 1]] * LAYERS
"""All that is asked for lies on the first of two shares."""


class FakeFleet:
    """Says nothing to nobody, and keeps it."""

    def __init__(self) -> None:
        owns: Any = [SimpleNamespace(even=EXPERTS // 2, shares=2, slots=EXPERTS // 2)] * LAYERS
        self.movers = Movers([Experts(16, 8, EXPERTS // 2) for _ in range(LAYERS)], owns)
        self.model = SimpleNamespace(embed=SimpleNamespace(weight=torch.zeros(1)))
        self.said: list[tuple[Kind, list[int]]] = []

    def say(self, kind: Kind, numbers: Any = ()) -> None:
        self.said.append((kind, list(numbers)))
        if kind is Kind.PLACE:
            layer, slots_PC = unpack_slots(numbers)
            self.movers.slots[layer] = slots_PC


@pytest.fixture
def fleet() -> FakeFleet:
    return FakeFleet()


def _replanner(fleet: FakeFleet, **settings: Any) -> Replanner:
    return Replanner(fleet, [EXPERTS] * LAYERS, 2, **{"every": 4, "most": 1 << 20, **settings})  # type: ignore[arg-type]


def _steps(replanner: Replanner, loads: list[list[int]], seconds: float, count: int = 4) -> None:
    for _ in range(count):
        replanner.seen(loads, sum(loads[0]) // 2, seconds)
        replanner.tick()
    assert replanner._plan is not None
    replanner._plan.exception()  # waits for it


def _ticks(replanner: Replanner) -> Iterator[None]:
    replanner.tick()
    while replanner.moving:
        replanner.tick()
        yield


def test_experts_come_in_slices_and_are_placed_when_all_are_there(fleet: FakeFleet) -> None:
    most = 1000  # bytes: an expert has 4 * (2 * 8 * 16 + 8 * 16)
    replanner = _replanner(fleet, most=most)
    _steps(replanner, SKEWED, 10.0)
    assert len(list(_ticks(replanner))) > 4
    moved = [0] * LAYERS
    for kind, numbers in fleet.said:
        if kind is Kind.MOVE:
            pieces = unpack_pieces(numbers)
            for share in range(2):
                assert 4 * sum(p.end - p.begin for p in pieces if p.fetch.share == share) <= most
            moved[pieces[0].layer] += sum(p.end - p.begin for p in pieces)
        elif kind is Kind.PLACE:
            layer = numbers[0]
            assert moved[layer] % sum(fleet.movers.sizes(layer)) == 0
            assert moved[layer] > 0
    placed = [numbers[0] for kind, numbers in fleet.said if kind is Kind.PLACE]
    assert placed == [0, 1]
    assert (replanner.plans, replanner.moves) == (1, sum(moved) // sum(fleet.movers.sizes(0)))
    for slots_PC in fleet.movers.slots:
        assert slots_PC is not None
        assert sorted(sum(expert < 4 for expert in row) for row in slots_PC) == [2, 2]


@pytest.mark.parametrize(
    ("loads", "seconds"),
    [([[9] * EXPERTS] * LAYERS, 10.0), ([[11, 11, *[10] * 6]] * LAYERS, 1e4), (SKEWED, 1e-9)],
    ids=["nothing to win", "next to nothing to win", "the move takes longer"],
)
def test_what_does_not_pay_is_left(fleet: FakeFleet, loads: list[list[int]], seconds: float) -> None:
    replanner = _replanner(fleet)
    _steps(replanner, loads, seconds)
    assert not list(_ticks(replanner))
    assert not fleet.said
    assert replanner.plans == 0


def test_a_plan_that_fails_costs_nothing_but_itself(fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    replanner = _replanner(fleet)
    with monkeypatch.context() as broken:
        broken.setattr(replan, "plan", lambda *_, **__: 1 / 0)
        _steps(replanner, SKEWED, 10.0)
        assert not list(_ticks(replanner))
    _steps(replanner, SKEWED, 10.0)
    assert list(_ticks(replanner))
    assert replanner.plans == 1


def test_experts_that_lie_on_one_share_are_refused(fleet: FakeFleet) -> None:
    fleet.movers.slots[1] = None
    with pytest.raises(ValueError, match="experts can move where every MoE layer has them on the same ranks"):
        _replanner(fleet)


def test_a_slow_link_gets_one_turn_at_a_time(fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replan, "TURN", 500)
    clock = iter(float(second) for second in range(10**6))  # each message takes a second
    monkeypatch.setattr(replan.time, "perf_counter", lambda: next(clock))
    replanner = _replanner(fleet)
    _steps(replanner, SKEWED, 1.0)
    list(_ticks(replanner))
    for kind, numbers in fleet.said:
        for share in range(2):
            sent = (
                [4 * (p.end - p.begin) for p in unpack_pieces(numbers) if p.fetch.share == share]
                if kind is Kind.MOVE
                else []
            )
            assert sum(sent) <= 500


def test_a_fast_link_gets_as_much_as_a_tenth_of_a_step_takes(
    fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replan, "TURN", 500)
    clock = iter(second / 1000 for second in range(10**6))
    monkeypatch.setattr(replan.time, "perf_counter", lambda: next(clock))
    replanner = _replanner(fleet)
    _steps(replanner, SKEWED, 1.0)
    replanner.tick()
    sizes = []
    while replanner.moving:
        replanner.seen(SKEWED, 100, 0.05)  # 5 ms for what takes 1 ms a turn
        replanner.tick()
        kind, numbers = fleet.said[-2:][0]
        if kind is Kind.MOVE:
            sizes.append(sum(4 * (p.end - p.begin) for p in unpack_pieces(numbers) if p.fetch.share == 0))
    assert sizes[0] <= 500
    assert 500 < max(sizes) <= 2500
