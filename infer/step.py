"""What passes between the scheduler and the runner, and the scheduler's settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from .blocks import Copy
from .request import FinishReason, Key

Policy = Literal["splitfuse", "static", "prefill_first", "no_chunk"]
Due = tuple[int, float]
"""Of a prompt: the tokens to be computed until it is done, those before it included, and seconds until it is late."""
Budget = Callable[[int, int, Sequence[Due]], int]
"""(decoding sequences, the tokens of context that they attend to, prompts) -> tokens of this step, decodes too."""
PACE = 512
"""Prompt tokens a second that a client expects: what comes later is late (DeepSpeed-FastGen, section 4)."""

STATIC_BUDGET = 768
"""DeepSpeed-FastGen's max_ragged_batch_size."""


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits and policy. ValueError for one that means nothing."""

    policy: Policy = "splitfuse"
    """splitfuse: decodes, then prompts cut to `budget`. static: the same, 768 tokens. prefill_first: whole prompts
    alone, decodes when there are none. no_chunk: decodes and whole prompts together. A prompt of more than
    max_step_tokens is cut under every policy."""
    budget: int | Budget = 512
    """Tokens a step under splitfuse. Keep it over max_sequences: decodes come first, prompts get what they leave."""
    max_step_tokens: int = 8192
    """What the runner can take in one step, whatever the policy."""
    max_sequences: int = 128
    """Sequences that hold blocks and can be part of one step."""
    max_positions: int = 8192
    """Tokens of prompt and answer together that the model can take."""
    max_queued_requests: int = 1024
    max_queued_tokens: int = 1 << 20
    eos_ids: tuple[int, ...] = ()
    vocabulary: int | None = None
    """None: token ids are not checked against it."""
    max_overtakes: int = 8
    """Younger requests that may be admitted before one that does not fit; then it is waited for. Under prefill_first
    also the steps in a row that may pass without decodes."""
    lookahead: int = 32
    """How far down the queue a step looks for a request that fits."""

    def __post_init__(self) -> None:
        if self.policy not in get_args(Policy):
            raise ValueError(f"policy {self.policy!r} is not one of {', '.join(get_args(Policy))}")
        for name in ("max_step_tokens", "max_sequences", "max_positions", "max_queued_requests", "lookahead"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be 1 or more")
        if isinstance(self.budget, int) and self.budget < 1:
            raise ValueError(f"budget {self.budget} must be 1 token or more")
        if self.max_overtakes < 0:
            raise ValueError(f"max_overtakes {self.max_overtakes} must be 0 or more")


@dataclass(frozen=True, slots=True)
class Slice:
    """Consecutive tokens of one sequence."""

    key: Key
    start: int
    """Position of the first."""
    tokens: tuple[int, ...]
    blocks: tuple[int, ...]
    """Position p lies in blocks[p // size], slot p % size. Positions before `start` hold keys and values already."""
    wants_logits: bool
    """False for a part of a prompt that is not its end."""
    drafts: int = 0
    """So many of the last tokens are guesses: logits are wanted after the token before them and after each."""


@dataclass(frozen=True, slots=True)
class Step:
    """One pass of the model. The copies come first, in their order; then all slices at once."""

    number: int
    slices: tuple[Slice, ...] = ()
    copies: tuple[Copy, ...] = ()
    preempted: tuple[Key, ...] = ()
    expired: tuple[Event, ...] = ()
    """Sequences whose deadline has passed."""
    parts: tuple[Step, ...] = ()
    """Of each lane, where there are several (`lanes.Lanes`): its slices and copies. `slices` has all of them."""

    @property
    def tokens(self) -> int:
        return sum(len(piece.tokens) for piece in self.slices)


@dataclass(frozen=True, slots=True)
class Result:
    """What the runner found for one slice that wants logits."""

    token: int
    """Sampled after the last accepted token."""
    accepted: int = 0
    """How many of the slice's drafts were right, from the first on."""
    drafts: tuple[int, ...] = ()
    """Guesses at what follows `token`."""
    error: str | None = None
    """Why this sequence, and no other, failed; the rest is not looked at."""


@dataclass(frozen=True, slots=True)
class Event:
    """New tokens of one sequence, its end, or both."""

    key: Key
    tokens: tuple[int, ...] = ()
    finish: FinishReason | None = None
    stop_token: int | None = None
    """The last of `tokens` when it is what ended the sequence; it is not part of the text."""
    error: str | None = None
