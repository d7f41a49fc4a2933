"""Who computes what in the next step: one catch-up scheduler (Dynamic SplitFuse, DeepSpeed-FastGen, section 3).

Every sequence has tokens, and the first `computed` of them have keys and values; a step computes some of the rest.
A prompt, a part of one, a decode, a preempted sequence that comes back and guesses to be checked differ in nothing
else. No torch here: the runner obeys the step.

Progress: of the sequences that hold blocks, one at least gets further each step. A prompt gets all its blocks when
it is admitted, so that only decodes ever lack one; the youngest then gives its own back and waits, with its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .blocks import BlockPool, Copy
from .request import FinishReason, Key, Request, State
from .roster import Counts, Roster, age
from .step import STATIC_BUDGET, Event, Result, SchedulerConfig, Slice, Step

PROMPT_ROWS = 256
"""Tokens of a step whose prompts' logits are wanted: each takes a row of the vocabulary's size."""
FOR_PROMPTS = 16
"""Tokens of a step that guesses leave to prompts which wait."""


@dataclass(slots=True)
class _Plan:
    """A step in the making."""

    number: int
    left: int
    slots: int
    rows: int = PROMPT_ROWS
    slices: list[tuple[Request, Slice]] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    preempted: list[Key] = field(default_factory=list)

    @property
    def full(self) -> bool:
        return self.left < 1 or self.slots < 1

    def fit(self, request: Request, count: int) -> int:
        """How many of so many prompt tokens there is room for."""
        asked = request.params.prompt_logprobs is not None
        return min(count, self.left, self.rows) if asked else min(count, self.left)

    def take(self, request: Request, count: int, copies: list[Copy]) -> None:
        assert request.table is not None
        known, start = len(request.tokens), request.computed
        end = start + count
        tokens = (*request.tokens[start:end], *request.speculative[: max(0, end - known)])
        blocks = tuple(request.table.blocks)
        piece = Slice(request.key, start, tokens, blocks, end >= known, max(0, end - known))
        self.slices.append((request, piece))
        self.copies += copies
        self.left -= count
        if request.params.prompt_logprobs is not None and start < len(request.prompt):
            self.rows -= count
        self.slots -= 1
        request.served = self.number


class Scheduler:
    """`add` requests; then, for ever: `schedule`, run the step, `commit` its results.

    Not thread-safe: one thread owns it. `add`, `abort` and `finish` may come between `schedule` and `commit`.
    """

    def __init__(self, config: SchedulerConfig, pool: BlockPool) -> None:
        self.config, self.pool = config, pool
        self.roster = Roster(config, pool)
        self._steps = 0
        self._without_decodes = 0  # steps in a row
        self._flight: tuple[Step, list[tuple[Request, Slice]]] | None = None

    @property
    def busy(self) -> bool:
        """Whether there is anything to schedule."""
        return len(self.roster) > 0

    def knows(self, id: str) -> bool:
        """Whether a request is under way."""
        return bool(self.roster.samples(id))

    def counts(self) -> Counts:
        """Where sequences and blocks are."""
        return self.roster.counts()

    def get(self, key: Key) -> Request | None:
        """A sequence that has not ended."""
        return self.roster.get(key)

    def add(self, request: Request) -> list[Request]:
        """Queues a new request; returns its samples, of which it is the first.

        Raises:
            RequestError: it can never be served.
            QueueFull: too many wait.
        """
        return self.roster.add(request)

    def finish(self, key: Key, reason: FinishReason) -> Event | None:
        """Ends one sequence now and frees its blocks: a stop string was found. None when it had ended before."""
        request = self.get(key)
        return None if request is None else self.roster.end(request, reason)

    def abort(self, id: str) -> list[Event]:
        """Ends all samples of a request now and frees their blocks; none when it had ended before."""
        return [self.roster.end(request, "abort") for request in self.roster.samples(id)]

    def schedule(self, now: float) -> Step:
        """The next step; without slices when there is nothing to do. Each step is committed before the next.

        Args:
            now: seconds, on the clock of the requests' arrival and deadline.
        """
        if self._flight is not None:
            raise RuntimeError("the last step was neither committed nor rolled back")
        self._steps += 1
        late = [r for r in self.roster if r.deadline is not None and r.deadline <= now]
        expired = [self.roster.end(request, "deadline") for request in late]
        running = self.roster.running.values()
        decodes = sorted((r for r in running if r.decoding), key=lambda r: (r.served, r.order))
        prompts = sorted((r for r in running if not r.decoding), key=age)
        plan = _Plan(self._steps, self._budget(decodes, prompts, now), self.config.max_sequences)
        if self.config.policy != "prefill_first":
            self._decode(plan, decodes, FOR_PROMPTS if prompts or self.roster.waiting else 0)
        if self.config.policy != "prefill_first" or not decodes or self._patient():
            self._continue(plan, prompts)
            if not plan.preempted:  # blocks just taken from one are not for another
                self._admit(plan, now)
        if self.config.policy == "prefill_first" and not plan.slices:
            self._decode(plan, decodes, 0)
            self._without_decodes = 0
        slices = tuple(piece for _, piece in plan.slices)
        step = Step(plan.number, slices, tuple(plan.copies), tuple(plan.preempted), tuple(expired))
        self._flight = step, plan.slices
        return step

    def _budget(self, decodes: list[Request], prompts: list[Request], now: float) -> int:
        config = self.config
        if config.policy == "static":
            tokens = STATIC_BUDGET
        elif config.policy != "splitfuse":
            tokens = config.max_step_tokens
        elif isinstance(config.budget, int):
            tokens = config.budget
        else:
            tokens = config.budget(len(decodes), sum(r.total for r in decodes), self.roster.due(prompts, now))
        return max(1, min(tokens, config.max_step_tokens))

    def _patient(self) -> bool:
        """Under prefill_first: whether the decodes can wait once more."""
        self._without_decodes += 1
        return self._without_decodes <= self.config.max_overtakes

    def _decode(self, plan: _Plan, decodes: list[Request], reserved: int) -> None:
        """One token each, those served longest ago first, and guesses where every other still gets its token and
        prompts get `reserved` ones."""
        for i, request in enumerate(decodes):
            if plan.full:
                return
            if request.state is State.RUNNING:
                spare = max(0, plan.left - (len(decodes) - i) - reserved)
                request.speculative = request.speculative[:spare]
                copies = self._make_room(plan, request)
                if copies is not None:
                    plan.take(request, request.total - request.computed, copies)

    def _make_room(self, plan: _Plan, request: Request) -> list[Copy] | None:
        """Blocks for a decode, from the youngest sequence that is not part of the step; None when that is itself."""
        assert request.table is not None
        copies = request.table.grow(request.computed, request.total)
        if copies is None and request.speculative:  # guesses are not worth another's blocks
            request.speculative = ()
            copies = request.table.grow(request.computed, request.total)
        while copies is None:
            victim = max((r for r in self.roster.running.values() if r.served != plan.number), key=age)
            self.roster.preempt(victim)
            plan.preempted.append(victim.key)
            if victim is request:
                return None
            copies = request.table.grow(request.computed, request.total)
        return copies

    def _continue(self, plan: _Plan, prompts: list[Request]) -> None:
        """More of the prompts that have begun; they have their blocks."""
        for request in prompts:
            if plan.full:
                return
            count = plan.fit(request, request.total - request.computed)
            if request.state is State.RUNNING and count:
                plan.take(request, count, [])

    def _admit(self, plan: _Plan, now: float) -> None:
        """Begins those waiting, oldest first. One that does not fit lets a bounded number of younger ones pass."""
        roster, passed = self.roster, list[Request]()
        reserved = sum(1 + roster.forks(r) for r in roster.running.values())
        for request in roster.waiting[: self.config.lookahead]:
            if plan.full:
                return
            places = 1 + roster.forks(request)
            if reserved + places <= self.config.max_sequences and self._begin(plan, request, now):
                reserved += places
                for older in passed:
                    older.overtaken += 1
            else:
                passed.append(request)
            if any(older.overtaken >= self.config.max_overtakes for older in passed):
                return

    def _begin(self, plan: _Plan, request: Request, now: float) -> bool:
        """Gives a waiting sequence blocks for all its tokens and its first slice, or leaves all as it was."""
        table = request.table
        assert table is not None
        # Logits of what is cached were never kept.
        cached = 0 if request.params.prompt_logprobs is not None else table.reuse(request.tokens)
        count = self._cut(plan, request, len(request.tokens) - cached)
        # Room for those running to go on for a while: else the newcomer would be preempted at once.
        headroom = min(len(self.roster.running), self.pool.count // 16)
        needed = table.needs(cached, len(request.tokens))
        if not count or needed + headroom > self.pool.free:
            table.release()
            return False
        copies = table.grow(cached, len(request.tokens))
        assert copies is not None
        if request.started is None:
            self.pool.queried += len(request.tokens)
            self.pool.hit += cached
        self.roster.begin(request, cached, now)
        plan.take(request, count, copies)
        return True

    def _cut(self, plan: _Plan, request: Request, tokens: int) -> int:
        """How many of a new prompt's tokens go into this step; 0: it waits for one with more room."""
        whole = self.config.policy in ("prefill_first", "no_chunk") and tokens <= self.config.max_step_tokens
        return 0 if whole and tokens > plan.left else plan.fit(request, tokens)

    def commit(self, step: Step, results: Mapping[Key, Result]) -> list[Event]:
        """Takes in what the runner found for the slices that want logits.

        A sequence whose result is missing or an error ends; the others do not notice. One that was aborted since
        `schedule` is passed over.
        """
        if self._flight is None or self._flight[0] is not step:
            raise RuntimeError(f"step {step.number} is not the one under way")
        slices, self._flight = self._flight[1], None
        events = []
        for request, piece in slices:
            if request.state is not State.RUNNING:
                continue
            if not piece.wants_logits:
                self._computed(request, piece.start + len(piece.tokens))
                continue
            result = results.get(piece.key, Result(0, error="the runner gave no token"))
            if result.error is None and not 0 <= result.accepted <= piece.drafts:
                result = Result(0, error=f"the runner accepted {result.accepted} of {piece.drafts} guesses")
            if result.error is None:
                events.append(self._advance(request, piece, result))
            else:
                events.append(self.roster.end(request, "error", error=result.error))
        return events

    def rollback(self, step: Step) -> None:
        """The step was not, or not wholly, run: its sequences wait to be computed again, and lose no token."""
        if self._flight is None or self._flight[0] is not step:
            raise RuntimeError(f"step {step.number} is not the one under way")
        slices, self._flight = self._flight[1], None
        for request, _ in slices:
            if request.state is State.RUNNING:
                self.roster.preempt(request)

    def _advance(self, request: Request, piece: Slice, result: Result) -> Event:
        self._computed(request, len(request.tokens))
        self.roster.fork(request)
        right = piece.tokens[len(piece.tokens) - piece.drafts :][: result.accepted]
        new, reason, stop = self._append(request, (*right, result.token))
        request.speculative = ()
        # The guesses that were right have keys and values; the last token has none.
        self._computed(request, len(request.tokens) - 1)
        if reason is not None:
            return self.roster.end(request, reason, new, stop)
        assert request.table is not None
        request.table.trim(request.computed)
        left = request.params.max_tokens - request.generated_length - 1
        request.speculative = tuple(result.drafts[:left])
        return Event(request.key, new)

    def _append(self, request: Request, tokens: tuple[int, ...]):
        """Adds tokens until one ends the sequence: (those added, the reason or None, the stop token or None)."""
        params = request.params
        for i, token in enumerate(tokens):
            request.tokens.append(token)
            ends = token in params.stop_token_ids or (token in self.config.eos_ids and not params.ignore_eos)
            if ends and request.generated_length > params.min_tokens:
                return tokens[: i + 1], "stop", token
            if request.generated_length >= params.max_tokens:
                return tokens[: i + 1], "length", None
        return tokens, None, None

    def _computed(self, request: Request, count: int) -> None:
        assert request.table is not None
        request.computed = count
        request.table.publish(request.tokens, count)
