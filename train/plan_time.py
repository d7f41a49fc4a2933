"""How long a layout's step takes, on paper: what computes, what starts operators, what travels, and what waits.

Where a machine overlaps, FSDP's traffic hides behind computing. Everything else comes one after the other. Small
matrices are taken to be as fast as large ones, and routing as balanced.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ..models.config import ModelConfig
from ..models.params import count_params, flops_per_token
from ..parallel.layout import Layout
from .config import TrainConfig
from .machines import Machine
from .plan_memory import Run, layers
from .plan_shards import Group, groups, weights
from .plan_traffic import Traffic

# Operators of both passes, as torch's profiler counts them on a CPU in fp32 (views are operators too):
# `tests/test_plan_time.py` counts them anew.
ENDS = 130
"""Embedding, last norm, head and loss."""
BLOCK = 400
"""A block with a dense feed-forward."""
ROUTER = 150
"""What a MoE layer has beyond that: router and plan."""
EXPERT = 94
"""Each expert of the rank: its products and what goes around them."""
BESIDE = 140
"""A residual MLP or a shared expert."""
TRIP = 80
"""Dispatch to other ranks and back."""
UNIT = 30
"""FSDP's part of a collective."""
PARAMETER = 10
"""Norm and AdamW of a parameter."""


class Step(NamedTuple):
    """Predicted seconds of an optimizer step."""

    compute: float
    launch: float
    """Starting operators, where nothing hides it."""
    waits: float
    """For ranks that are slower."""
    fsdp: float
    """Gathers and reductions, with FSDP's copies."""
    hidden: float
    """Of these, what passes while the rank computes."""
    tensor: float
    exchange: float
    control: float
    optimizer: float

    @property
    def total(self) -> float:
        return sum(self) - 2 * self.hidden


def step_time(config: TrainConfig, layout: Layout, run: Run, sent: Traffic, shards: int, on: Machine) -> Step:
    """Seconds of a step's parts. `shards`: parameters of this rank.

    AdamW reads and writes masters and moments and reads gradients: 28 bytes a parameter.
    """
    model = config.model
    compute = _compute(config, layout, run, on)
    launch = on.launch * operators(model, layout, run)
    fsdp = sent.gather.seconds + sent.reduce.seconds + copied(model, layout, run) / on.memory_rate
    return Step(
        compute,
        launch,
        on.waits * (compute + launch) * (layout.world > 1),
        fsdp,
        min(compute, fsdp) * on.overlaps,
        sent.tensor.seconds,
        sent.exchange.seconds,
        sent.control.seconds,
        28 * shards / on.memory_rate,
    )


def _compute(config: TrainConfig, layout: Layout, run: Run, on: Machine) -> float:
    """Experts are held against the memory's rate too: their weights are read three times a micro-batch, and few
    tokens an expert do not pay for that."""
    model = config.model
    tokens = config.step_tokens / layout.world
    passes = 4 / 3 if run.recompute == "full" else 1
    routed = experts = 0.0
    count = count_params(model)
    if count.experts:
        one = count.experts / sum(model.experts)
        visited = [e for e in model.experts if e]
        routed = 6 * one * model.moe.top_k * len(visited) * tokens * passes
        held = one * sum(e / (layout.experts(e).ep * layout.etp) for e in visited)
        experts = max(routed / on.rate(run.work), 3 * passes * held * run.work * run.micros / on.memory_rate)
    work = flops_per_token(model, config.seq_len) * tokens * passes - routed
    if run.recompute == "selective":
        work += attention_flops(model, config.seq_len) * tokens
    return work / on.rate(run.work) + experts


def attention_flops(model: ModelConfig, sequence: int) -> int:
    """Of one token's forward pass through the attention of all layers: 2 for each weight, and the two products of
    half a square."""
    matrices = sum(math.prod(w.shape) for w in weights(model, 0) if w.module == "attention")
    return 2 * model.layers * (matrices + model.heads * model.width_per_head * sequence)


def operators(model: ModelConfig, layout: Layout, run: Run) -> float:
    """That a rank starts in a step. A repeated forward pass starts a third of them again; under "selective" a sixth
    of a dense block's."""
    parameters = len(weights(model, None))
    forward_again = {"none": 0, "selective": BLOCK / 6, "full": BLOCK / 3}[run.recompute]
    passes, calls, inside = run.micros, 0, float(ENDS)
    for layer, number in [*layers(model), (None, 1)]:
        fetches = run.micros * (2 if run.reshard and layer is not None else 1) + 1
        calls += number * fetches * len([g for g in groups(model, layout, layer, run.work) if wrapped(g, run)])
        if layer is None:
            continue
        parameters += number * len(weights(model, layer))
        experts = model.experts_of(layer)
        more = _of_experts(model, layout, experts) * (4 / 3 if run.recompute == "full" else 1) if experts else 0
        inside += number * (BLOCK + forward_again + more)
    return inside * passes + UNIT * calls + PARAMETER * parameters


def _of_experts(model: ModelConfig, layout: Layout, experts: int) -> float:
    spread = layout.experts(experts)
    beside = (model.moe.residual > 0) + (model.moe.shared_hidden > 0)
    return ROUTER + EXPERT * experts / spread.ep + BESIDE * beside + TRIP * (spread.ep > 1)


def wrapped(group: Group, run: Run) -> bool:
    """Whether FSDP looks after it: to share it out, or to cast it."""
    return group.ranks > 1 or run.work < 4


def copied(model: ModelConfig, layout: Layout, run: Run) -> float:
    """Bytes that FSDP and the sum over micro-batches read and write in a step.

    A gather: shards in fp32 to the type of the products, into the buffer, and out of it into whole weights. A
    reduction: whole gradients into an fp32 buffer, and a shard out of it. Gradients that wait for the last
    micro-batch are cast to fp32 whole and added.
    """
    total = 0.0
    for layer, number in [*layers(model), (None, 1)]:
        fetches = run.micros * (2 if run.reshard and layer is not None else 1)
        reductions = run.micros if run.sync_every_micro else 1
        for group in groups(model, layout, layer, run.work):
            work = 4 if group.wide else run.work
            if wrapped(group, run):
                one = fetches * (group.shard * (4 + work) + 2 * group.whole * work)
                one += reductions * (group.whole * (work + 4) + 8 * group.shard)
                one += (run.micros - reductions) * group.whole * (work + 8)
            else:
                one = (run.micros - 1) * 12 * group.whole
            total += number * one
    return total
