"""An engine without a model: the real one's methods, text that is known beforehand, and faults on demand.

It answers with WORDS, turned by the length of the prompt and the sample's index, one token a step. Blocks are
counted as a paged cache would: tests look at `used_blocks`.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from coterie.infer.outputs import Delta, Sink, StepReport, TokenLogprob
from coterie.infer.request import EngineDead, FinishReason, QueueFull, Request, RequestError, SamplingParams
from coterie.infer.stops import StoppingText
from coterie.models.tokenizer import Tokenizer, train_bpe

WORDS = "the cat sat on the mat and the small dog ran after a ball é "
LAYERS, EXPERTS, TOP_K = 2, 4, 2


@cache
def small_tokenizer() -> Tokenizer:
    return train_bpe([WORDS * 4, 'a b c {}[]:,"0123456789 true false null'] * 8, 300)


@dataclass
class FakeConfig:
    block_size: int = 4
    max_sequences: int = 8
    max_queued_requests: int = 16


@dataclass
class Sample:
    """One sequence on its way."""

    request: Request
    sink: Sink
    text: StoppingText
    matcher: Any = None
    routes: bool = False
    computed: int = 0
    """Prompt tokens whose blocks are taken."""
    total: float = 0.0
    held: list[Delta] = field(default_factory=list)


class FakeEngine:
    """Attributes to turn, besides the real engine's:

    step_s: seconds that a step takes.
    chunk: prompt tokens of a step and sequence.
    gate: cleared, no step begins (everything stays in the phase it is in); set, steps go on.
    blocks: of the pretended pool.
    fail_at: tokens after which every sequence ends with finish "error"; None: never.
    die_at: the step that raises, which ends the loop; None: never.
    refuse: raised by `submit` when set.
    words: the ids that answers are made of.
    script: the ids of every answer, before an end of text; empty: words.
    submitted: (id, prompt, params, salt) of every request that was taken.
    aborted: ids given to `abort`, in order.
    """

    def __init__(self, tokenizer: Tokenizer | None = None, *, step_s: float = 0.0, max_model_len: int = 256) -> None:
        self.tokenizer = tokenizer or small_tokenizer()
        self._own = self.tokenizer
        self.model: Any = None
        self.config: Any = FakeConfig()
        self.name = "fake"
        self.vocabulary = self.tokenizer.vocab_size
        self.max_model_len = max_model_len
        self.eos_ids = self.tokenizer.eos_ids
        self.defaults: dict[str, Any] = {}
        self.alive, self.failure = True, None
        self.step_s, self.chunk, self.blocks = step_s, 32, 1000
        self.fail_at: int | None = None
        self.die_at: int | None = None
        self.refuse: BaseException | None = None
        self.words = self.tokenizer.encode(WORDS)
        self.script: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.submitted: list[tuple[str, tuple[int, ...], SamplingParams, str]] = []
        self.aborted: list[str] = []
        self.steps = 0
        self._waiting: list[Sample] = []
        self._running: list[Sample] = []
        self._ending: dict[tuple[str, int], FinishReason] = {}
        self._hooks: list[Callable[[StepReport], None]] = []
        self._ids = itertools.count()
        self._lock = threading.RLock()
        self._work = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self._stopping = False

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        sink: Sink,
        *,
        id: str | None = None,
        salt: str = "",
        deadline: float | None = None,
        grammar: Any = None,
        routes: bool = False,
    ) -> str:
        if self.refuse is not None:
            raise self.refuse
        params.check_vocabulary(self.vocabulary)
        id = id or f"fake-{next(self._ids)}"
        if any(token >= self.vocabulary for token in prompt):
            raise RequestError(f"the prompt's tokens must be under {self.vocabulary}")
        if len(prompt) + params.max_tokens > self.max_model_len:
            raise RequestError(
                f"{len(prompt)} prompt tokens and {params.max_tokens} new ones pass {self.max_model_len}"
            )
        with self._work:
            if self.failure is not None or self._stopping:
                raise EngineDead("the engine has stopped")
            if len(self._waiting) + params.sequences > self.config.max_queued_requests:
                raise QueueFull("the queue is full")
            for index in range(params.sequences):
                request = Request(id, tuple(prompt), params, salt=salt, deadline=deadline, index=index)
                skip, least = params.skip_special_tokens, params.min_tokens
                text = StoppingText(self._own, params.stop, before=prompt, min_tokens=least, skip_special=skip)
                matcher = grammar.start() if grammar is not None else None
                self._waiting.append(Sample(request, sink, text, matcher, routes))
            self.submitted.append((id, tuple(prompt), params, salt))
            self._work.notify_all()
        return id

    def abort(self, id: str) -> None:
        with self._work:
            self.aborted.append(id)
            for sample in [*self._waiting, *self._running]:
                if sample.request.id == id:
                    self._ending[sample.request.key] = "abort"
            self._work.notify_all()

    @property
    def idle(self) -> bool:
        with self._lock:
            return not self._waiting and not self._running

    @property
    def used_blocks(self) -> int:
        with self._lock:
            size = self.config.block_size
            return sum(-(-(s.computed + s.request.generated_length) // size) for s in self._running)

    @property
    def phases(self) -> dict[str, int]:
        """How many sequences are queued, in their prompt, and decoding."""
        with self._lock:
            prefill = sum(s.computed < len(s.request.prompt) for s in self._running)
            return {"queued": len(self._waiting), "prefill": prefill, "decode": len(self._running) - prefill}

    def watch(self, hook: Callable[[StepReport], None], *, sampled: int = 0) -> Callable[[], None]:
        self._hooks.append(hook)

        def unwatch() -> None:
            self._hooks = [one for one in self._hooks if one is not hook]

        return unwatch

    def report(self) -> dict[str, float | int | str]:
        return {"blocks": self.blocks, "block_size": self.config.block_size, "policy": "splitfuse", "preemptions": 0}

    def start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name="fake-engine", daemon=True)
            self._thread.start()

    def stop(self, grace_s: float = 0.0) -> None:
        with self._work:
            self._stopping = True
        until = time.monotonic() + grace_s
        while not self.idle and time.monotonic() < until and self.failure is None:
            time.sleep(0.005)
        with self._work:
            for sample in [*self._waiting, *self._running]:
                self._ending[sample.request.key] = "abort"
            self._end_those_that_must()
            self.alive = False
            self._work.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self.gate.set()
            self._thread.join(5)

    def _loop(self) -> None:
        while True:
            with self._work:
                while self.alive and self.idle:
                    self._work.wait(1)
                if not self.alive:
                    return
            try:
                self.step()
            except Exception as error:
                self._die(error)
                return

    def _die(self, error: BaseException) -> None:
        with self._lock:
            self.failure, self.alive = error, False
            for sample in [*self._waiting, *self._running]:
                self._finish(sample, "error", error="the engine has failed")

    def step(self) -> bool:
        while self.alive and not self.gate.wait(0.005):
            with self._lock:  # an abort is heeded though nothing else moves, as between two steps
                self._end_those_that_must()
        if self.step_s:
            time.sleep(self.step_s)
        with self._lock:
            started = time.monotonic()
            self._end_those_that_must()
            if self.idle:
                return False
            self.steps += 1
            if self.steps == self.die_at:
                raise RuntimeError("secret: /home/someone/weights are broken")
            while self._waiting and len(self._running) < self.config.max_sequences:
                self._running.append(self._waiting.pop(0))
            generated = sum(self._advance(sample) for sample in list(self._running))
            self._report(generated, time.monotonic() - started)
            return True

    def _end_those_that_must(self) -> None:
        for sample in [*self._waiting, *self._running]:
            late = sample.request.deadline is not None and time.monotonic() > sample.request.deadline
            ending = self._ending.get(sample.request.key) or ("deadline" if late else None)
            if ending:
                self._finish(sample, ending)
        self._ending.clear()

    def _advance(self, sample: Sample) -> int:
        request = sample.request
        if sample.computed < len(request.prompt):
            sample.computed = min(len(request.prompt), sample.computed + self.chunk)
            if sample.computed < len(request.prompt):
                return 0
        if self.fail_at is not None and request.generated_length >= self.fail_at:
            self._finish(sample, "error", error="this sequence could not be sampled")
            return 0
        token = self._choose(sample)
        request.tokens.append(token)
        ended = self._ended(sample, token)
        text = "" if isinstance(ended, tuple) and ended[1] is not None else sample.text.push(token)
        if sample.text.stopped is not None:
            ended = ("stop", sample.text.stopped)
        elif ended:
            text += sample.text.finish()
        delta = Delta(
            request.key,
            text,
            (token,),
            self._logprobs(sample, token),
            (self._routes(token),) if sample.routes else (),
            ended[0] if ended else None,
            None if not ended or ended[1] in self.eos_ids else ended[1],
            generated=request.generated_length,
            cached=0,
            prompt_logprobs=self._prompt_logprobs(request),
        )
        sample.total += -0.5 - token / 1000
        if ended:
            self._remove(sample)
        self._emit(sample, delta)
        return 1

    def _choose(self, sample: Sample) -> int:
        request = sample.request
        biased = [token for token, bias in request.params.logit_bias if bias >= 100]
        if biased:
            return biased[0]
        if sample.matcher is not None:
            bits = sample.matcher.mask()
            fits = [t for t in range(self.vocabulary) if int(bits.flatten()[t // 32]) >> (t % 32) & 1]
            ends = [t for t in fits if t in self.eos_ids]
            token = ends[0] if ends else fits[0]
            sample.matcher.accept(token)
            return token
        if self.script:
            return [*self.script, self.eos_ids[0]][request.generated_length]
        turn = len(request.prompt) + request.index + request.generated_length + (request.params.seed or 0)
        return self.words[turn % len(self.words)]

    def _ended(self, sample: Sample, token: int) -> tuple[FinishReason, Any] | None:
        request, params = sample.request, sample.request.params
        if request.generated_length >= params.min_tokens:
            if token in params.stop_token_ids:
                return "stop", token
            if token in self.eos_ids and not params.ignore_eos:
                return "stop", token
        return ("length", None) if request.generated_length >= params.max_tokens else None

    def _logprobs(self, sample: Sample, token: int) -> tuple[TokenLogprob, ...]:
        count = sample.request.params.logprobs
        if count is None:
            return ()
        top = tuple(((token + i) % self.vocabulary, -0.5 - i) for i in range(count))
        return (TokenLogprob(token, -0.5, top),)

    def _prompt_logprobs(self, request: Request) -> tuple[TokenLogprob, ...]:
        count = request.params.prompt_logprobs
        if count is None or request.generated_length > 1:
            return ()
        return tuple(
            TokenLogprob(t, -1.0, tuple(((t + i) % self.vocabulary, -1.0 - i) for i in range(count)))
            for t in request.prompt[1:]
        )

    def _routes(self, token: int) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple((token + layer + k) % EXPERTS for k in range(TOP_K)) for layer in range(LAYERS))

    def _emit(self, sample: Sample, delta: Delta) -> None:
        params = sample.request.params
        if params.sequences == params.n:
            sample.sink(delta)
            return
        sample.held.append(delta)
        samples = [*self._waiting, *self._running]
        if delta.finish and delta.key[1] < params.n:  # the first n are kept: as good as the likeliest here
            kept = [d for d in sample.held if d.finish != "abort"]
            chosen = Delta(
                delta.key,
                "".join(d.text for d in kept),
                tuple(t for d in kept for t in d.tokens),
                tuple(p for d in kept for p in d.logprobs),
                (),
                delta.finish,
                delta.stop,
                delta.error,
                delta.generated,
            )
            assert sample not in samples
            sample.sink(chosen)

    def _finish(self, sample: Sample, reason: FinishReason, error: str | None = None) -> None:
        self._remove(sample)
        text, generated = sample.text.finish(), sample.request.generated_length
        self._emit(sample, Delta(sample.request.key, text, finish=reason, error=error, generated=generated))

    def _remove(self, sample: Sample) -> None:
        for samples in (self._waiting, self._running):
            if sample in samples:
                samples.remove(sample)

    def _report(self, generated: int, seconds: float) -> None:
        loads = tuple(tuple(generated for _ in range(EXPERTS)) for _ in range(LAYERS))
        running, waiting = len(self._running), len(self._waiting)
        report = StepReport(
            self.steps, seconds, generated, generated, 0, generated, running, waiting, self.used_blocks, self.blocks,
            0, 0, 0, loads, 0.5,
        )  # fmt: skip
        for hook in list(self._hooks):
            hook(report)
