"""From a client's request to sequences that can run: all that needs no other request, done where it comes in."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ..models.tokenizer import Tokenizer
from .config import EngineConfig
from .counter import seed_of_choice
from .live import BestOf, Live
from .outputs import Sink
from .request import Request, RequestError, SamplingParams
from .sample_state import Matcher, PromptLogprobs, SampleState
from .stops import StoppingText, stop_ids

_BEFORE = 16  # tokens of the prompt that can decide how the text begins


class CompiledGrammar(Protocol):
    """What `grammar.compile_grammar` gives."""

    def start(self) -> Matcher:
        """One sequence's way through it."""
        ...


@dataclass(frozen=True)
class Prepared:
    """A request of which the scheduler knows nothing yet."""

    first: Request
    states: list[SampleState]
    texts: list[StoppingText | None]
    stops: dict[int, str | int]
    emit: Sink

    def lives(self, samples: Sequence[Request]) -> list[Live]:
        """Its sequences, of the requests that the scheduler made of the first."""
        parts = zip(samples, self.states, self.texts, strict=True)
        return [Live(request, state, text, self.stops, self.emit) for request, state, text in parts]


class Admission:
    """Prepares requests; any thread may call it.

    Attributes:
        eos_ids: tokens that end a text.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, config: EngineConfig, *, max_model_len: int, vocabulary: int
    ) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.max_model_len, self.vocabulary = max_model_len, vocabulary
        # Some checkpoints name ends that the model cannot say.
        self.eos_ids = () if tokenizer is None else tuple(i for i in tokenizer.eos_ids if i < vocabulary)
        self._count, self._prefix = itertools.count(), secrets.token_hex(4)

    def prepare(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        sink: Sink,
        *,
        id: str | None,
        salt: str,
        deadline: float | None,
        grammar: CompiledGrammar | None,
        routes: bool,
    ) -> Prepared:
        """See `Engine.submit`."""
        if (length := len(prompt)) > self.max_model_len:  # before a look at each token
            raise RequestError(f"the prompt has {length} tokens, but with its answer {self.max_model_len} fit")
        count = next(self._count)
        id = f"{self._prefix}-{count}" if id is None else id
        params, stops = self._stops(params)
        sequences, emit = params.sequences, sink
        if sequences > params.n:
            emit = BestOf(params.n, sequences, sink, params.logprobs is not None)
            params = replace(params, logprobs=params.logprobs or 0)
        salt = salt if self.config.prefix_cache else f"{salt}\0{secrets.token_hex(16)}"
        first = Request(id, tuple(prompt), params, time.monotonic(), salt, deadline)
        seed = self._seed(count) if params.seed is None else params.seed
        asked = params.prompt_logprobs
        told = None if asked is None else PromptLogprobs(first.prompt, asked)
        states = [
            SampleState.of(
                first.prompt,
                params,
                seed=seed_of_choice(seed, i),
                eos_ids=self.eos_ids,
                matcher=None if grammar is None else grammar.start(),
                routes=routes,
                told=told,
            )
            for i in range(sequences)
        ]
        return Prepared(first, states, [self._text(first) for _ in states], stops, emit)

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
            stops = {token: stop for token, stop in special.items() if token < self.vocabulary} | stops
            params = replace(params, stop_token_ids=tuple(stops))
        return params, stops

    def _text(self, first: Request) -> StoppingText | None:
        if self.tokenizer is None:
            return None
        before, params = first.prompt[-_BEFORE:], first.params
        skip, least = params.skip_special_tokens, params.min_tokens
        return StoppingText(self.tokenizer, params.stop, before=before, min_tokens=least, skip_special=skip)
