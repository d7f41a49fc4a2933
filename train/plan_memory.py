"""Bytes of one rank under a layout, by formula: weights, optimizer, gradients, activations, buffers.

D model, H and G query and key-value heads, d head width, F hidden, N = 2F (swiglu) or F, E experts, K choices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..models.config import ModelConfig
from ..models.gpt import Recompute
from ..parallel.layout import Layout
from .plan_shards import Group, groups


class Run(NamedTuple):
    """What memory depends on besides model and layout."""

    sequence: int
    micro: int
    """Sequences of a tensor-parallel group's forward pass."""
    micros: int
    """Forward passes of an optimizer step."""
    work: int
    """Bytes of a number in products."""
    recompute: Recompute = "none"
    reshard: bool = True
    sync_every_micro: bool = False
    cpu: bool = False
    """Computed by the CPU kernels, which keep less of a dense feed-forward in fp32, and pad the experts' rows."""

    @property
    def tokens(self) -> int:
        return self.micro * self.sequence


class Memory(NamedTuple):
    """Bytes of a rank at the fullest moment of its step; they add up to `peak`."""

    parameters: int
    """fp32 masters, this rank's shards."""
    optimizer: int
    """AdamW's two moments."""
    gradients: int
    """fp32 shards that are made already; whole while they are summed over micro-batches without reduction."""
    activations: int
    """What the backward pass still needs."""
    buffers: int
    """Gathered weights, gradients on their way into a reduction, logits, rows that travel, scratch of the kernels."""

    @property
    def peak(self) -> int:
        return sum(self)


def layers(config: ModelConfig) -> Iterator[tuple[int, int]]:
    """(a layer, how many are like it), one for each distinct count of experts."""
    counts = [config.experts_of(layer) for layer in range(config.layers)]
    for count in dict.fromkeys(counts):
        yield counts.index(count), counts.count(count)


def saved_outside(config: ModelConfig, layout: Layout, run: Run) -> int:
    """Bytes that embedding, last norm and head keep: ids, a norm's input, the head's two gradients."""
    tokens, vocab = run.tokens, -(-config.vocab_size // layout.tp)
    norm = tokens // layout.tp * (config.dim * run.work + (4 if config.norm == "rmsnorm" else 8))
    return 8 * tokens + norm + (tokens + vocab) * config.dim * run.work


def saved_by_layer(config: ModelConfig, layout: Layout, layer: int, run: Run) -> tuple[int, int]:
    """Bytes that one block keeps for the backward pass of a micro-batch: its attention half, its feed-forward half.

    Attention: the block's input, the (gathered) normalised input of the projections, the projections, rotated queries
    and keys, its answer, the softmax's fp32 sums, and the second norm's input.
    """
    D, work, tp = config.dim, run.work, layout.tp
    H, G, d = config.heads, config.num_kv_heads, config.width_per_head
    scale = 4 if config.norm == "rmsnorm" else 8
    per_token = 2 * (D * work + scale) / tp + D * work
    per_token += (2 * H + 2 * G) * d * work / tp + 4 * H / tp
    if config.positions == "rotary" or config.qk_norm != "none":
        per_token += (H + G) * d * work / tp
    per_token += 4 * {"none": 0, "head": (H + G) / tp, "all": 2}[config.qk_norm]
    if config.experts_of(layer):
        feed = (D * work + _moe(config, layout, layer, run)) / tp
    else:
        feed = D * work + _mlp(config.hidden, config.activation, run) / tp
    return math.ceil(run.tokens * per_token), math.ceil(run.tokens * feed)


def _width(hidden: int, activation: str) -> int:
    """N."""
    return 2 * hidden if activation == "swiglu" else hidden


def _mlp(hidden: int, activation: str, run: Run) -> float:
    """Bytes a token of a dense feed-forward beyond its input: z, and what the activation's formula keeps."""
    if run.cpu and run.work == 4:  # the experts' operation, on rows padded by a sixteenth
        return _width(hidden, activation) * 4 * 17 / 16 + 8
    return hidden * run.work * (4 if activation == "swiglu" else 2)


def _moe(config: ModelConfig, layout: Layout, layer: int, run: Run) -> float:
    """Bytes a token of a MoE layer beyond its input.

    Router: its input in fp32, scores and ids (and logits for the z-loss). Experts: x and z alone; x is the layer's
    input where all experts are here, else the rows that came, and the rows that went back are kept to weigh them.
    Balanced routing is assumed; a dropless layer that is not balanced needs more on its busiest rank.
    """
    moe, work, D = config.moe, run.work, config.dim
    E, K = config.experts_of(layer), moe.top_k
    per_token = (4 * D if work < 4 else 0) + 4 * E * (2 if moe.gate.z_weight else 1) + 20 * K
    spread = layout.experts(E)
    width = _width(config.expert_hidden, moe.activation)
    per_token += K * (width * work * (17 / 16 if run.cpu else 1) + 16)
    if spread.ep * spread.etp > 1:
        per_token += (spread.etp + 1) * K * D * work  # every slice of an expert sees all its rows
    if moe.residual:
        per_token += _mlp(config.expert_hidden, moe.activation, run) + 2 * D * work + 12
    if moe.shared_hidden:
        per_token += _mlp(moe.shared_hidden, moe.activation, run) + (D * work + 4 if moe.shared_gate else 0)
    return per_token


def activations(config: ModelConfig, layout: Layout, run: Run, layer: int) -> tuple[int, int]:
    """(bytes that a block leaves behind in the forward pass, bytes of it at its own backward pass)."""
    attention, feed = saved_by_layer(config, layout, layer, run)
    tokens = run.tokens // layout.tp
    entry = tokens * config.dim * run.work
    left = {
        "none": attention + feed,
        "selective": entry + feed,
        "full": entry + (8 * config.moe.top_k * tokens if config.experts_of(layer) else 0),
    }[run.recompute]
    # Under "selective" the attention half is repeated when the other half has been given back.
    more = {"none": 0, "selective": max(attention - feed, 0), "full": attention + feed}[run.recompute]
    return left, left + more


def _scratch(config: ModelConfig, layout: Layout, layer: int, run: Run) -> int:
    """What a block's backward pass needs for itself: most of it for the widest of its feed-forward parts.

    Gradients of z, of the activation and of the rows; on a CPU one expert's at a time, with more copies.
    """
    D, E, K, moe = config.dim, config.experts_of(layer), config.moe.top_k, config.moe
    tokens = run.tokens // layout.tp
    parts = [_dense_scratch(config.hidden, config.activation, run, D) / layout.tp * run.tokens]
    if E:
        F, N = config.expert_hidden // layout.etp, _width(config.expert_hidden, moe.activation) // layout.etp
        rows, spread = tokens * K * layout.etp, layout.experts(E)
        one = rows * (N + F + D) * run.work
        if run.cpu:
            most = min(max(rows * spread.ep / E, 256), rows)
            one = (most * (3 * F + (2 if run.work == 4 else 1) * N + 2 * D) + rows * D) * run.work
        parts = [one + tokens * D * run.work]
        beside = (config.expert_hidden if moe.residual else 0, moe.shared_hidden)
        parts += [_dense_scratch(hidden, moe.activation, run, D) * tokens for hidden in beside if hidden]
        if spread.ep * spread.etp > 1:  # rows sent and rows received, which no one keeps
            parts[0] += tokens * K * D * run.work * (1 + spread.etp)
    return math.ceil(max(parts))


def _dense_scratch(hidden: int, activation: str, run: Run, dim: int) -> int:
    """Bytes a token."""
    width = _width(hidden, activation)
    if run.cpu and run.work == 4:
        return 4 * (3 * hidden + 2 * width + 4 * dim)
    return run.work * (width + hidden)


def memory(config: ModelConfig, layout: Layout, run: Run) -> Memory:
    """Rank 0 at the fullest moment of its last micro-batch."""
    kinds = {config.experts_of(layer): _block(config, layout, layer, run) for layer, _ in layers(config)}
    blocks = [kinds[config.experts_of(layer)] for layer in range(config.layers)]
    root = groups(config, layout, None, run.work)
    shards = sum(g.shard for units in (*(block.units for block in blocks), root) for g in units)
    fullest = max(_moments(config, layout, run, blocks, root), key=sum)
    return Memory(4 * shards, 8 * shards, *fullest)


def _moments(
    config: ModelConfig, layout: Layout, run: Run, blocks: Sequence[_Block], root: Sequence[Group]
) -> Iterator[tuple[int, int, int]]:
    """(gradients, activations, buffers) at the head, in and after every block's backward pass, and at the end.

    FSDP keeps one reduction's input until the next one begins, and gathers the next group ahead.
    """
    wrapped, fresh = layout.world > 1 or run.work < 4, run.micros == 1
    everything = [g for units in (*(block.units for block in blocks), root) for g in units]
    standing = gradients = ahead = reducing = 0
    if wrapped:
        standing = _copy(root if run.reshard else everything, run)
        ahead = max(_copy([g], run) for block in blocks for g in block.units) if layout.world > 1 else 0
    if not fresh:
        whole = wrapped and not run.sync_every_micro
        gradients = 4 * sum(g.whole if whole else g.shard for g in everything)
    saved = sum(block.left for block in blocks)
    yield gradients, saved + saved_outside(config, layout, run), standing + _logits(config, layout, run)
    standing += -(-config.vocab_size // layout.tp) * config.dim * run.work  # the head's gradient waits to the end
    for block in reversed(blocks):
        made = 4 * sum(g.shard for g in block.units) * fresh
        largest = max(g.whole for g in block.units) * wrapped
        gradients += 0 if wrapped else made
        buffers = standing + (_copy(block.units, run) + ahead if wrapped and run.reshard else 0)
        yield gradients, saved - block.left + block.here, buffers + block.scratch + reducing + run.work * largest
        gradients += made if wrapped else 0
        saved, reducing = saved - block.left, 4 * largest
        yield gradients, saved, buffers + reducing + run.work * largest
    yield gradients, 0, standing + sum(g.whole for g in root) * (run.work + 4 * wrapped)


class _Block(NamedTuple):
    """One layer's part in the walk, in bytes."""

    units: tuple[Group, ...]
    left: int
    here: int
    scratch: int


def _block(config: ModelConfig, layout: Layout, layer: int, run: Run) -> _Block:
    units = groups(config, layout, layer, run.work)
    return _Block(units, *activations(config, layout, run, layer), _scratch(config, layout, layer, run))


def _copy(units: Sequence[Group], run: Run) -> int:
    """The gathered weights of these groups."""
    return sum(g.whole * (4 if g.wide else run.work) for g in units)


def _logits(config: ModelConfig, layout: Layout, run: Run) -> int:
    """A chunk as `kernels.cross_entropy.chunk_tokens` cuts it, and the fp32 sum of the head's gradient."""
    vocab = -(-config.vocab_size // layout.tp)
    least, elements = (512, 1 << 21) if run.cpu else (1024, 1 << 26)
    chunk = min(max(least, elements // vocab), run.tokens)
    return chunk * vocab * run.work + 4 * vocab * config.dim
