"""What the engine tells: a delta for each sequence that a step moved, and a report of each step.

No torch: these cross threads, and servers and tests read them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .request import FinishReason, Key


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """ln of the model's own probability of one token, before any setting, and of the likeliest others."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token id, logprob), likeliest first, as many as were asked for."""


@dataclass(frozen=True, slots=True)
class Delta:
    """New text and tokens of one sequence, its end, or both."""

    key: Key
    text: str = ""
    """What is certain now: a stop string is cut off, and what could become one is held back."""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of `tokens` where the request asked for them, else empty."""
    routes: tuple[tuple[tuple[int, ...], ...], ...] = ()
    """Where the request asked for it: for each of `tokens` and each MoE layer the experts that computed it, i.e. of
    the position whose logits it was drawn from."""
    finish: FinishReason | None = None
    stop: str | int | None = None
    """The stop string or the stop token's id that ended it; None for an end-of-text token or another end."""
    error: str | None = None
    """With finish "error": one sentence that may be shown to the client."""
    generated: int = 0
    """Tokens so far, these included."""
    cached: int = 0
    """Prompt tokens that the prefix cache held."""
    queued: float = 0.0
    """Seconds from the request's arrival until it was first given blocks."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Of the prompt's tokens from the second on, where the request asked for them: in the first delta with tokens."""


Sink = Callable[[Delta], None]
"""Takes the deltas of one request, in order, on the engine's thread: it must be quick and must not raise."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step, for metrics and for whoever watches."""

    number: int
    seconds: float
    tokens: int
    """Computed, prompts and decodes and guesses together."""
    decodes: int
    """Slices that went on from a generated token."""
    prompts: int
    """Slices of prompts."""
    generated: int
    """Tokens handed out."""
    running: int
    waiting: int
    blocks_used: int
    blocks: int
    preempted: int
    drafted: int
    """Guesses that were checked."""
    accepted: int
    loads: tuple[tuple[int, ...], ...]
    """Per MoE layer the assignments of each expert."""
    roofline: float
    """Bytes that had to be read (weights of the dense layers and of the experts really visited, keys and values)
    over seconds, as a fraction of the measured memory rate; 0 where that was not measured."""
    routes_LMK: np.ndarray | None = None
    """Per MoE layer the choices of some of the step's tokens, the heaviest first: as many tokens as who watches asked
    for."""

    @property
    def distinct(self) -> tuple[int, ...]:
        """Per MoE layer how many experts were visited."""
        return tuple(sum(map(bool, layer)) for layer in self.loads)
