"""The engine's settings, as the command line and the pipeline take them. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from .step import Policy

KVDType = Literal["auto", "float32", "bfloat16", "float16", "int8", "fp8"]
DType = Literal["float32", "bfloat16", "float16"]
Exchange = Literal["auto", "gathered", "flat", "hierarchical", "deduplicated"]

_AT_LEAST = {
    "block_size": 1,
    "kv_memory": 0,
    "max_model_len": 0,
    "max_sequences": 1,
    "budget": 0,
    "draft_tokens": 1,
    "max_queued_requests": 1,
    "max_queued_tokens": 1,
    "max_step_tokens": 0,
    "tp": 1,
    "ep": 1,
    "etp": 1,
    "ranks_per_node": 0,
    "spare_experts": 0,
    "replan_steps": 0,
    "move_bytes": 1024,
    "seed": 0,
}
MOST_DRAFTS = 16


@dataclass(frozen=True)
class EngineConfig:
    """How a model is served. ValueError for a setting that means nothing."""

    device: str | None = None
    """cpu or cuda; None: cuda where there is one."""
    dtype: DType | None = None
    """Of the weights; None: as they are stored."""
    kv_dtype: KVDType = "auto"
    """Of keys and values; auto: the model's own. int8 and fp8 take half of bf16's room, and change the answers."""
    block_size: int = 16
    """Tokens of a block of keys and values."""
    kv_memory: int = 0
    """Bytes for keys and values; 0: enough for max_sequences of a quarter of max_model_len each, or what is free."""
    max_model_len: int = 0
    """Tokens of prompt and answer together; 0: what the model has positions for."""
    max_sequences: int = 128
    """Sequences that compute at the same time."""
    policy: Policy = "splitfuse"
    """splitfuse: decodes, then prompts cut to the budget. static: the same with 768 tokens. prefill_first: whole
    prompts before decodes. no_chunk: decodes and whole prompts together."""
    budget: int = 0
    """Tokens of a step under splitfuse; 0: what itl_target_ms leaves room for."""
    itl_target_ms: float = 50.0
    """How long a decode may wait for its next token while prompts are computed beside it."""
    itl_limit_ms: float = 200.0
    """The same where prompts would else begin to be answered late, which is after length / 512 seconds: set it to 0.8
    of what readers bear. No more than itl_target_ms: decodes never wait longer for that."""
    prefix_cache: bool = True
    """Compute the beginning that several prompts share once."""
    draft: str = ""
    """What guesses tokens ahead: ngram (repeats of the text so far), or the directory of a smaller model with the
    same tokenizer; empty: nothing does."""
    draft_tokens: int = 4
    """Guesses a step."""
    max_queued_requests: int = 1024
    """Sequences that may wait; more are turned away."""
    max_queued_tokens: int = 1 << 20
    """Prompt tokens that may wait."""
    max_step_tokens: int = 0
    """Tokens of one step under any policy; 0: 8192."""
    generation_config: bool = True
    """Sample as the model's generation_config.json says (temperature, top_k, top_p, min_p, repetition_penalty) where
    a request says nothing. Its ends of a text count in any case."""
    tp: int = 1
    """Ranks that cut attention, dense layers and the vocabulary among them, and serve the same sequences."""
    ep: int = 1
    """Ranks that share a layer's experts out; a layer with fewer experts takes as many."""
    etp: int = 1
    """Ranks that hold slices of the same experts."""
    exchange: Exchange = "auto"
    """How tokens reach experts on other ranks: gathered (every rank gets all tokens), flat, hierarchical or
    deduplicated (all-to-all); auto: what is fastest for each size of step, measured at the start."""
    spare_experts: int = 0
    """Experts of a layer that a rank has room for beyond its even share: copies of those that are asked for most."""
    replan_steps: int = 0
    """Steps after which it is looked at anew which rank should hold which expert; they move while requests are
    served, and no token changes. 0: they stay."""
    move_bytes: int = 64 << 20
    """Of experts that a rank gets between two steps, at most; less where that takes more than a tenth of a step."""
    ranks_per_node: int = 0
    """Consecutive ranks of one machine; 0: what the launcher says."""
    rank_timeout_s: float = 120.0
    """For a rank that does not answer; then the engine ends."""
    seed: int = 0
    """Of requests that bring none: over 0, the same order of requests gives the same texts; 0: no seed is known."""

    def __post_init__(self) -> None:
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}: give a whole number of {least} or more")
        for name, choices in (("policy", Policy), ("kv_dtype", KVDType), ("exchange", Exchange)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(get_args(choices))}")
        if self.dtype is not None and self.dtype not in get_args(DType):
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(get_args(DType))}")
        for name, unit in (
            ("itl_target_ms", "milliseconds"),
            ("itl_limit_ms", "milliseconds"),
            ("rank_timeout_s", "s"),
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: give {unit} over 0")
        if self.draft_tokens > MOST_DRAFTS:
            raise ValueError(f"draft_tokens is {self.draft_tokens}: give {MOST_DRAFTS} or fewer")

    @property
    def least_ranks(self) -> int:
        """The fewest ranks that the degrees fill; a multiple of them holds several copies."""
        return math.lcm(self.tp, self.ep * self.etp)

    def check_ranks(self, world: int) -> None:
        """Refuses a number of ranks that the degrees do not fill.

        Raises:
            ValueError: one sentence.
        """
        if world % self.least_ranks:
            degrees = f"tp={self.tp}, ep={self.ep}, etp={self.etp}"
            raise ValueError(f"{degrees} need {self.least_ranks} ranks or a multiple of them, not {world}")
        if world == 1 and (self.replan_steps or self.spare_experts):
            raise ValueError(
                "experts move between ranks: give ep over 1, or leave replan_steps and spare_experts out"
            )
        if world > 1 and self.draft not in ("", "ngram"):
            raise ValueError("a draft model guesses on one rank alone: with several, give draft ngram or none")
