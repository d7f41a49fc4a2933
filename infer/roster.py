"""Every sequence under way and where it is: waiting, forking from its first sample, or running.

A sequence is in as many lists as its state says, and in none when it has ended: nothing here grows with time.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .blocks import BlockPool, BlockTable
from .request import FinishReason, Key, QueueFull, Request, RequestError, State
from .step import PACE, Due, Event, SchedulerConfig


def age(request: Request) -> int:
    """Sorts the oldest first."""
    return request.order


class Counts(NamedTuple):
    """Of one moment, and since the start."""

    running: int
    """Sequences that hold blocks."""
    waiting: int
    blocks: int
    used: int
    """Blocks that hold keys and values of sequences under way."""
    preemptions: int
    prefix_queries: int
    """Tokens looked up in the prefix cache, and found there."""
    prefix_hits: int


class Roster:
    """Who is where. Whoever leaves `running` gives its blocks back at once.

    Attributes:
        running: sequences that hold blocks, by order.
        waiting: sequences that hold none, oldest first.
        preemptions: in all.
    """

    def __init__(self, config: SchedulerConfig, pool: BlockPool) -> None:
        self.config, self.pool = config, pool
        self.running: dict[int, Request] = {}
        self.waiting: list[Request] = []
        self.preemptions = 0
        self._live: dict[str, dict[int, Request]] = {}
        self._forks: dict[str, list[Request]] = {}  # samples that wait for their first one's prompt
        self._orders = 0

    def __len__(self) -> int:
        return sum(map(len, self._live.values()))

    def __iter__(self) -> Iterator[Request]:
        for samples in self._live.values():
            yield from samples.values()

    @property
    def queued(self) -> int:
        """Sequences that hold no blocks."""
        return len(self.waiting) + sum(map(len, self._forks.values()))

    def counts(self) -> Counts:
        """Where sequences and blocks are."""
        pool = self.pool
        return Counts(len(self.running), self.queued, pool.count, pool.used, self.preemptions, pool.queried, pool.hit)

    def due(self, prompts: Sequence[Request], now: float) -> list[Due]:
        """When these prompts and the next that wait should be done."""
        ahead, due = 0, []
        for request in (*prompts, *self.waiting[: self.config.lookahead]):
            ahead += request.total - request.computed
            due.append((ahead, request.arrival + len(request.prompt) / PACE - now))
        return due

    def get(self, key: Key) -> Request | None:
        """A sequence that has not ended."""
        return self._live.get(key[0], {}).get(key[1])

    def samples(self, id: str) -> list[Request]:
        """Those of a request that have not ended."""
        return list(self._live.get(id, {}).values())

    def forks(self, request: Request) -> int:
        """How many samples wait for this one to compute their prompt."""
        return 0 if request.index else len(self._forks.get(request.id, ()))

    def add(self, request: Request) -> list[Request]:
        """See `Scheduler.add`."""
        self._check(request)
        self._check_queue(request)
        rest = [
            Request(request.id, request.prompt, request.params, request.arrival, request.salt, request.deadline, i)
            for i in range(1, request.params.sequences)
        ]
        samples = [request, *rest]
        for sample in samples:
            sample.order, self._orders = self._orders, self._orders + 1
            sample.table = BlockTable(self.pool, sample.salt)
            sample.state = State.FORKING
        self._live[request.id] = {sample.index: sample for sample in samples}
        if rest:
            self._forks[request.id] = rest
        self._wait(request)
        return samples

    def _check_queue(self, request: Request) -> None:
        if not self.waiting:  # whatever fits the pool fits an empty queue
            return
        most, queued = self.config.max_queued_requests, self.queued
        if queued + request.params.sequences > most:
            raise QueueFull(f"{queued} sequences wait, and at most {most} may: try again later")
        most, queued = self.config.max_queued_tokens, sum(len(r.tokens) for r in self.waiting)
        if queued + len(request.tokens) > most:
            raise QueueFull(f"{queued} tokens wait, and at most {most} may: try again later")

    def _check(self, request: Request) -> None:
        config, params = self.config, request.params
        if request.id in self._live:
            raise RequestError(f"a request with the id {request.id!r} is under way: give each its own")
        if request.index or request.table is not None:
            raise RequestError(f"request {request.id!r} was added before: make a new one")
        prompt, total = len(request.prompt), len(request.prompt) + params.max_tokens
        asked = f"a prompt of {prompt} tokens and max_tokens {params.max_tokens}"
        if total > config.max_positions:
            raise RequestError(f"{asked} are {total} tokens, but the model has {config.max_positions} positions")
        # The last token is never computed: nothing follows it.
        if self.pool.blocks_for(total - 1) > self.pool.count:
            room = self.pool.count * self.pool.size
            raise RequestError(f"{asked} are {total} tokens, but the cache has room for {room}")
        if params.sequences > config.max_sequences:
            raise RequestError(f"{params.sequences} samples are asked for, but {config.max_sequences} run at most")
        if config.vocabulary is not None:
            params.check_vocabulary(config.vocabulary)
            if (worst := max(request.prompt)) >= config.vocabulary:
                raise RequestError(f"the prompt has token {worst}, but the vocabulary has {config.vocabulary} tokens")

    def begin(self, request: Request, computed: int, now: float) -> None:
        """From waiting to running, with blocks in its table of which the first `computed` tokens are filled."""
        self.waiting.remove(request)
        self.running[request.order] = request
        request.computed, request.state = computed, State.RUNNING
        if request.started is None:
            request.started, request.cached = now, computed

    def fork(self, first: Request) -> None:
        """The other samples go on from the prompt that the first has computed.

        Each computes the prompt's last token again, for logits of its own.
        """
        if first.index:
            return
        for fork in self._forks.pop(first.id, ()):
            assert first.table is not None
            fork.table = first.table.fork(len(first.prompt))
            fork.computed = fork.cached = len(fork.prompt) - 1
            fork.state, fork.started = State.RUNNING, first.started
            self.running[fork.order] = fork

    def preempt(self, request: Request) -> None:
        """Back to the queue: it keeps its tokens and its age, and computes again what the cache forgets."""
        self._leave(request)
        request.preemptions += 1
        self.preemptions += 1
        self._wait(request)

    def end(self, request: Request, reason: FinishReason, tokens=(), stop=None, error=None) -> Event:
        """Takes a sequence out; the others of its request go on."""
        samples, forks = self._live[request.id], self._forks.get(request.id, [])
        self._leave(request)
        request.state, request.finish = State.FINISHED, reason
        del samples[request.index]
        if request in forks:
            forks.remove(request)
        if not request.index:  # those who waited for its prompt compute it themselves
            for fork in forks:
                self._wait(fork)
            forks = []
        if not forks:
            self._forks.pop(request.id, None)
        if not samples:
            del self._live[request.id]
        return Event(request.key, tokens, reason, stop, error)

    def _leave(self, request: Request) -> None:
        assert request.table is not None
        request.table.release()
        request.computed, request.speculative = 0, ()
        self.running.pop(request.order, None)
        if request.state is State.WAITING:
            self.waiting.remove(request)

    def _wait(self, request: Request) -> None:
        request.state = State.WAITING
        insort(self.waiting, request, key=age)
