"""Several lanes as one scheduler: each sequence gives what it gives alone, in the lane it came to."""

import hypothesis.strategies as st
import pytest
from fake_runner import EOS, VOCABULARY, FakeRunner, check_pool, reference
from hypothesis import given, settings

from coterie.infer.blocks import BlockPool
from coterie.infer.lanes import Lanes
from coterie.infer.request import Key, QueueFull, Request, RequestError, SamplingParams
from coterie.infer.step import Result, SchedulerConfig, Step


class Served:
    """Lanes over fake runners, until all is done."""

    def __init__(self, count: int, blocks: int = 12, **settings: int) -> None:
        limits = {"budget": 9, "max_sequences": 16, "max_queued_requests": 12, "max_queued_tokens": 400} | settings
        config = SchedulerConfig(max_positions=40, eos_ids=(EOS,), vocabulary=VOCABULARY, **limits)
        self.lanes = Lanes(config, [BlockPool(blocks, 4) for _ in range(count)])
        self.runners = [FakeRunner(lane.pool, guess=2) for lane in self.lanes.lanes]
        self.got: dict[Key, list[int]] = {}
        self.ends: dict[Key, str] = {}

    def run(self, step: Step) -> dict[Key, Result]:
        results: dict[Key, Result] = {}
        for part, runner in zip(step.parts, self.runners, strict=True):
            results |= runner.run(part)
        return results

    def step(self, fails: bool = False) -> Step:
        step = self.lanes.schedule(0.0)
        results = self.run(step)
        assert step.slices == tuple(piece for part in step.parts for piece in part.slices)
        if fails:
            self.lanes.rollback(step)
            return step
        for event in self.lanes.commit(step, results):
            self.got.setdefault(event.key, []).extend(event.tokens)
            if event.finish:
                self.ends[event.key] = event.finish
        for lane in self.lanes.lanes:
            check_pool(lane)
        return step


def _request(name: int, length: int, most: int, n: int = 1) -> Request:
    return Request(
        str(name), tuple(1 + (name + i) % 2 for i in range(length)), SamplingParams(max_tokens=most, n=n), 0
    )


@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(1, 24), st.integers(1, 12), st.sampled_from((1, 1, 3))), max_size=12),
    st.sets(st.integers(0, 40), max_size=4),
)
@settings(deadline=None)
def test_each_sequence_gives_what_it_gives_alone(
    count: int, wanted: list[tuple[int, int, int]], failing: set[int]
) -> None:
    served, requests = Served(count), []
    for name, (length, most, n) in enumerate(wanted):
        try:
            requests += served.lanes.add(_request(name, length, most, n))
        except QueueFull:
            assert served.lanes.counts().waiting >= 12 // count - 2
    steps = 0
    while served.lanes.busy:
        served.step(fails=steps in failing)
        steps += 1
        assert steps < 2000
    for request in requests:
        assert (served.got[request.key], served.ends[request.key]) == reference(request)
    counts = served.lanes.counts()
    assert counts.used == counts.running == counts.waiting == 0
    assert counts.blocks == 12 * count


def test_requests_go_where_least_is_left() -> None:
    served = Served(2, blocks=40)
    for name, length in enumerate((20, 4, 4, 4)):
        served.lanes.add(_request(name, length, 4))
    homes = [sorted(request.id for request in lane.roster) for lane in served.lanes.lanes]
    assert homes == [["0"], ["1", "2", "3"]]
    step = served.step()
    assert [bool(part.slices) for part in step.parts] == [True, True]


def test_a_lane_without_work_has_an_empty_part() -> None:
    served = Served(3)
    served.lanes.add(_request(0, 5, 2))
    step = served.step()
    assert [part.tokens for part in step.parts] == [5, 0, 0]


def test_what_is_known_is_found_in_its_lane() -> None:
    served = Served(2)
    for name in range(2):
        served.lanes.add(_request(name, 5, 6))
    assert served.lanes.knows("1")
    with pytest.raises(RequestError, match="under way"):
        served.lanes.add(_request(1, 5, 6))
    assert served.lanes.abort("1")
    assert not served.lanes.knows("1")
    event = served.lanes.finish(("0", 0), "stop")
    assert event is not None
    assert event.finish == "stop"
    assert served.lanes.finish(("0", 0), "stop") is None
    assert not served.lanes.busy


def test_a_step_is_committed_once() -> None:
    served = Served(2)
    served.lanes.add(_request(0, 5, 6))
    step = served.lanes.schedule(0.0)
    served.lanes.rollback(step)
    with pytest.raises(RuntimeError, match="not the one under way"):
        served.lanes.commit(step, {})
