"""The budget of a step: from how long steps take, without a model."""

import dataclasses
from collections import Counter
from types import SimpleNamespace

import pytest
from engines import CONFIG, ask, drain, engine, model, prompt, recomputed
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.infer.budget import LEAST, PATIENCE, Point, StepTimes
from coterie.infer.config import EngineConfig
from coterie.infer.engine import Engine
from coterie.infer.scheduler import Scheduler
from coterie.infer.step import Step


class Machine:
    """A runner with a clock of its own: a step costs so much, whatever else happens."""

    def __init__(
        self, base=1e-3, token=1e-4, row=0.0, key=0.0, expert=0.0, blocks=400, size=16, positions=2048, noise=0.0
    ):
        self.pool = SimpleNamespace(blocks=blocks, size=size)
        self.config = SimpleNamespace(vocab_size=50, max_positions=positions)
        self.costs, self.noise = (base, token, row, key, expert), noise
        self.now, self.steps = 0.0, list[Step]()
        self.written: set[int] = set()

    def clock(self) -> float:
        return self.now

    def run(self, step: Step, *, loads: bool = False):
        base, token, row, key, expert = self.costs
        size, new = self.pool.size, Counter[int]()
        for piece in step.slices:
            assert len(piece.blocks) * size >= piece.start + len(piece.tokens)
            assert all(0 <= block < self.pool.blocks for block in piece.blocks)
            assert all(0 <= t < 50 for t in piece.tokens)
            assert piece.start + len(piece.tokens) <= self.config.max_positions
            assert set(piece.blocks[: piece.start // size]) <= self.written, "what was never computed is read"
            new.update(set(piece.blocks[piece.start // size :]))
        assert max(new.values()) == 1, "two slices write one block"
        self.written |= set(new)
        visited = 16 * (1 - (1 - 1 / 8) ** step.tokens)
        keys = sum(piece.start for piece in step.slices)
        cost = base + token * step.tokens + row * (len(step.slices) - 1) + key * keys + expert * visited
        self.steps.append(step)
        self.now += cost * (1 + self.noise * (hash((len(self.steps), 3)) % 7))
        return SimpleNamespace(loads=((1,) * round(visited) + (0,) * 3, (1,) * round(visited)))

    def measure(self, **settings) -> StepTimes:
        return StepTimes.measure(self, clock=self.clock, **settings)


def test_what_a_step_costs_is_found() -> None:
    machine = Machine(base=2e-3, token=5e-5, row=1e-5, key=3e-8, expert=1e-4)
    times = machine.measure()
    assert machine.now < 1.5
    for tokens in (1, 3, 17, 64, 200):
        exact = 2e-3 + 5e-5 * tokens + 1e-4 * 16 * (1 - (7 / 8) ** tokens)
        assert times.predict(tokens) == pytest.approx(exact, rel=0.05)
        more = times.predict(tokens + 32, 32, 32 * 500) - times.predict(tokens + 32)
        assert more == pytest.approx(31e-5 + 3e-8 * 16000, rel=0.3)
    visited = [distinct for *_, distinct in times.table()]
    assert visited == sorted(visited)
    assert visited[-1] == 16


def test_the_budget_fills_the_target_and_no_more() -> None:
    times = Machine(base=2e-3, token=1e-4, row=1e-5, key=1e-8).measure()
    budget = times.budget(0.05)
    tokens = budget(8, 8 * 300)
    assert times.predict(tokens, 8, 2400) <= 0.05 < times.predict(tokens + 1, 8, 2400)
    assert budget(8, 80_000) < budget(8, 2400) < budget(0, 0)
    assert times.predict(budget(0, 0)) <= PATIENCE
    assert times.budget(1e-9)(5, 5) == 5 + LEAST  # prompts get on in any case
    assert times.budget(1e-9, each=4)(5, 5) == 20 + LEAST
    assert times.budget(3600)(5, 5) == times.most


def test_a_prompt_that_would_be_late_hurries_the_step() -> None:
    times = Machine(base=2e-3, token=1e-4, row=1e-5, key=1e-8).measure()
    budget = times.budget(0.05, 0.2)
    calm = budget(8, 2400)
    pace = (calm - 8) / 0.05
    assert times.predict(calm, 8, 2400) <= 0.05
    assert budget(8, 2400, [(100, 1.0), (int(0.4 * pace * 2), 2.0)]) == calm
    for due in ([(int(0.6 * pace * 2), 2.0)], [(1, 9.0), (int(0.6 * pace), 1.0)], [(1, 0.0)], [(1, -5.0)]):
        hurried = budget(8, 2400, due)
        assert times.predict(hurried, 8, 2400) <= 0.2 < times.predict(hurried + 1, 8, 2400)
    assert times.budget(0.05)(8, 2400, [(10**6, -1.0)]) == calm  # nobody allowed more
    assert budget(0, 0, [(10**6, -1.0)]) == budget(0, 0)


def test_a_slow_machine_is_not_measured_for_long() -> None:
    machine = Machine(base=0.7, token=0.2)
    times = machine.measure()
    assert machine.now < 5
    assert times.predict(100) >= 100 * 0.2
    assert times.budget(0.05)(3, 0) == 3 + LEAST


def test_a_pool_of_one_block_is_enough() -> None:
    times = Machine(blocks=1, size=4).measure()
    assert [point.tokens for point in times.points] == [1, 2, 4]
    assert times.budget(10)(0, 0) == times.most
    assert Machine(positions=3).measure().points


def test_steps_that_are_served_correct_what_was_measured() -> None:
    busy, quiet = Machine(base=0.1, token=2e-3).measure(), Machine().measure()
    assert busy.budget(0.05)(4, 0) == 4 + LEAST
    for _ in range(400):
        tokens = busy.budget(0.05)(4, 0)
        busy.observe(tokens, 4, 0, quiet.predict(tokens, 4))
    assert busy.budget(0.05)(4, 0) == pytest.approx(quiet.budget(0.05)(4, 0), rel=0.15)
    before = quiet.budget(0.05)(4, 0)
    quiet.observe(before, 4, 0, 60.0)
    assert quiet.budget(0.05)(4, 0) > 0.8 * before  # once is nothing
    for _ in range(100):
        quiet.observe(tokens := quiet.budget(0.05)(4, 0), 4, 0, 3e-3 + 1e-3 * tokens)
    assert quiet.budget(0.05)(4, 0) == pytest.approx(47, rel=0.2)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 50), st.floats(0, 100)), max_size=30))
def test_no_step_upsets_the_times(steps) -> None:
    times = Machine().measure(most=2000)
    for tokens, decodes, seconds in steps:
        times.observe(tokens, decodes, 100 * decodes, seconds)
        curve = [times.predict(n) for n in range(1, 2001, 7)]
        assert curve == sorted(curve)
        assert curve[0] > 0
        assert times.budget(0.01)(3, 3) <= times.budget(0.02)(3, 3)


TIMES = st.builds(
    lambda steps, row, key, most: StepTimes(
        tuple(Point(2**i, sum(steps[: i + 1]), 0.0) for i in range(len(steps))), row, key, most
    ),
    st.lists(st.floats(1e-6, 0.1), min_size=1, max_size=8),
    st.floats(0, 1e-3),
    st.floats(0, 1e-6),
    st.integers(1, 2000),
)


@settings(max_examples=150, deadline=None)
@given(TIMES, st.floats(0, 2), st.floats(0, 2), st.integers(0, 200), st.integers(0, 10**6), st.integers(0, 10**6))
def test_more_time_gives_more_tokens_and_more_work_fewer(times, low, high, decodes, some, more) -> None:
    low, high, some, more = *sorted((low, high)), *sorted((some, more))
    small, large = times.budget(low), times.budget(high)
    assert 1 <= small(decodes, some) <= large(decodes, some)
    assert small(decodes, more) <= small(decodes, some)
    for budget in (small, large):
        assert budget(decodes, some) >= min(times.most, decodes + LEAST) or not decodes
        assert budget(decodes, some) <= times.most
    curve = [times.predict(tokens, decodes, some) for tokens in range(1, 600)]
    assert curve == sorted(curve)
    tokens = large(decodes, some)
    if decodes and tokens > decodes + LEAST:
        assert times.predict(tokens, decodes, some) <= high


@settings(max_examples=60, deadline=None)
@given(
    base=st.floats(1e-5, 0.5),
    token=st.floats(1e-7, 0.1),
    key=st.floats(0, 1e-6),
    noise=st.floats(0, 0.5),
    blocks=st.integers(1, 300),
    size=st.integers(1, 32),
    positions=st.integers(1, 3000),
)
def test_any_machine_is_measured(base, token, key, noise, blocks, size, positions) -> None:
    machine = Machine(base, token, 1e-6, key, 1e-4, blocks, size, positions, noise)
    times = machine.measure(most=700)
    assert machine.now < 3 + 20 * (base + 4 * token + 2e-3) * (1 + 6 * noise)
    seconds = [point.seconds for point in times.points]
    assert seconds == sorted(seconds)
    assert times.per_key >= 0
    assert times.per_decode >= 0


def test_the_engine_measures_and_tells(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    budgets = []
    schedule = Scheduler._budget
    monkeypatch.setattr(Scheduler, "_budget", lambda *given: budgets.append(schedule(*given)) or budgets[-1])
    with caplog.at_level("INFO", "coterie"):
        served = Engine(model(), None, EngineConfig(block_size=4, itl_target_ms=1e-6, max_sequences=9))
    assert "between tokens" in caplog.text
    report = served.report()
    assert report["budget"] == 1 + LEAST
    assert report["budget_alone"] >= LEAST
    assert served.core.times is not None
    assert served.core.times.points[-1].distinct > 1
    clients = [ask(served, prompt(40, i), 9) for i in range(3)]
    drain(served)
    assert [client.tokens() for client in clients] == [recomputed(prompt(40, i), 9) for i in range(3)]
    assert 3 + LEAST in budgets
    assert engine().report()["budget"] == 64
    assert engine().core.times is None
    fixed = Engine(model(), None, dataclasses.replace(served.config, policy="no_chunk"))
    assert fixed.core.times is None
    assert CONFIG.max_positions == served.max_model_len
