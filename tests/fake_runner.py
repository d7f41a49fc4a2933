"""A runner without a model, whose next token depends on every token before it, read back from its blocks.

A slot holds a hash of all tokens up to its own, made from the slot before, as keys and values of a deep layer are.
So a block that was lost, overwritten, copied too late or shared wrongly changes all that follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coterie.infer.blocks import BlockPool
from coterie.infer.request import Key, Request, SamplingParams
from coterie.infer.scheduler import Scheduler
from coterie.infer.step import Event, Result, SchedulerConfig, Slice, Step

VOCABULARY = 7
EOS = 0


def follow(state: int, token: int) -> int:
    return hash((state, token, 0x9E3779B9))


def choose(state: int, sample: int) -> int:
    """The next token; 0, the end, about once in 14."""
    value = hash((state, sample, 17)) >> 8
    return value % VOCABULARY if value % 2 else 1 + value % (VOCABULARY - 1)


def reference(request: Request, eos: Sequence[int] = (EOS,)) -> tuple[list[int], str]:
    """What the sequence generates when nothing else is there, token by token, and why it ends."""
    state, params = 0, request.params
    for token in request.prompt:
        state = follow(state, token)
    tokens: list[int] = []
    while True:
        tokens.append(choose(state, request.index))
        state = follow(state, tokens[-1])
        ends = tokens[-1] in params.stop_token_ids or (tokens[-1] in eos and not params.ignore_eos)
        if ends and len(tokens) > params.min_tokens:
            return tokens, "stop"
        if len(tokens) == params.max_tokens:
            return tokens, "length"


class FakeRunner:
    """Runs steps over its own memory; checks that what is written has one owner.

    guess: how many drafts to give after each token, every third or so of them wrong; 0: none.
    """

    def __init__(self, pool: BlockPool, guess: int = 0) -> None:
        self.pool, self.guess = pool, guess
        self.memory = [[-1] * pool.size for _ in range(pool.count)]

    def run(self, step: Step, owned: bool = True) -> dict[Key, Result]:
        """owned: the sequences still hold the blocks that they write."""
        for old, new in step.copies:
            self.memory[new] = list(self.memory[old])
        size, written = self.pool.size, set[int]()
        for piece in step.slices:
            end = piece.start + len(piece.tokens)
            mine = set(piece.blocks[piece.start // size : -(-end // size)])
            assert not mine & written, "two slices write one block"
            assert not owned or all(self.pool.owners(b) == 1 and not self.pool.published(b) for b in mine), (
                "a shared block"
            )
            written |= mine
        for piece in step.slices:
            for block in piece.blocks[: piece.start // size]:
                assert block not in written, "a block is read by one slice and written by another"
            self._write(piece)
        return {piece.key: self._result(piece) for piece in step.slices if piece.wants_logits}

    def _state(self, piece: Slice, position: int) -> int:
        if position < 0:
            return 0
        return self.memory[piece.blocks[position // self.pool.size]][position % self.pool.size]

    def _write(self, piece: Slice) -> None:
        for position, token in enumerate(piece.tokens, piece.start):
            state = follow(self._state(piece, position - 1), token)
            self.memory[piece.blocks[position // self.pool.size]][position % self.pool.size] = state

    def _result(self, piece: Slice) -> Result:
        sample, accepted = piece.key[1], 0
        position = piece.start + len(piece.tokens) - piece.drafts - 1
        drafts = piece.tokens[len(piece.tokens) - piece.drafts :]
        while accepted < piece.drafts and choose(self._state(piece, position), sample) == drafts[accepted]:
            accepted, position = accepted + 1, position + 1
        token = choose(self._state(piece, position), sample)
        return Result(token, accepted, self._guesses(follow(self._state(piece, position), token), sample))

    def _guesses(self, state: int, sample: int) -> tuple[int, ...]:
        guesses = []
        for i in range(self.guess):
            right = choose(state, sample)
            guesses.append(right if hash((state, i)) % 3 else (right + 1) % VOCABULARY)
            state = follow(state, guesses[-1])
        return tuple(guesses)


def check_pool(scheduler: Scheduler) -> None:
    """Every block is blank, idle or owned, and by exactly as many tables as it says."""
    pool = scheduler.pool
    owners = [0] * pool.count
    for request in scheduler.roster:
        assert request.table is not None
        for block in request.table.blocks:
            owners[block] += 1
        assert len(set(request.table.blocks)) == len(request.table.blocks)
    assert owners == [pool.owners(block) for block in range(pool.count)]
    assert pool.used == sum(map(bool, owners)), "a block is neither free nor owned"
    assert pool.cached <= pool.count


class Engine:
    """A scheduler, a fake runner, and what each sequence has given so far."""

    def __init__(self, scheduler: Scheduler, guess: int = 0) -> None:
        self.scheduler = scheduler
        self.runner = FakeRunner(scheduler.pool, guess)
        self.given: dict[Key, list[int]] = {}
        self.ended: dict[Key, Event] = {}
        self.now = 0.0

    def add(self, request: Request) -> list[Request]:
        samples = self.scheduler.add(request)
        for sample in samples:
            self.given[sample.key] = []
            self.ended.pop(sample.key, None)
        return samples

    def take(self, events: Sequence[Event]) -> None:
        for event in events:
            assert event.key not in self.ended, "an event after the end"
            self.given[event.key] += event.tokens
            if event.finish:
                self.ended[event.key] = event

    def schedule(self) -> Step:
        scheduler, config = self.scheduler, self.scheduler.config
        self.now += 1.0
        step = scheduler.schedule(self.now)
        self.take(step.expired)
        budget = 768 if config.policy == "static" else config.max_step_tokens
        if config.policy == "splitfuse" and isinstance(config.budget, int):
            budget = min(budget, config.budget)
        assert step.tokens <= budget
        assert len(step.slices) <= len(scheduler.roster.running) <= config.max_sequences
        assert len({piece.key for piece in step.slices}) == len(step.slices)
        assert step.slices or not scheduler.busy, "nothing moves"
        assert not set(step.preempted) & {piece.key for piece in step.slices}, "blocks go to and fro"
        check_pool(scheduler)
        return step

    def step(self) -> Step:
        step = self.schedule()
        self.take(self.scheduler.commit(step, self.runner.run(step)))
        check_pool(self.scheduler)
        return step

    def drain(self, most: int = 10_000) -> int:
        """Steps until all is done."""
        steps = 0
        while self.scheduler.busy:
            self.step()
            steps += 1
            assert steps <= most, "it does not end"
        assert self.scheduler.pool.used == 0, "blocks are leaked"
        return steps


def engine(blocks: int = 64, size: int = 4, guess: int = 0, **settings: Any) -> Engine:
    settings = {"max_positions": 4096, "eos_ids": (EOS,), "vocabulary": VOCABULARY} | settings
    return Engine(Scheduler(SchedulerConfig(**settings), BlockPool(blocks, size)), guess)


def request(id: str, prompt: int | Sequence[int], most: int = 8, **settings: Any) -> Request:
    """A prompt of so many tokens, like no other's, that does not end before `most` tokens."""
    if isinstance(prompt, int):
        digits = [1 + (int.from_bytes(id.encode()) >> 2 * i) % 4 for i in range(prompt)]
        prompt = digits if len(digits) == prompt else []
    return Request(id, tuple(prompt), SamplingParams(max_tokens=most, ignore_eos=True, **settings))


def shape(step: Step) -> list[tuple[str, int, int]]:
    """(id, start, tokens) of each slice."""
    return [(piece.key[0], piece.start, len(piece.tokens)) for piece in step.slices]
