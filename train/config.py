"""Everything a training run can be told. Recipes fill these in; every leaf is a flag of the entries."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, Literal, cast, get_args, get_type_hints

from ..models.config import ModelConfig
from ..models.fit import check_fit
from ..moe.exchanging import Exchanging
from ..parallel.layout import Layout, divisors, fill, near

LONGEST_WAIT = 590.0
"""Seconds; NCCL's groups give up after 600, and do not say where the run stands."""


@dataclass(frozen=True)
class DataConfig:
    """Which token files a run reads: prefixes of .bin/.idx pairs, as `coterie prepare` writes them."""

    train: tuple[str, ...] = ()
    """Prefixes; several are blended."""
    weights: tuple[float, ...] = ()
    """How often each prefix is drawn, relative to the others; (): by the number of tokens."""
    valid: tuple[str, ...] = ()
    """Prefixes held out for validation; (): the second part of `split`."""
    valid_weights: tuple[float, ...] = ()
    """As `weights`, for `valid`."""
    split: str = "98,2,0"
    """Shares of train, validation and test among the documents of `train`; unused when `valid` is given."""
    tokenizer: str = ""
    """A tokenizer.json; "": the one beside the first prefix (PREFIX.tokenizer.json), if it is there."""
    cache: str = ""
    """Folder of the sample indices; "": `data_cache` in the run directory."""
    mask_eos: bool = False
    """Leave the prediction that follows an end-of-document token out of the loss."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule, which counts tokens, not steps."""

    lr: float = 3e-4
    min_lr: float = 3e-5
    """Where the schedule ends."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: a cosine down to min_lr; or warm-up, stable, decay (linear, over `cooldown_tokens`)."""
    warmup_tokens: int = 0
    decay_tokens: int = 0
    """Where the schedule reaches min_lr; 0: at the last token of the run."""
    cooldown_tokens: int = 0
    """wsd alone: length of the decay at its end; 0: a tenth of the run."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """On matrices; norms, biases and other vectors are free of it."""
    clip: float = 1.0
    """Largest global gradient norm; 0: no clipping."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the model lies on the ranks and how it computes. Ranks that the degrees leave shard everything (FSDP)."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dp_replicate: int = 1
    """Copies of all that is sharded (HSDP): more memory, less traffic between them."""
    tp: int = 1
    """Tensor-parallel degree: neighbouring ranks share attention, dense layers, the vocabulary, and the positions of
    the same sequences."""
    ep: int = 1
    """Expert-parallel degree: a layer's experts are spread over min(ep, its experts) ranks."""
    etp: int = 1
    """Neighbouring ranks that hold slices of the same experts."""
    exchange: Literal["auto", "flat", "hierarchical", "deduplicated"] = "auto"
    """How rows travel to experts on other ranks; auto: flat on one node, else what is fastest on the links, which are
    measured at the start."""
    chunks: int = 1
    """Parts in which they travel, so that experts compute meanwhile; at most a rank's experts, which they divide."""
    ranks_per_node: int = 0
    """Consecutive ranks of one machine; 0: what the launcher says."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What matrices compute in; master weights, optimizer and the router stay in fp32."""
    reshard: bool = True
    """Free gathered weights after the forward pass (less memory, one more gather)."""
    sync_every_micro: bool = False
    """Reduce gradients after each micro-batch, not once a step: less memory, more traffic."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation checkpointing of every block: its attention half, or all of it with the routes of the first pass."""
    compile: bool = False
    deterministic: bool = False
    """On a GPU, repeat runs bit by bit at the price of a slower attention backward. A CPU always does."""
    threads: int = 0
    """CPU threads of a rank; 0: this machine's cores divided by its ranks."""
    timeout_s: float = 500.0
    """A rank that has waited so long for the others, in seconds, ends the run and tells where it stands."""


@dataclass(frozen=True)
class LogConfig:
    """What a run tells."""

    every: int = 1
    """Steps between lines on the terminal; metrics.jsonl has every step."""
    tensorboard: bool = True
    """Write TensorBoard events when the package is installed."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run saves, and what it starts from."""

    every: int = 0
    """Steps between checkpoints; 0: at the end and when stopped by a signal only."""
    keep: int = 2
    """How many of the newest stay."""
    asynchronous: bool = True
    """Write from a copy in the background while training goes on."""
    resume: str = "auto"
    """auto: the run directory's newest whole checkpoint; never: start anew; else one checkpoint's directory."""


@dataclass(frozen=True)
class TrainConfig:
    """A pretraining run. Counts are sequences, tokens or steps, as each says."""

    run_dir: str = "runs/run"
    init: str = ""
    """A model directory to start from: its weights, and its model settings in place of the recipe's. Settings of the
    loss and of routing in training can still be given; a checkpoint of the run goes before it. "": from the seed."""
    seed: int = 1234
    """Of the weights, of the sample order and of all noise."""
    seq_len: int = 2048
    batch_size: int = 256
    """Sequences of one optimizer step, over all ranks."""
    micro_batch: int = 0
    """Sequences in one forward pass of a rank; 0: all of the rank's share at once."""
    tokens: int = 0
    """Length of the run, in tokens."""
    steps: int = 0
    """Length of the run, in steps, if not 0: it goes before `tokens`."""
    eval_every: int = 0
    """Steps between evaluations; 0: at the end only."""
    eval_batches: int = 8
    """Global batches of one evaluation; 0: never evaluate."""
    max_bad_steps: int = 5
    """Stop after this many steps in a row whose loss or gradient norm is not finite; they are skipped."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @property
    def step_tokens(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def total_steps(self) -> int:
        return self.steps or -(-self.tokens // self.step_tokens)


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The whole tree as JSON holds it; `from_dict` reads it back."""
    return json.loads(json.dumps(asdict(config)))


def from_dict(data: dict[str, Any], kind: type = TrainConfig) -> Any:
    """A config tree from its JSON form.

    Raises:
        ValueError: a name that `kind` does not have.
    """
    hints = get_type_hints(kind)
    unknown = sorted(data.keys() - hints.keys())
    if unknown:
        raise ValueError(f"{kind.__name__} has no {', '.join(unknown)}")
    values = {}
    for name, value in data.items():
        inner = [hint for hint in (hints[name], *get_args(hints[name])) if is_dataclass(hint)]
        if inner and isinstance(value, dict):
            value = from_dict(value, cast(type, inner[0]))
        values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def check(config: TrainConfig, world: int) -> None:
    """Refuses what cannot run on `world` ranks, before anything is built.

    Raises:
        ValueError: one sentence with what was given, what is expected and what to do.
    """
    _check_counts(config)
    if any(e < 0 for e in config.model.experts):
        raise ValueError(f"model.experts {config.model.experts} has a negative count: use 0 for a dense layer")
    chosen = layout(config, world)
    check_fit(config.model, chosen)
    _check_sizes(config, chosen)
    _check_optim(config.optim)
    for count in {e for e in config.model.experts if e}:
        degree = chosen.experts(count).ep
        if degree > 1:
            exchanging(config).chunks_for(count // degree)


def layout(config: TrainConfig, world: int) -> Layout:
    """How the settings divide `world` ranks.

    Raises:
        ValueError: the degrees do not multiply to the ranks.
    """
    parallel = config.parallel
    return fill(world, dp_replicate=parallel.dp_replicate, tp=parallel.tp, ep=parallel.ep, etp=parallel.etp)


def exchanging(config: TrainConfig, tokens: int = 0) -> Exchanging:
    """How rows travel, with `tokens` of a rank in a forward pass."""
    parallel = config.parallel
    return Exchanging(parallel.exchange, parallel.chunks, parallel.ranks_per_node, tokens)


def _check_counts(config: TrainConfig) -> None:
    for name in ("seq_len", "batch_size", "max_bad_steps"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}: give 1 or more")
    if config.parallel.chunks < 1:
        raise ValueError(f"parallel.chunks is {config.parallel.chunks}: give 1 or more")
    for part, names in (
        ("", ("tokens", "steps", "eval_every", "eval_batches")),
        ("optim", ("warmup_tokens", "decay_tokens", "cooldown_tokens", "eps", "weight_decay", "clip")),
        ("parallel", ("threads", "ranks_per_node")),
        ("checkpoint", ("every",)),
    ):
        for name in names:
            value = getattr(getattr(config, part) if part else config, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{part}{'.' * bool(part)}{name} is {value}: give 0 or more")
    if not 1 <= config.parallel.timeout_s <= LONGEST_WAIT:
        raise ValueError(f"parallel.timeout_s is {config.parallel.timeout_s}: give 1 to {LONGEST_WAIT:g} seconds")


def _check_sizes(config: TrainConfig, chosen: Layout) -> None:
    if config.total_steps < 1:
        raise ValueError("the run has no length: give --tokens or --steps")
    if config.seq_len > config.model.max_positions:
        raise ValueError(f"seq_len {config.seq_len} is over model.max_positions {config.model.max_positions}")
    if config.seq_len % chosen.tp:
        raise ValueError(
            f"seq_len {config.seq_len} does not divide over parallel.tp={chosen.tp}: "
            f"{near(chosen.tp, divisors(config.seq_len))} for tp"
        )
    ranks = chosen.data_ranks
    if config.batch_size % ranks:
        use = max(ranks, config.batch_size // ranks * ranks)
        raise ValueError(
            f"batch_size {config.batch_size} does not divide over {ranks} {_data(chosen)}: use {use}, or another "
            "world size"
        )
    share = config.batch_size // ranks
    if config.micro_batch < 0 or (config.micro_batch and share % config.micro_batch):
        raise ValueError(
            f"micro_batch {config.micro_batch} does not divide a rank's {share} sequences "
            f"(batch_size {config.batch_size} over {ranks} {_data(chosen)})"
        )


def _data(chosen: Layout) -> str:
    return "ranks" if chosen.tp == 1 else "data ranks"


def _check_optim(optim: OptimConfig) -> None:
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(optim, name) < 1:
            raise ValueError(f"optim.{name} is {getattr(optim, name)}: give a number from 0 to below 1")
    if not 0 < optim.lr < math.inf:
        raise ValueError(f"optim.lr is {optim.lr}: give a number above 0")
    if not 0 <= optim.min_lr <= optim.lr:
        raise ValueError(f"optim.min_lr {optim.min_lr} is not between 0 and optim.lr {optim.lr}")
