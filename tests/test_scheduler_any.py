"""Whatever comes in whatever order: each sequence gives what it gives alone, and no block is lost."""

import hypothesis.strategies as st
import pytest
from fake_runner import EOS, VOCABULARY, Engine, check_pool, reference
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coterie.infer.blocks import BlockPool
from coterie.infer.request import QueueFull, Request, RequestError, SamplingParams
from coterie.infer.scheduler import Scheduler
from coterie.infer.step import SchedulerConfig, Step

POLICIES = ("splitfuse", "static", "prefill_first", "no_chunk")
PROMPTS = st.lists(st.integers(1, 2), min_size=1, max_size=24).map(tuple)


@st.composite
def params(draw: st.DrawFn) -> SamplingParams:
    most = draw(st.integers(1, 12))
    return SamplingParams(
        max_tokens=most,
        min_tokens=draw(st.integers(0, most)),
        ignore_eos=draw(st.booleans()),
        stop_token_ids=tuple(draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=1))),
        n=draw(st.sampled_from((1, 1, 1, 2, 3))),
    )


@st.composite
def schedulers(draw: st.DrawFn) -> Scheduler:
    config = SchedulerConfig(
        policy=draw(st.sampled_from(POLICIES)),
        budget=draw(st.integers(1, 20)),
        max_step_tokens=draw(st.integers(1, 40)),
        max_sequences=draw(st.integers(1, 8)),
        max_positions=32,
        max_queued_requests=6,
        max_queued_tokens=100,
        eos_ids=(EOS,),
        vocabulary=VOCABULARY,
        max_overtakes=draw(st.integers(0, 3)),
        lookahead=draw(st.integers(1, 4)),
    )
    return Scheduler(config, BlockPool(draw(st.integers(1, 24)), draw(st.integers(1, 5))))


class AnyOrder(RuleBasedStateMachine):
    """Adds, steps, aborts, ends, deadlines and failed steps in any order."""

    @initialize(scheduler=schedulers(), guess=st.integers(0, 4))
    def start(self, scheduler: Scheduler, guess: int) -> None:
        self.engine = Engine(scheduler, guess)
        self.scheduler = scheduler
        self.requests: dict[tuple[str, int], Request] = {}
        self.flight: Step | None = None
        self.names = 0

    @rule(prompt=PROMPTS, params=params(), salt=st.sampled_from(("", "key")), wait=st.sampled_from((None, 3.0, 9.0)))
    def add(self, prompt: tuple[int, ...], params: SamplingParams, salt: str, wait: float | None) -> None:
        self.names += 1
        deadline = None if wait is None else self.engine.now + wait
        request = Request(str(self.names), prompt, params, self.engine.now, salt, deadline)
        before = len(self.scheduler.roster)
        try:
            samples = self.engine.add(request)
        except (RequestError, QueueFull):
            assert len(self.scheduler.roster) == before
        else:
            self.requests |= {sample.key: sample for sample in samples}

    @precondition(lambda self: self.flight is None)
    @rule(times=st.integers(1, 4))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.engine.step()

    @precondition(lambda self: self.flight is None)
    @rule()
    def schedule(self) -> None:
        self.flight = self.engine.schedule()
        self.results = self.engine.runner.run(self.flight)

    @precondition(lambda self: self.flight is not None)
    @rule(fails=st.booleans())
    def commit(self, fails: bool) -> None:
        assert self.flight
        if fails:
            self.scheduler.rollback(self.flight)
        else:
            self.engine.take(self.scheduler.commit(self.flight, self.results))
        self.flight = None

    @precondition(lambda self: self.scheduler.busy)
    @rule(data=st.data(), how=st.sampled_from(("abort", "stop")))
    def leave(self, data: st.DataObject, how: str) -> None:
        request = data.draw(st.sampled_from(list(self.scheduler.roster)))
        if how == "abort":
            self.engine.take(self.scheduler.abort(request.id))
            assert all(r.id != request.id for r in self.scheduler.roster)
        else:
            event = self.scheduler.finish(request.key, "stop")
            assert event
            self.engine.take([event])
        assert request.table
        assert not request.table.blocks

    @invariant()
    def blocks(self) -> None:
        if hasattr(self, "scheduler"):
            check_pool(self.scheduler)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        if self.flight:
            self.commit(False)
        self.engine.drain()
        for key, request in self.requests.items():
            tokens, reason = reference(request)
            end, given = self.engine.ended[key], self.engine.given[key]
            assert given == tokens[: len(given)] == request.generated
            assert tuple(request.tokens[: len(request.prompt)]) == request.prompt
            early = end.finish in ("abort", "deadline") or (end.finish == "stop" and end.stop_token is None)
            assert early or (end.finish, given) == (reason, tokens)
        assert not self.scheduler.roster.waiting
        assert not self.scheduler.roster.running
        assert not self.scheduler.roster._forks


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAnyOrder = AnyOrder.TestCase


@pytest.mark.parametrize("policy", POLICIES)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_tokens_do_not_depend_on_batch_mates(policy, data: st.DataObject) -> None:
    """The same requests under a policy, any pool and any budget; nobody leaves early, so all tokens must be there."""
    size = data.draw(st.integers(1, 5))
    config = SchedulerConfig(
        policy=policy,
        budget=data.draw(st.integers(1, 64)),
        max_step_tokens=data.draw(st.integers(8, 64)),
        max_sequences=8,
        max_positions=40,
        eos_ids=(EOS,),
    )
    engine = Engine(Scheduler(config, BlockPool(-(-36 // size) + data.draw(st.integers(0, 12)), size)), guess=3)
    requests = []
    for i in range(data.draw(st.integers(1, 10))):
        requests += engine.add(Request(str(i), data.draw(PROMPTS), data.draw(params())))
        for _ in range(data.draw(st.integers(0, 3))):
            engine.step()
    # Each step computes a token at least; what preemption makes compute again has stayed under as much once more.
    engine.drain(most=2 * sum(len(r.prompt) + r.params.max_tokens for r in requests))
    for request in requests:
        assert (engine.given[request.key], engine.ended[request.key].finish) == reference(request)
