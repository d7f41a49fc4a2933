"""One step of the engine: schedule, run, commit, tell, guess."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from ..models.gpt import GPT
from .admission import Prepared
from .blocks import BlockPool
from .budget import Followed, StepTimes
from .config import EngineConfig
from .draft_model import kv_bytes, make_drafter
from .drafts import Asked, Drafter, Guess
from .fleet import Fleet
from .lanes import Lanes
from .live import Live
from .outputs import Delta, StepReport
from .pools import make_pool
from .replan import Replanner
from .request import Key, Request
from .runner import Ran, Runner
from .sample_state import SampleState
from .scheduler import Scheduler
from .step import Budget, Event, SchedulerConfig, Step
from .traffic import Traffic
from .wire import Kind

log = logging.getLogger("coterie")
Hook = Callable[[StepReport], None]
BUDGET = 512
STEP = 8192


class Core:
    """The sequences under way and what computes them.

    Attributes:
        lock: held while the scheduler is told or asked, never while the model runs or a client is told.
        hooks: called after each step, and of how many of its tokens each wants the choices.
        drafter: what guesses tokens ahead, None for nothing.
        times: of steps, where they were measured for the budget.
        budget: tokens of a step under splitfuse.
        overlaps: whether clients are told of a step while the next one computes.
    """

    def __init__(
        self,
        model: GPT,
        config: EngineConfig,
        *,
        max_model_len: int,
        eos_ids: tuple[int, ...],
        draft_model: GPT | None = None,
        fleet: Fleet | None = None,
    ) -> None:
        self.config, self.fleet = config, fleet
        weight, size = model.embed.weight, config.block_size
        drafted = 0 if draft_model is None else kv_bytes(draft_model, config)
        kv = make_pool(model, config, beside=drafted, fleet=fleet)
        blocks, self.block_bytes = kv.blocks, kv.bytes // kv.blocks
        self.runner = Runner(model, kv, fleet)
        self.traffic = Traffic(model, self.block_bytes / size)
        pools = [BlockPool(blocks, size) for _ in range(1 if fleet is None else fleet.lanes)]
        self.pool = pools[0]
        self.drafter: Drafter | None = make_drafter(
            config, draft_model, vocabulary=model.config.vocab_size, blocks=blocks, max_model_len=max_model_len
        )
        most = config.max_step_tokens or STEP
        self.times, self.budget = self._measured(most)
        settings = self._settings(model, most, max_model_len, eos_ids)
        self.scheduler = Scheduler(settings, self.pool) if len(pools) == 1 else Lanes(settings, pools)
        self.lock = threading.RLock()
        self.hooks: dict[Hook, int] = {}
        self.live: dict[Key, Live] = {}
        self._states, self._guesses = dict[Key, SampleState](), dict[Key, Guess]()
        self._flight: Step | None = None
        self._stumbled = False
        self._told = list[tuple[Sequence[Event], Ran | None, dict[Key, str]]]()
        self._generated = 0  # tokens told since the last report
        self.overlaps = weight.device.type != "cpu"
        self.replanner = None if fleet is None or not config.replan_steps else _replanner(model, fleet, config)

    def _settings(self, model: GPT, most: int, max_model_len: int, eos_ids: tuple[int, ...]) -> SchedulerConfig:
        config = self.config
        return SchedulerConfig(
            policy=config.policy,
            budget=self.budget,
            max_step_tokens=most,
            max_sequences=config.max_sequences,
            max_positions=max_model_len,
            max_queued_requests=config.max_queued_requests,
            max_queued_tokens=config.max_queued_tokens,
            eos_ids=eos_ids,
            vocabulary=model.config.vocab_size,
        )

    def _measured(self, most: int) -> tuple[StepTimes | None, int | Budget]:
        """The times of steps, where the budget follows from them, and the budget."""
        config = self.config
        if config.policy != "splitfuse" or config.budget:
            return None, config.budget or BUDGET
        target_s, limit_s = config.itl_target_ms / 1e3, config.itl_limit_ms / 1e3
        times = StepTimes.measure(Followed(self.runner, self.drafter), most=most)
        budget = times.budget(target_s, limit_s, each=1 if self.drafter is None else 1 + config.draft_tokens)
        log.info(times.told(target_s, budget))
        return times, budget

    def add(self, prepared: Prepared) -> None:
        """Queues a request; the lock is held. Raises what `Scheduler.add` does."""
        for live in prepared.lives(self.scheduler.add(prepared.first)):
            self.live[live.key] = live
            self._states[live.key] = live.state

    def knows(self, id: str) -> bool:
        """Whether a request is under way; the lock is held."""
        return self.scheduler.knows(id)

    def step(self, aborted: Callable[[], Iterable[str]] = tuple) -> bool:
        """One step; False when there was nothing to do.

        Args:
            aborted: gives, with the lock held, the ids of requests to end first.

        Raises:
            Exception: what the model's pass raised twice in a row.
        """
        started = time.perf_counter()
        scheduler = self.scheduler
        with self.lock:
            if self._flight is not None:  # whoever ran the last step was interrupted
                scheduler.rollback(self._flight)
            events = [event for id in aborted() for event in scheduler.abort(id)]
            self._flight = step = scheduler.schedule(time.monotonic()) if scheduler.busy else None
        self._hand(events if step is None else [*events, *step.expired])
        if step is None:
            self._deliver()
            if self.fleet is not None:
                self.fleet.say(Kind.PULSE)
            return bool(events)
        prompts = {key: state.prompt_length for key, state in self._states.items()} if self.hooks else None
        ran = self._run(step, loads=prompts is not None or self.replanner is not None)
        if ran is None:
            return True
        report = None if prompts is None else self._report(step, ran, prompts)
        with self.lock:
            self._flight = None
            events = scheduler.commit(step, ran.results)
        self._hand(events, ran)
        if self.drafter is not None:
            self._draft(step)
        self._observe(step, ran, time.perf_counter() - started)
        if report is not None:
            self._tell(report(self._generated, time.perf_counter() - started))
            self._generated = 0
        return True

    def _observe(self, step: Step, ran: Ran, seconds: float) -> None:
        """Lets the budget and the planner of experts learn how long a step took, and experts move."""
        if self.replanner is not None and step.slices:
            self.replanner.seen(ran.loads, step.tokens - len(ran.results), seconds)
            self.replanner.tick()
        if self.times is not None and step.slices:
            chosen = [piece for piece in step.slices if piece.wants_logits]
            context = sum(piece.start for piece in chosen if len(piece.tokens) == 1 + piece.drafts)
            fullest, lanes = max(part.tokens for part in step.parts or (step,)), len(step.parts) or 1
            self.times.observe(fullest, len(chosen) // lanes, context // lanes, seconds)

    def _run(self, step: Step, loads: bool) -> Ran | None:
        """None: the pass failed, and its sequences will compute again. Failing twice in a row is for good."""
        try:
            if not step.slices:
                self._deliver()
                return Ran()
            self._guarded(lambda drafter: drafter.follow(step))
            sampled = max(self.hooks.values(), default=0)
            end = self.runner.start(step, self._states, guesses=self._guesses, loads=loads, sampled=sampled)
            self._deliver()
            ran = end()
        except Exception:
            with self.lock:
                self._flight = None
                self.scheduler.rollback(step)
            if self._stumbled or self.fleet is not None:  # other ranks wait where nobody knows
                raise
            self._stumbled = True
            log.exception("step %d failed and is computed again", step.number)
            return None
        self._stumbled = False
        return ran

    def _hand(self, events: Sequence[Event], ran: Ran | None = None) -> None:
        """Takes what happened into the sequences' states, and tells the clients: at once, or where a GPU computes,
        while it is at the next step."""
        failed = {}
        for event in events:
            live = self.live.get(event.key)
            if live is None or event.finish is not None:
                continue
            try:
                live.state.take(event.tokens)
            except Exception as error:
                log.exception("request %s failed", event.key[0])
                failed[event.key] = f"its text could not be made: {type(error).__name__}"
        self._told.append((events, ran, failed))
        if not (self.overlaps and self.scheduler.busy):
            self._deliver()

    def _deliver(self) -> None:
        """Tells the clients what was handed on. What fails here fails for one sequence."""
        told, self._told = self._told, []
        for event, ran, failed in ((event, ran, failed) for events, ran, failed in told for event in events):
            live = self.live.get(event.key)
            if live is None:
                continue
            why = failed.get(event.key)
            try:
                delta = live.fail(why) if why else live.advance(event, ran and ran.told.get(event.key))
            except Exception as error:
                log.exception("request %s failed", event.key[0])
                delta = live.fail(f"its text could not be made: {type(error).__name__}")
            self._generated += len(delta.tokens)
            self._emit(live, delta, ended=event.finish is not None)

    def _emit(self, live: Live, delta: Delta, ended: bool) -> None:
        """ended: the scheduler knows already that it has."""
        finish = delta.finish
        try:
            live.emit(delta)
        except Exception:
            log.exception("the sink of request %s failed", live.key[0])
            finish = finish or "error"
        if finish is None:
            return
        with self.lock:
            if not ended:
                self.scheduler.finish(live.key, finish)
            for kept in (self.live, self._states, self._guesses):
                kept.pop(live.key, None)
        self._guarded(lambda drafter: drafter.forget(live.key))

    def _draft(self, step: Step) -> None:
        """Guesses for the sequences of a step that go on."""
        asked: list[tuple[Request, Asked]] = []
        for piece in step.slices:
            live = self.live.get(piece.key) if piece.wants_logits else None
            if live is None or live.state.matcher is not None or not live.request.decoding:
                continue
            request = live.request
            count = min(self.config.draft_tokens, request.params.max_tokens - request.generated_length - 1)
            if count > 0 and request.table is not None:
                row, blocks = live.state.row(request.generated_length), tuple(request.table.blocks)
                asked.append((request, Asked(request.key, request.tokens, blocks, count, row)))
        guesses = self._guarded(lambda drafter: drafter.propose([one for _, one in asked])) if asked else None
        for (request, one), guess in zip(asked, guesses or [], strict=False):
            request.speculative = guess.tokens[: one.count]
            self._guesses[request.key] = guess

    def _guarded(self, call):
        """The drafter's answer. One that fails is not asked again: guesses are never worth an answer."""
        if self.drafter is None:
            return None
        try:
            return call(self.drafter)
        except Exception:
            log.exception("guessing ahead failed, and is over")
            self.drafter = None
            return None

    def _report(self, step: Step, ran: Ran, prompts: Mapping[Key, int]) -> Callable[[int, float], StepReport]:
        """The step's report but for (tokens handed out, seconds). `prompts`: lengths, read before sequences end: one
        may while its step computes."""
        decodes = sum(piece.start >= prompts[piece.key] for piece in step.slices)
        runner, read = self.runner, self.traffic.of(step, ran.loads)

        def report(generated: int, seconds: float) -> StepReport:
            if runner.memory_rate:  # what was read faster than it was measured shows that something else read too
                runner.memory_rate = max(runner.memory_rate, read / seconds)
            counts = self.scheduler.counts()
            return StepReport(
                number=step.number,
                seconds=seconds,
                tokens=step.tokens,
                decodes=decodes,
                prompts=len(step.slices) - decodes,
                generated=generated,
                running=counts.running,
                waiting=counts.waiting,
                blocks_used=counts.used,
                blocks=counts.blocks,
                preempted=len(step.preempted),
                drafted=ran.drafted,
                accepted=ran.accepted,
                loads=ran.loads,
                roofline=read / seconds / runner.memory_rate if runner.memory_rate else 0.0,
                routes_LMK=ran.routes_LMK,
            )

        return report

    def _tell(self, report: StepReport) -> None:
        for hook in self.hooks:
            try:
                hook(report)
            except Exception:
                log.exception("what watches the steps failed")

    def die(self) -> None:
        """Ends every sequence with an error."""
        with self.lock:
            live = list(self.live.values())
            for id in {one.key[0] for one in live}:
                self.scheduler.abort(id)
            for kept in (self.live, self._states, self._guesses):
                kept.clear()
        for one in live:
            try:
                one.emit(one.fail("the engine has failed"))
            except Exception:
                log.exception("the sink of request %s failed", one.key[0])


def _replanner(model: GPT, fleet: Fleet, config: EngineConfig) -> Replanner:
    experts, top_k = [moe.num_experts for moe in model.moe_layers], model.config.moe.top_k
    return Replanner(fleet, experts, top_k, every=config.replan_steps, most=config.move_bytes)
