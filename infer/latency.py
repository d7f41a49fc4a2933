"""How long a decode step takes on paper: one token for each sequence of a MoE model that ranks hold together.

Numbers alone, no torch. A part of a layer takes what its bytes or its FLOPs take, whichever is longer; collectives
and the starting of operations come on top, and nothing overlaps. docs/latency.md states what is assumed.
"""

# Shapes: E experts, P shares of them.

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..models.config import ModelConfig
from ..models.fit import check_fit
from ..models.params import attention_params, count_params, feed_forward_params
from ..parallel.layout import Layout
from .latency_ways import Pace, Served, experts_ways, ring, sum_over_lane

ATTENTION_CALLS = 7
"""Operations of a block's attention: norm, queries, keys and values, rotation, store, attend, output, sum."""
DENSE_CALLS = 4
"""Norm, two products, activation."""
MOE_CALLS = 10
"""Norm, router, choice, plan, rows to and from experts, two products, activation, weighted sum."""
ENDS_CALLS = 6
"""Embedding, last norm, head, choice of a token."""


class Part(NamedTuple):
    """Of one step, on the rank that takes longest."""

    bytes: float = 0.0
    """Read from memory."""
    flops: float = 0.0
    calls: float = 0.0
    """Operations started."""
    compute: float = 0.0
    """Seconds: bytes or FLOPs, whichever takes longer."""
    tensor: float = 0.0
    """Seconds of sums and gathers over tp."""
    exchange: float = 0.0
    """Seconds in which tokens go to experts and answers return."""
    start: float = 0.0
    """Seconds of starting operations."""
    control: float = 0.0
    """Seconds of telling ranks the step, of logits on their way to the first rank, and of drawing."""

    def plus(self, *others: Part) -> Part:
        """The sum: one after the other."""
        return Part(*(sum(values) for values in zip(self, *others, strict=True)))

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.compute + self.tensor + self.exchange + self.start + self.control


class Step(NamedTuple):
    """A predicted step."""

    attention: Part
    dense: Part
    """Dense feed-forward layers."""
    experts: Part
    """MoE layers, with what lies beside the experts."""
    ends: Part
    """Embedding, head, telling the step and drawing."""
    ways: tuple[str, ...]
    """How tokens reach the experts of each MoE layer; "local": nothing travels."""
    held: float
    """Bytes of weights and of the sequences' keys and values on a rank."""

    @property
    def total(self) -> Part:
        return self.attention.plus(self.dense, self.experts, self.ends)

    @property
    def seconds(self) -> float:
        return self.total.seconds


class Load(NamedTuple):
    """What one layer's experts get in a step, by rank."""

    mean: float
    """Distinct experts that a rank reads, on average."""
    busiest: float
    """The same of the rank that reads most: the expected greatest."""
    rows: float
    """Rows of the rank that expects most."""


def loads(chances_E: np.ndarray, tokens: float, shares: int) -> Load:
    """Of experts that lie in `shares` equal runs, when each of `tokens` tokens chooses expert e with chance
    `chances_E[e]` (they sum to K), whatever others choose. Experts are taken to be visited independently, so the
    number that a rank reads is a Poisson binomial one, and the greatest of them follows from their product.

    Raises:
        ValueError: the experts do not divide evenly, or a chance is none.
    """
    if len(chances_E) % shares or chances_E.min() < 0 or chances_E.max() > 1:
        raise ValueError(f"{len(chances_E)} chances between 0 and 1 must divide over {shares} ranks")
    visited_PL = 1 - (1 - chances_E.reshape(shares, -1)) ** tokens
    below = np.ones(visited_PL.shape[1])  # the chance that no rank reads more than 0, 1, .. L - 1 experts
    for visited_L in visited_PL:
        spread = np.ones(1)
        for chance in visited_L:
            spread = np.convolve(spread, (1 - chance, chance))
        below *= np.cumsum(spread)[:-1]
    rows = tokens * chances_E.reshape(shares, -1).sum(1).max()
    return Load(visited_PL.sum().item() / shares, (1 - below).sum().item(), rows.item())


def predict(
    config: ModelConfig,
    layout: Layout,
    pace: Pace,
    served: Served,
    chances: Sequence[np.ndarray] | None = None,
) -> Step:
    """One decode step of all lanes.

    Args:
        chances: per MoE layer (E,), as `loads` takes them, in the order in which experts lie; None: even routing.

    Raises:
        ValueError: the layout, the exchange or the chances do not fit the model.
    """
    check_fit(config, layout)
    visits = [count for count in config.experts if count]
    if chances is None:
        chances = [np.full(count, config.moe.top_k / count) for count in visits]
    if [len(chances_E) for chances_E in chances] != visits:
        raise ValueError(f"chances are wanted for MoE layers of {visits} experts, in this order")
    alike = {chances_E.tobytes(): chances_E for chances_E in chances}
    known = {key: _moe(config, layout, pace, served, chances_E) for key, chances_E in alike.items()}
    moes = [known[chances_E.tobytes()] for chances_E in chances]
    dense = config.layers - len(visits)
    attention = Part().plus(*[_attention(config, layout, pace, served)] * config.layers)
    return Step(
        attention,
        Part().plus(*[_dense(config, layout, pace, served)] * dense),
        Part().plus(*(part for part, _ in moes)),
        _ends(config, layout, pace, served),
        tuple(way for _, way in moes),
        held(config, layout, served),
    )


def held(config: ModelConfig, layout: Layout, served: Served) -> float:
    """Bytes of a rank: weights, and the keys and values of its sequences."""
    count = count_params(config)
    routed = _expert(config) * sum(
        number / layout.experts(number).ep / layout.etp for number in config.experts if number
    )
    norms = config.dim * (1 if config.norm == "rmsnorm" else 2)
    beside = sum(_beside(config, number) for number in config.experts if number)
    whole = beside + norms * (2 * config.layers + 1)
    whole += config.max_positions * config.dim if config.positions == "learned" else 0
    cut = count.total - count.experts - whole
    return (cut / layout.tp + whole + routed) * served.element_bytes + config.layers * _keys(config, layout, served)


def _keys(config: ModelConfig, layout: Layout, served: Served) -> float:
    """Bytes of one layer's keys and values on a rank."""
    width = 2 * config.num_kv_heads * config.width_per_head / layout.tp
    return served.sequences * served.context * width * served.element_bytes


def _expert(config: ModelConfig) -> int:
    return feed_forward_params(config.dim, config.expert_hidden, config.moe.activation, config.moe.bias)


def _beside(config: ModelConfig, experts: int) -> int:
    """Parameters of a MoE layer that every rank holds whole: router, residual MLP, shared expert."""
    moe, dim = config.moe, config.dim
    shared = feed_forward_params(dim, moe.shared_hidden, moe.activation, moe.bias) + dim * moe.shared_gate
    return experts * dim + moe.residual * (_expert(config) + 2 * dim + 2) + (moe.shared_hidden > 0) * shared


def _part(pace: Pace, size: float, flops: float, calls: float, *, tensor: float = 0, exchange: float = 0) -> Part:
    compute = max(size / pace.memory_rate, flops / pace.flops)
    return Part(size, flops, calls, compute, tensor, exchange, calls * pace.call)


def _lane(config: ModelConfig, layout: Layout, pace: Pace, served: Served) -> float:
    """Seconds of summing a lane's answers of one layer."""
    return sum_over_lane(pace, served, layout, served.sequences * config.dim * served.element_bytes)


def _attention(config: ModelConfig, layout: Layout, pace: Pace, served: Served) -> Part:
    weights = attention_params(config) / layout.tp
    width = config.heads * config.width_per_head / layout.tp
    flops = served.sequences * (2 * weights + 4 * served.context * width)
    size = weights * served.element_bytes + _keys(config, layout, served)
    return _part(pace, size, flops, ATTENTION_CALLS, tensor=_lane(config, layout, pace, served))


def _dense(config: ModelConfig, layout: Layout, pace: Pace, served: Served) -> Part:
    weights = feed_forward_params(config.dim, config.hidden, config.activation, config.mlp_bias) / layout.tp
    flops = 2 * served.sequences * weights
    tensor = _lane(config, layout, pace, served)
    return _part(pace, weights * served.element_bytes, flops, DENSE_CALLS, tensor=tensor)


def _moe(config: ModelConfig, layout: Layout, pace: Pace, served: Served, chances_E: np.ndarray) -> tuple[Part, str]:
    """Where experts are not cut, every rank of a lane computes all of its tokens; else a group's ranks share theirs.
    Where there is one way, that is taken, whatever was asked."""
    spread = layout.experts(len(chances_E))
    cut = spread.ep * spread.etp
    tokens = served.sequences * (cut / layout.tp if cut > 1 else 1)
    load = loads(chances_E, tokens, spread.ep)
    expert, beside = _expert(config) / spread.etp, _beside(config, len(chances_E))
    size = (load.busiest * expert + beside) * served.element_bytes
    flops = 2 * (load.rows * expert + served.sequences * beside)
    ways = experts_ways(config, len(chances_E), layout, pace, served)
    if served.exchange != "auto" and served.exchange not in ways and len(ways) > 1:
        raise ValueError(f"exchange {served.exchange!r} is not one of auto, {', '.join(ways)}")
    way = served.exchange if served.exchange in ways else min(ways, key=lambda name: ways[name])
    return _part(pace, size, flops, MOE_CALLS, exchange=ways[way]), way


def _ends(config: ModelConfig, layout: Layout, pace: Pace, served: Served) -> Part:
    """Rank 0 tells the step; the embedding is summed over tp, the head's words are gathered there, and every lane's
    logits go to rank 0, which draws."""
    rows, words = served.sequences, config.vocab_size * config.dim / layout.tp
    logits = rows * config.vocab_size * served.element_bytes
    tensor = _lane(config, layout, pace, served) + ring(pace, served, "gather", logits / layout.tp, layout.tp)
    part = _part(pace, words * served.element_bytes, 2 * rows * words, ENDS_CALLS, tensor=tensor)
    lanes, control = layout.data_ranks, layout.data_ranks * rows * pace.row
    far = pace.links.inter if layout.world > served.node else pace.links.intra
    if layout.world > 1:
        control += far.latency + math.ceil(math.log2(layout.world)) * far.message
    if lanes > 1:
        control += far.latency + (lanes - 1) * (far.message + logits / far.bandwidth)
    return part._replace(control=control)
