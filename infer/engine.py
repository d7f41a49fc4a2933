"""The engine: requests in from any thread, deltas out of one loop that schedules, runs and commits steps."""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from ..models.gpt import GPT
from ..models.tokenizer import Tokenizer
from .blocks import BlockPool
from .config import EngineConfig
from .counter import seed_of_choice
from .drafts import Asked, Drafter, Guess
from .live import BestOf, Live
from .memory import count_blocks, read_rate, weight_bytes
from .outputs import Delta, Sink, StepReport
from .paged import KVPool, block_bytes
from .request import EngineDead, Key, Request, RequestError, SamplingParams
from .runner import Ran, Runner
from .sample_state import Matcher, SampleState
from .scheduler import Scheduler
from .step import Event, SchedulerConfig, Step
from .stops import StoppingText, stop_ids

_log = logging.getLogger("coterie")
_BEFORE = 16  # tokens of the prompt that can decide how the text begins


class CompiledGrammar(Protocol):
    """What `grammar.compile_grammar` gives."""

    def start(self) -> Matcher:
        """One sequence's way through it."""
        ...


class Engine:
    """Serves one model.

    `submit` and `abort` may be called from any thread. Either `start` gives it a thread of its own, or one thread at
    a time calls `step`. Deltas come on the thread that runs the steps.

    Attributes:
        model, tokenizer, config: as given; the tokenizer may be None, and then no text is told.
        name: of the model.
        vocabulary: token ids are below it.
        max_model_len: tokens of prompt and answer together.
        eos_ids: tokens that end a text.
        failure: what ended the loop, None while it lives.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer | None,
        config: EngineConfig | None = None,
        *,
        draft_model: GPT | None = None,
    ) -> None:
        """Raises ValueError: the settings ask for what the model or the memory cannot give."""
        config = EngineConfig() if config is None else config
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, config
        self.name = "model"
        self.vocabulary = model.config.vocab_size
        self.eos_ids = () if tokenizer is None else tokenizer.eos_ids
        self.max_model_len = _length(config, model)
        self.failure: BaseException | None = None
        device, dtype = model.embed.weight.device, model.embed.weight.dtype
        self.block_bytes = block_bytes(model.config, config.block_size, config.kv_dtype, dtype)
        blocks = count_blocks(
            config.kv_memory,
            self.block_bytes,
            config.block_size,
            max_model_len=self.max_model_len,
            max_sequences=config.max_sequences,
            device=device,
        )
        kv = KVPool(model.config, blocks, config.block_size, dtype=config.kv_dtype, model_dtype=dtype, device=device)
        self.runner = Runner(model, kv)
        self.pool = BlockPool(blocks, config.block_size)
        self.scheduler = Scheduler(self._scheduling(), self.pool)
        self.drafter: Drafter | None = None
        self.weight_bytes, self.memory_rate = weight_bytes(model), read_rate(model)
        self._live: dict[Key, Live] = {}
        self._states: dict[Key, SampleState] = {}
        self._guesses: dict[Key, Guess] = {}
        self._aborts: set[str] = set()
        self._hooks: tuple[Callable[[StepReport], None], ...] = ()
        self._wake = threading.Condition(threading.RLock())
        self._thread: threading.Thread | None = None
        self._closing = self._closed = self._stumbled = False
        self._count, self._prefix = itertools.count(), secrets.token_hex(4)

    @classmethod
    def open(cls, path: str | Path, config: EngineConfig | None = None) -> Engine:
        """The engine of a model directory, a run, or hf://org/name. Raises what `open_model` and `Engine` do."""
        from .generate import open_model

        config = EngineConfig() if config is None else config
        dtype = None if config.dtype is None else getattr(torch, config.dtype)
        model, tokenizer = open_model(path, device=config.device, dtype=dtype)
        engine = cls(model, tokenizer, config)
        engine.name = Path(path).name or str(path)
        return engine

    def _scheduling(self) -> SchedulerConfig:
        config = self.config
        return SchedulerConfig(
            policy=config.policy,
            budget=config.budget or 512,
            max_step_tokens=config.max_step_tokens or 8192,
            max_sequences=config.max_sequences,
            max_positions=self.max_model_len,
            max_queued_requests=config.max_queued_requests,
            max_queued_tokens=config.max_queued_tokens,
            eos_ids=self.eos_ids,
            vocabulary=self.vocabulary,
        )

    @property
    def alive(self) -> bool:
        """False once the loop has failed or has been stopped."""
        return self.failure is None and not self._closed

    @property
    def running(self) -> bool:
        """Whether a thread of its own runs the steps."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.scheduler.busy and not self._aborts

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        sink: Sink,
        *,
        id: str | None = None,
        salt: str = "",
        deadline: float | None = None,
        grammar: CompiledGrammar | None = None,
        routes: bool = False,
    ) -> str:
        """Queues a request; its deltas go to `sink`.

        Args:
            prompt: token ids.
            params: `max_tokens` and the prompt together pass no `max_model_len`.
            sink: called on the engine's thread, in order, until each of the `n` sequences has had a `finish`.
            id: unlike that of any request under way; None: one is made.
            salt: only requests of one salt share cached keys and values.
            deadline: when to give up, by `time.monotonic`.
            grammar: what the text must follow.
            routes: whether deltas tell which experts computed each token.

        Returns: the request's id.

        Raises:
            RequestError: it can never be served.
            QueueFull: too many wait.
            EngineDead: the engine is stopping or has failed.
        """
        if (length := len(prompt)) > self.max_model_len:
            raise RequestError(f"the prompt has {length} tokens, but with its answer {self.max_model_len} fit")
        count = next(self._count)
        id = f"{self._prefix}-{count}" if id is None else id
        params, stops = self._stops(params)
        sequences, best = params.sequences, params.sequences > params.n
        emit = BestOf(params.n, sequences, sink, params.logprobs is not None) if best else sink
        params = replace(params, logprobs=params.logprobs or 0) if best else params
        salt = salt if self.config.prefix_cache else f"{salt}\0{secrets.token_hex(16)}"
        seed = self._seed(count) if params.seed is None else params.seed
        first = Request(id, tuple(prompt), params, time.monotonic(), salt, deadline)
        states = [self._state(first, params, seed_of_choice(seed, i), grammar, routes) for i in range(sequences)]
        texts = [self._text(first, params) for _ in range(sequences)]
        with self._wake:
            self._check_alive()
            for request, state, text in zip(self.scheduler.add(first), states, texts, strict=True):
                self._live[request.key] = Live(request, state, text, stops, emit)
                self._states[request.key] = state
            self._wake.notify_all()
        return id

    def _check_alive(self) -> None:
        if self.failure is not None:
            raise EngineDead("the engine has failed and takes no requests")
        if self._closing:
            raise EngineDead("the engine is stopping and takes no requests")

    def _seed(self, count: int) -> int:
        """Of a request that brings none."""
        return seed_of_choice(self.config.seed, count) if self.config.seed else secrets.randbits(63)

    def _stops(self, params: SamplingParams) -> tuple[SamplingParams, dict[int, str | int]]:
        """Settings whose stop strings that are special tokens are stop tokens, and what the client calls each."""
        stops: dict[int, str | int] = {token: token for token in params.stop_token_ids}
        if params.stop:
            if self.tokenizer is None:
                raise RequestError("stop strings need a tokenizer, and the model has none: give stop_token_ids")
            special = stop_ids(self.tokenizer, params.stop)
            stops = {**special, **stops}
            params = replace(params, stop_token_ids=tuple(stops))
        return params, stops

    def _state(
        self, first: Request, params: SamplingParams, seed: int, grammar: CompiledGrammar | None, routes: bool
    ) -> SampleState:
        matcher = None if grammar is None else grammar.start()
        return SampleState.of(first.prompt, params, seed=seed, eos_ids=self.eos_ids, matcher=matcher, routes=routes)

    def _text(self, first: Request, params: SamplingParams) -> StoppingText | None:
        if self.tokenizer is None:
            return None
        before = first.prompt[-_BEFORE:]
        return StoppingText(self.tokenizer, params.stop, before=before, min_tokens=params.min_tokens)

    def abort(self, id: str) -> None:
        """Ends a request, whatever it is doing; its blocks are free within a step. No such request: nothing."""
        with self._wake:
            if any(key in self._live for key in self._keys(id)):
                self._aborts.add(id)
                self._wake.notify_all()

    def _keys(self, id: str) -> list[Key]:
        return [request.key for request in self.scheduler.roster.samples(id)]

    def step(self) -> bool:
        """One step of all sequences; False when there was nothing to do.

        Raises:
            Exception: what the model's pass raised twice in a row; the engine is dead then, and every sink knows.
        """
        try:
            return self._step()
        except Exception as error:
            self._die(error)
            raise

    def _step(self) -> bool:
        started = time.perf_counter()
        with self._wake:
            events = [event for id in self._aborts for event in self.scheduler.abort(id)]
            self._aborts.clear()
            step = self.scheduler.schedule(time.monotonic()) if self.scheduler.busy else None
        self._deliver(events if step is None else [*events, *step.expired])
        if step is None:
            return bool(events)
        ran = self._run(step)
        if ran is None:
            return True
        with self._wake:
            events = self.scheduler.commit(step, ran.results)
        generated = self._deliver(events, ran)
        if self.drafter is not None:
            self._draft(self.drafter, step)
        if self._hooks:
            self._tell(step, ran, generated, time.perf_counter() - started)
        return True

    def _run(self, step: Step) -> Ran | None:
        """None: the pass failed, and its sequences will compute again. Failing twice in a row is for good."""
        if not step.slices:
            return Ran()
        try:
            if self.drafter is not None:
                self.drafter.follow(step)
            ran = self.runner.run(step, self._states, guesses=self._guesses, loads=bool(self._hooks))
        except BaseException as error:
            with self._wake:
                self.scheduler.rollback(step)
            if self._stumbled or not isinstance(error, Exception):
                raise
            self._stumbled = True
            _log.exception("step %d failed and is computed again", step.number)
            return None
        self._stumbled = False
        return ran

    def _deliver(self, events: Sequence[Event], ran: Ran | None = None) -> int:
        """Hands out what happened; returns the number of tokens. What fails here fails for one sequence."""
        generated = 0
        for event in events:
            live = self._live.get(event.key)
            if live is None:
                continue
            try:
                delta = live.advance(event, None if ran is None else ran.told.get(event.key))
            except Exception as error:
                _log.exception("request %s failed", event.key[0])
                delta = live.fail(f"its text could not be made: {type(error).__name__}")
            generated += len(delta.tokens)
            self._emit(live, delta, ended=event.finish is not None)
        return generated

    def _emit(self, live: Live, delta: Delta, ended: bool) -> None:
        """ended: the scheduler knows already that it has."""
        finish = delta.finish
        try:
            live.emit(delta)
        except Exception:
            _log.exception("the sink of request %s failed", live.key[0])
            finish = finish or "error"
        if finish is None:
            return
        if not ended:
            with self._wake:
                self.scheduler.finish(live.key, finish)
        self._live.pop(live.key, None)
        self._states.pop(live.key, None)
        self._guesses.pop(live.key, None)
        if self.drafter is not None:
            self.drafter.forget(live.key)

    def _draft(self, drafter: Drafter, step: Step) -> None:
        """Guesses for the sequences of a step that go on."""
        asked: list[tuple[Request, Asked]] = []
        for piece in step.slices:
            live = self._live.get(piece.key) if piece.wants_logits else None
            request = None if live is None else self.scheduler.get(piece.key)
            if live is None or request is None or request.table is None or live.state.matcher is not None:
                continue
            count = min(self.config.draft_tokens, request.params.max_tokens - request.generated_length - 1)
            if count > 0:
                row = live.state.row(request.generated_length)
                blocks = tuple(request.table.blocks)
                asked.append((request, Asked(request.key, request.tokens, blocks, count, row)))
        if not asked:
            return
        for (request, one), guess in zip(asked, drafter.propose([one for _, one in asked]), strict=True):
            request.speculative = guess.tokens[: one.count]
            self._guesses[request.key] = guess

    def watch(self, hook: Callable[[StepReport], None]) -> Callable[[], None]:
        """Calls `hook` after each step, on the engine's thread; what is returned ends that."""
        with self._wake:
            self._hooks = (*self._hooks, hook)

        def unwatch() -> None:
            with self._wake:
                self._hooks = tuple(one for one in self._hooks if one is not hook)

        return unwatch

    def _tell(self, step: Step, ran: Ran, generated: int, seconds: float) -> None:
        decodes = sum(piece.start >= self._prompt_length(piece.key, piece.start + 1) for piece in step.slices)
        roster = self.scheduler.roster
        report = StepReport(
            number=step.number,
            seconds=seconds,
            tokens=step.tokens,
            decodes=decodes,
            prompts=len(step.slices) - decodes,
            generated=generated,
            running=len(roster.running),
            waiting=roster.queued,
            blocks_used=self.pool.used,
            blocks=self.pool.count,
            preempted=len(step.preempted),
            drafted=ran.drafted,
            accepted=ran.accepted,
            loads=ran.loads,
            roofline=0.0,
        )
        for hook in self._hooks:
            try:
                hook(report)
            except Exception:
                _log.exception("a hook that watches steps failed")

    def _prompt_length(self, key: Key, default: int) -> int:
        state = self._states.get(key)
        return default if state is None else state.prompt_length

    def start(self) -> None:
        """Runs the steps on a thread of its own, which sleeps while there are none."""
        with self._wake:
            self._check_alive()
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="coterie-engine", daemon=True)
                self._thread.start()

    def _loop(self) -> None:
        try:
            while True:
                with self._wake:
                    while self.idle:
                        self._wake.notify_all()  # who waits in `stop`
                        if self._closing:
                            return
                        self._wake.wait()
                self._step()
        except BaseException as error:
            self._die(error)

    def _die(self, error: BaseException) -> None:
        """Every client is told, and nothing is taken any more."""
        with self._wake:
            self.failure = error
            live = list(self._live.values())
            for id in {one.key[0] for one in live}:
                self.scheduler.abort(id)
            self._live.clear()
            self._states.clear()
            self._guesses.clear()
            self._aborts.clear()
            self._wake.notify_all()
        _log.critical("the engine has failed", exc_info=error)
        for one in live:
            try:
                one.emit(one.fail("the engine has failed"))
            except Exception:
                _log.exception("the sink of request %s failed", one.key[0])

    def stop(self, grace_s: float = 0.0) -> None:
        """Takes no more requests, finishes those under way for `grace_s` seconds, and aborts the rest."""
        end = time.monotonic() + grace_s
        with self._wake:
            self._closing = True
            self._wake.notify_all()
            thread = self._thread
            while thread is not None and self.alive and not self.idle and (left := end - time.monotonic()) > 0:
                self._wake.wait(left)
        while thread is None and self.alive and not self.idle and time.monotonic() < end:
            self.step()
        with self._wake:
            self._aborts |= {key[0] for key in self._live}
            self._wake.notify_all()
        if thread is None and self.alive:
            self.step()
        elif thread is not None and thread is not threading.current_thread():
            thread.join()
        self._closed = True

    def report(self) -> dict[str, float | int | str]:
        """Sizes and settings, and counts since the start."""
        config, pool = self.config, self.pool
        return {
            "model": self.name,
            "device": str(self.runner.device),
            "dtype": str(self.model.embed.weight.dtype).removeprefix("torch."),
            "kv_dtype": config.kv_dtype,
            "policy": config.policy,
            "budget": config.budget or 512,
            "max_model_len": self.max_model_len,
            "max_sequences": config.max_sequences,
            "block_size": pool.size,
            "blocks": pool.count,
            "blocks_used": pool.used,
            "kv_bytes": pool.count * self.block_bytes,
            "weight_bytes": self.weight_bytes,
            "memory_rate": self.memory_rate,
            "prefix_queries": pool.queried,
            "prefix_hits": pool.hit,
            "preemptions": self.scheduler.roster.preemptions,
        }


def _length(config: EngineConfig, model: GPT) -> int:
    most = model.config.max_positions
    if config.max_model_len > most:
        raise ValueError(f"max_model_len {config.max_model_len} is over the model's {most} positions")
    return config.max_model_len or most
