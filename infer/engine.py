"""The engine of one model: requests in from any thread, deltas out, on a thread of its own or on the caller's."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..models.gpt import GPT
from ..models.hub import resolve
from ..models.tokenizer import Tokenizer
from ..parallel.launch import Ranks
from .admission import Admission, CompiledGrammar
from .config import EngineConfig
from .core import Core, Hook, log
from .draft_model import check_tokenizers
from .fleet import Fleet
from .open_model import generation_defaults, keep_all, model_folder, open_model
from .outputs import Sink
from .pools import longest
from .request import EngineDead, SamplingParams
from .wire import Kind

PULSE_S = 5.0
"""Seconds without a step after which the other ranks are asked whether they are there."""


class Engine:
    """Serves one model.

    The model is put into eval mode, and its routers drop no token, whatever `eval_capacity_factor` says: a drop would
    make an answer depend on who else is in the batch.

    `submit` and `abort` may be called from any thread. Either `start` gives it a thread of its own, or one thread at
    a time calls `step`. Deltas come on the thread that runs the steps.

    Attributes:
        model, tokenizer, config: as given; the tokenizer may be None, and then no text is told.
        name: of the model.
        vocabulary: token ids are below it.
        max_model_len: tokens of prompt and answer together.
        eos_ids: tokens that end a text.
        defaults: settings of `SamplingParams` for who says nothing: the checkpoint's. `submit` does not look at them.
        core: the steps.
        failure: what ended the loop, None while it lives.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer | None,
        config: EngineConfig | None = None,
        *,
        draft_model: GPT | None = None,
        fleet: Fleet | None = None,
    ) -> None:
        """Raises ValueError: the settings ask for what the model or the memory cannot give.

        fleet: the ranks that hold the model together; this is the first of them.
        """
        config = EngineConfig() if config is None else config
        keep_all(model)
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, config
        self.name = "model"
        self.defaults: dict[str, Any] = {}
        self.vocabulary = model.config.vocab_size
        self.max_model_len = longest(model, config)
        self._admission = Admission(tokenizer, config, max_model_len=self.max_model_len, vocabulary=self.vocabulary)
        self.eos_ids = self._admission.eos_ids
        self.core = Core(
            model,
            config,
            max_model_len=self.max_model_len,
            eos_ids=self.eos_ids,
            draft_model=draft_model,
            fleet=fleet,
        )
        self.failure: BaseException | None = None
        self._aborts: set[str] = set()
        self._wake = threading.Condition(self.core.lock)
        self._thread: threading.Thread | None = None
        self._closing = self._closed = False

    @classmethod
    def open(cls, path: str | Path, config: EngineConfig | None = None, ranks: Ranks | None = None) -> Engine:
        """The engine of a model directory, a run, or hf://org/name. Raises what `open_model` and `Engine` do.

        ranks: all of them hold the model together, and the others call `ranks.follow`. ValueError: they do not fit.
        """
        config = EngineConfig() if config is None else config
        dtype = None if config.dtype is None else getattr(torch, config.dtype)
        fleet = None
        config.check_ranks(1 if ranks is None else ranks.world)
        if ranks is not None and ranks.world > 1:
            from .ranks import open_fleet  # what it imports takes half a second

            model, tokenizer, fleet = open_fleet(path, config, ranks)
        else:
            model, tokenizer = open_model(path, device=config.device, dtype=dtype)
        draft = None
        if config.draft not in ("", "ngram"):
            draft, drafts = open_model(config.draft, device=config.device, dtype=dtype)
            check_tokenizers(tokenizer, drafts)
        engine = cls(model, tokenizer, config, draft_model=draft, fleet=fleet)
        engine.name = Path(path).name or str(path)
        if config.generation_config:
            engine.defaults = generation_defaults(model_folder(resolve(path)))
        return engine

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
        return not self.core.scheduler.busy and not self._aborts

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
        prepared = self._admission.prepare(
            prompt, params, sink, id=id, salt=salt, deadline=deadline, grammar=grammar, routes=routes
        )
        with self._wake:
            self._check_alive()
            self.core.add(prepared)
            self._wake.notify_all()
        return prepared.first.id

    def _check_alive(self) -> None:
        if self.failure is not None:
            raise EngineDead("the engine has failed and takes no requests")
        if self._closing:
            raise EngineDead("the engine is stopping and takes no requests")

    def abort(self, id: str) -> None:
        """Ends a request, whatever it is doing; its blocks are free within a step. No such request: nothing."""
        with self._wake:
            if self.core.knows(id):
                self._aborts.add(id)
                self._wake.notify_all()

    def step(self) -> bool:
        """One step of all sequences; False when there was nothing to do.

        Raises:
            Exception: what the model's pass raised twice in a row; the engine is dead then, and every sink knows.
        """
        try:
            return self.core.step(self._take_aborts)
        except Exception as error:
            self._die(error)
            raise

    def _take_aborts(self) -> set[str]:
        aborts, self._aborts = self._aborts, set()
        return aborts

    def watch(self, hook: Hook, *, sampled: int = 0) -> Callable[[], None]:
        """Calls `hook` after each step, on the engine's thread; what is returned ends that.

        Args:
            sampled: tokens of a step whose choices its report should tell, where there are so many.
        """
        core = self.core
        with core.lock:
            core.hooks = {**core.hooks, hook: sampled}

        def unwatch() -> None:
            with core.lock:
                core.hooks = {one: count for one, count in core.hooks.items() if one != hook}

        return unwatch

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
                        if not self._wake.wait(None if self.core.fleet is None else PULSE_S):
                            break  # a step without work asks the other ranks whether they are there
                self.core.step(self._take_aborts)
        except BaseException as error:
            self._die(error)

    def _die(self, error: BaseException) -> None:
        with self._wake:
            self.failure = error
            self._aborts = set()
            self._wake.notify_all()
        log.critical("the engine has failed", exc_info=error)
        self.core.die()

    def stop(self, grace_s: float = 0.0) -> None:
        """Takes no more requests, finishes those under way for `grace_s` seconds, and aborts the rest."""
        end = time.monotonic() + grace_s
        with self._wake:
            self._closing = True
            self._wake.notify_all()
            thread = self._thread
        while self.alive and not self.idle and (left := end - time.monotonic()) > 0:
            if thread is None:
                self.step()
            else:
                with self._wake:
                    self._wake.wait_for(lambda: self.idle or not self.alive, left)
        with self._wake:
            self._aborts |= {key[0] for key in self.core.live}
            self._wake.notify_all()
        if thread is None and self.alive:
            self.step()
        elif thread is not None and thread is not threading.current_thread():
            thread.join()
        if self.core.fleet is not None and self.alive:
            with contextlib.suppress(RuntimeError):  # one that is gone already
                self.core.fleet.say(Kind.END)
        self._closed = True

    def report(self) -> dict[str, float | int | str]:
        """Sizes and settings, and counts since the start."""
        config, core, counts = self.config, self.core, self.core.scheduler.counts()
        return {
            "model": self.name,
            "device": str(core.runner.device),
            "dtype": str(self.model.embed.weight.dtype).removeprefix("torch."),
            "kv_dtype": config.kv_dtype,
            "policy": config.policy,
            **_budget(core),
            "max_model_len": self.max_model_len,
            "max_sequences": config.max_sequences,
            "block_size": core.pool.size,
            "blocks": counts.blocks,
            "blocks_used": counts.used,
            "kv_bytes": counts.blocks * core.block_bytes,
            "weight_bytes": core.traffic.weights,
            "memory_rate": core.runner.memory_rate,
            "prefix_queries": counts.prefix_queries,
            "prefix_hits": counts.prefix_hits,
            "preemptions": counts.preemptions,
        }


def _budget(core: Core) -> dict[str, int]:
    """Tokens of a step beside one decode, and where no sequence decodes; under splitfuse."""
    if isinstance(core.budget, int):
        return {"budget": core.budget, "budget_alone": core.budget}
    return {"budget": core.budget(1, 0, ()), "budget_alone": core.budget(0, 0, ())}
