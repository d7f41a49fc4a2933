"""What a client asks for, and how far it has come. No torch: a request is numbers and lists.

Every setting has a bound, since each comes from outside: a value that means nothing, or that would cost without
limit, is refused with one sentence before any work is done for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from .blocks import BlockTable

Key = tuple[str, int]
"""A sequence's name: the request's id and which of its n samples this is, from 0."""

FinishReason = Literal["stop", "length", "abort", "deadline", "error"]
"""stop: an end-of-text token, a stop token or a stop string. length: max_tokens. The rest are what they say."""

MOST_SAMPLES = 128
MOST_LOGPROBS = 20
MOST_STOPS = 16
LONGEST_STOP = 256  # characters
MOST_STOP_IDS = 64
MOST_BIASES = 1024
_HUGE = 2**31 - 1

_INTEGERS = {
    "top_k": (0, _HUGE),
    "n": (1, MOST_SAMPLES),
    "min_tokens": (0, _HUGE),
    "max_tokens": (1, _HUGE),
}
_OPTIONAL_INTEGERS = {
    "seed": (-(2**63), 2**63 - 1),
    "logprobs": (0, MOST_LOGPROBS),
    "prompt_logprobs": (0, MOST_LOGPROBS),
    "best_of": (1, MOST_SAMPLES),
}
# A repetition penalty and a top_p of 0 would divide by zero and leave no token.
_FLOATS = {
    "temperature": (0.0, 100.0),
    "top_p": (1e-6, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}


class RequestError(ValueError):
    """A request that can never be served as it is: the client must change it (HTTP 400)."""


class QueueFull(RuntimeError):
    """No room to wait now: the same request may be served later (HTTP 429 or 503)."""


class EngineDead(RuntimeError):
    """The engine takes no requests any more: it is stopping, or it has failed (HTTP 503)."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when a sequence ends.

    Raises:
        RequestError: a value of a wrong kind, not finite, or out of its range.
    """

    temperature: float = 1.0
    """0: greedy."""
    top_k: int = 0
    """Sample among the k likeliest; 0: all."""
    top_p: float = 1.0
    min_p: float = 0.0
    """Drop tokens less likely than this fraction of the likeliest one."""
    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens in the prompt or the answer (CTRL, 4.1)."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit) pairs."""
    seed: int | None = None
    logprobs: int | None = None
    """None: no log probabilities. Else the chosen token's, and those of this many of the likeliest."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens but for the first. Such a prompt is computed whole, whatever is cached."""
    n: int = 1
    best_of: int | None = None
    """Draw this many sequences, of which the caller keeps the n likeliest. None: n."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are looked for in the text, not here."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    """Go on after an end-of-text token; stop_token_ids still end."""
    min_tokens: int = 0
    """Generated tokens (the prompt does not count) before an end-of-text or stop token counts."""
    max_tokens: int = 16
    skip_special_tokens: bool = True
    """False: the text has special tokens too, but for those that end it."""

    def __post_init__(self) -> None:
        for name, (low, high) in _INTEGERS.items():
            _integer(name, getattr(self, name), low, high)
        for name, (low, high) in _OPTIONAL_INTEGERS.items():
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), low, high)
        for name, (low, high) in _FLOATS.items():
            object.__setattr__(self, name, _number(name, getattr(self, name), low, high))
        for name in ("ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is {_shown(getattr(self, name))}: give true or false")
        if self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens {self.min_tokens} is over max_tokens {self.max_tokens}")
        if self.best_of is not None and self.best_of < self.n:
            raise RequestError(f"best_of {self.best_of} is under n {self.n}: draw at least as many as you keep")
        self._check_lists()

    def _check_lists(self) -> None:
        for name, most in (("stop", MOST_STOPS), ("stop_token_ids", MOST_STOP_IDS), ("logit_bias", MOST_BIASES)):
            items = getattr(self, name)
            if not isinstance(items, tuple | list):
                raise RequestError(f"{name} is {_shown(items)}: give a list")
            if len(items) > most:
                raise RequestError(f"{name} has {len(items)} entries, but at most {most} are taken")
        for text in self.stop:
            if not isinstance(text, str) or not 1 <= len(text) <= LONGEST_STOP:
                raise RequestError(f"stop holds {_shown(text)}: give strings of 1 to {LONGEST_STOP} characters")
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, _HUGE)
        pairs = []
        for pair in self.logit_bias:
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise RequestError(f"logit_bias holds {_shown(pair)}: give (token id, bias) pairs")
            token, bias = pair
            pairs.append((_integer("logit_bias", token, 0, _HUGE), _number("logit_bias", bias, -100.0, 100.0)))
        if len({token for token, _ in pairs}) < len(pairs):
            raise RequestError("logit_bias names a token twice: give each token once")
        # Lists are copied: whoever gave them may change theirs later.
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", tuple(pairs))

    @property
    def sequences(self) -> int:
        """How many are generated."""
        return self.best_of or self.n

    def check_vocabulary(self, size: int) -> None:
        """Raises RequestError where a token id is not below `size`."""
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", [t for t, _ in self.logit_bias])):
            for token in ids:
                if token >= size:
                    raise RequestError(f"{name} names token {token}, but the vocabulary has {size} tokens")


class State(Enum):
    """Where a sequence is."""

    WAITING = "waiting"
    """In the queue, without blocks; perhaps preempted."""
    FORKING = "forking"
    """A sample beyond the first, until the first has computed the prompt that they share."""
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """One sequence on its way: a prompt, what was generated, and how much of both has keys and values.

    `tokens` only ever grows, and preemption sets `computed` back without touching it: no token is ever lost, and
    prompt_length keeps its meaning.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    arrival: float = 0.0
    """Seconds, on the clock that `Scheduler.schedule` is given."""
    salt: str = ""
    """Only equal salts share cached blocks: one for each API key, so that timing tells nobody another's text."""
    deadline: float | None = None
    """When to give up, seconds on the same clock."""
    index: int = 0
    state: State = State.WAITING
    order: int = 0
    """The scheduler's count of requests: a lower one is older."""
    computed: int = 0
    """Tokens whose keys and values lie in blocks."""
    speculative: tuple[int, ...] = ()
    """Guesses at what follows `tokens`, to be checked in the next step."""
    preemptions: int = 0
    overtaken: int = 0
    """How many younger requests were admitted while this one did not fit."""
    served: int = -1
    """The last step that it was part of."""
    started: float | None = None
    """When it was first given blocks, seconds."""
    cached: int = 0
    """Prompt tokens that the prefix cache held when it was first admitted."""
    finish: FinishReason | None = None
    tokens: list[int] = field(init=False)
    table: BlockTable | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id:
            raise RequestError(f"the request's id is {_shown(self.id)}: give a string that is not empty")
        self.prompt = tuple(self.prompt)
        if not self.prompt:
            raise RequestError("the prompt is empty: give at least one token")
        for token in self.prompt:
            _integer("the prompt's token", token, 0, _HUGE)
        for name in ("arrival", "deadline"):
            if getattr(self, name) is not None:
                _number(name, getattr(self, name), -math.inf, math.inf)
        self.tokens = list(self.prompt)

    @property
    def key(self) -> Key:
        return self.id, self.index

    @property
    def generated(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def generated_length(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def total(self) -> int:
        """Tokens to compute: prompt, generated and speculative."""
        return len(self.tokens) + len(self.speculative)

    @property
    def decoding(self) -> bool:
        """Only the last token, and guesses after it, are left to compute."""
        return self.computed == len(self.tokens) - 1


def _shown(value: Any) -> str:
    """As Python writes it, cut: a value from outside may be long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} is {_shown(value)}: give a whole number from {low} to {high}")
    return value


def _number(name: str, value: Any, low: float, high: float) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not low <= value <= high  # NaN is in no range
        or value in (math.inf, -math.inf)
    ):
        raise RequestError(f"{name} is {_shown(value)}: give a finite number from {low:g} to {high:g}")
    return float(value)
