"""Bytes of one rank under a layout, by formula: weights and their FSDP groups, optimizer, activations, buffers.

Everything is computed from a `ModelConfig` and a `Layout`; nothing is built. The rank meant is rank 0, which holds
the largest share wherever a division does not come out even.

D model, H and G query and key-value heads, d head width, N = 2 * hidden (swiglu) or hidden, E experts, K choices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from ..models.config import ModelConfig
from ..moe.experts import in_width
from ..parallel.layout import Layout


class Weight(NamedTuple):
    """One parameter and what cuts it besides FSDP."""

    module: str
    """Where it lives: "attention", "mlp", "embed", "head" (tensor parallel), "experts", "gate", or "rest"."""
    shape: tuple[int, ...]
    cut: int | None = None
    """Dimension that tp cuts, or etp for experts, whose dimension 0 is cut by ep."""


class Group(NamedTuple):
    """What one FSDP unit holds on a rank, in elements."""

    name: str
    whole: int
    """Gathered: after tp, ep and etp."""
    shard: int
    ranks: int
    """Ranks that share it out, `stride` apart."""
    stride: int
    copies: int
    """HSDP: groups of ranks that hold the same shards, `copy_stride` apart."""
    copy_stride: int
    wide: bool = False
    """Computed on in fp32, whatever the others' type (the router)."""


class Run(NamedTuple):
    """What memory depends on besides model and layout."""

    sequence: int
    micro: int
    """Sequences of a tensor-parallel group's forward pass."""
    micros: int
    """Forward passes of an optimizer step."""
    work: int
    """Bytes of a number in products."""
    recompute: bool = False
    reshard: bool = True
    sync_every_micro: bool = False
    cpu: bool = False
    """Computed by the CPU kernels, which keep less of a dense feed-forward in fp32, and pad the experts' rows."""

    @property
    def tokens(self) -> int:
        return self.micro * self.sequence


class Memory(NamedTuple):
    """Bytes of a rank."""

    parameters: int
    """fp32 masters, this rank's shards."""
    optimizer: int
    """AdamW's two moments."""
    gradients: int
    """fp32; whole, not sharded, while they are summed over several micro-batches without reduction."""
    gathered: int
    """Working copies: of embedding, head and the largest layer, and of the largest group that is fetched ahead."""
    reduce: int
    """A group's gradients on their way into the reduce-scatter."""
    activations: int
    """What the backward pass needs of one micro-batch, as the run is set."""
    kept: int
    """The same without recomputation."""
    recomputed: int
    """The same with it: every block's input, and one block's all."""
    exchange: int
    """Rows on their way to experts and back."""
    logits: int
    """One chunk of them, and the sum of the head's gradient."""
    peak: int
    """The larger of the end of the forward pass and the end of the backward pass."""


def weights(config: ModelConfig, layer: int | None) -> list[Weight]:
    """The parameters of one layer, or (None) those outside all layers."""
    dim = config.dim
    norm = [Weight("rest", (dim,))] * (2 if config.norm == "layernorm" else 1)
    if layer is None:
        found = [Weight("embed", (config.vocab_size, dim), 0), *norm]
        found += [Weight("rest", (config.max_positions, dim))] if config.positions == "learned" else []
        return found + ([] if config.tied_head else [Weight("head", (config.vocab_size, dim), 0)])
    found = norm * 2 + _attention(config)
    experts, moe = config.experts_of(layer), config.moe
    if not experts:
        return found + _feed_forward("mlp", dim, config.hidden, config.activation, config.bias)
    hidden, kind = config.expert_hidden, (moe.activation, moe.bias)
    found += [Weight("gate", (experts, dim))]
    for weight in _feed_forward("experts", dim, hidden, *kind):
        found.append(Weight("experts", (experts, *weight.shape), None if weight.cut is None else weight.cut + 1))
    if moe.residual:
        found += [*_feed_forward("rest", dim, hidden, *kind), Weight("rest", (2, dim)), Weight("rest", (2,))]
    if moe.shared_hidden:
        found += _feed_forward("rest", dim, moe.shared_hidden, *kind)
        found += [Weight("rest", (1, dim))] if moe.shared_gate else []
    return found


def _attention(config: ModelConfig) -> list[Weight]:
    dim, heads, keys, width = config.dim, config.heads, config.num_kv_heads, config.width_per_head
    found = [
        Weight("attention", (heads, width, dim), 0),
        Weight("attention", (2, keys, width, dim), 1),
        Weight("attention", (dim, heads * width), 1),
    ]
    if config.bias:
        found += [Weight("attention", (heads, width), 0), Weight("attention", (2, keys, width), 1)]
        found += [Weight("attention", (dim,))]
    return found + ([Weight("attention", (width,))] * 2 if config.qk_norm else [])


def _feed_forward(module: str, dim: int, hidden: int, activation: str, bias: bool) -> list[Weight]:
    gates = in_width(hidden, activation) // hidden
    found = [Weight(module, (gates, hidden, dim), 1), Weight(module, (dim, hidden), 1)]
    return found + ([Weight(module, (gates, hidden), 1), Weight(module, (dim,))] if bias else [])


def local_sizes(shape: Sequence[int], cuts: dict[int, int], ranks: int) -> tuple[int, int]:
    """(elements after the cuts, elements of rank 0's FSDP shard of that).

    FSDP takes the largest dimension that its ranks divide and nothing has cut, else dimension 0, rounded up.
    """
    local = [-(-size // cuts.get(dim, 1)) for dim, size in enumerate(shape)]
    whole = math.prod(local)
    fits = [d for d, size in enumerate(local) if size % ranks == 0 and cuts.get(d, 1) == 1]
    dim = max(fits, key=lambda d: local[d], default=0)
    local[dim] = -(-local[dim] // ranks)
    return whole, math.prod(local)


@lru_cache(maxsize=65536)
def groups(config: ModelConfig, layout: Layout, layer: int | None, work: int) -> tuple[Group, ...]:
    """The FSDP units of one layer, or (None) of what lies outside all layers."""
    flat = layout.dp_shard * layout.tp
    units: dict[tuple, list[tuple[int, int]]] = {}
    for weight in weights(config, layer):
        ranks, stride, copies, copy_stride, name = flat, 1, layout.dp_replicate, flat, "rest"
        cuts: dict[int, int] = {}
        experts = weight.module == "experts" and layer is not None
        spread = layout.experts(config.experts_of(layer)) if experts and layer is not None else None
        if spread is not None and spread.ep * spread.etp > 1:
            stride, name = spread.ep * spread.etp, "experts"
            nested = flat % stride == 0
            ranks, copies = (flat // stride, copies) if nested else (spread.edp, 1)
            cuts = {0: spread.ep} | ({} if weight.cut is None else {weight.cut: spread.etp})
        elif weight.module in ("attention", "mlp", "embed", "head") and layout.tp > 1:
            ranks, stride, name = layout.dp_shard, layout.tp, "mlp" if weight.module == "mlp" else "attention"
            name = "root" if layer is None else name
            cuts = {} if weight.cut is None else {weight.cut: layout.tp}
        wide = weight.module == "gate" and work < 4
        key = ("gate" if wide else name, ranks, stride, copies, copy_stride, wide)
        units.setdefault(key, []).append(local_sizes(weight.shape, cuts, ranks))
    return tuple(
        Group(name, sum(w for w, _ in sizes), sum(s for _, s in sizes), *mesh)
        for (name, *mesh), sizes in units.items()
    )


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


def saved_by_layer(config: ModelConfig, layout: Layout, layer: int, run: Run) -> int:
    """Bytes that one block keeps for the backward pass of a micro-batch.

    Attention: the block's input, the (gathered) normalised input of the projections, the projections, rotated queries
    and keys, its answer, and the softmax's fp32 sums. Then the second norm's input, and the feed-forward part.
    """
    D, work, tp = config.dim, run.work, layout.tp
    H, G, d = config.heads, config.num_kv_heads, config.width_per_head
    scale = 4 if config.norm == "rmsnorm" else 8
    per_token = 2 * (D * work + scale) / tp + D * work
    per_token += (2 * H + 2 * G) * d * work / tp + 4 * H / tp
    if config.positions == "rotary" or config.qk_norm:
        per_token += (H + G) * d * work / tp
    per_token += 4 * (H + G) / tp if config.qk_norm else 0
    if config.experts_of(layer):
        per_token += (D * work + _moe(config, layout, layer, run)) / tp
    else:
        per_token += D * work + _mlp(config.hidden, config.activation, run) / tp
    return math.ceil(run.tokens * per_token)


def _mlp(hidden: int, activation: str, run: Run) -> float:
    """Bytes a token of a dense feed-forward beyond its input: z, and what the activation's formula keeps."""
    if run.cpu and run.work == 4:  # the experts' operation, on rows padded by a sixteenth
        return in_width(hidden, activation) * 4 * 17 / 16 + 8
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
    width = in_width(config.expert_hidden, moe.activation)
    per_token += K * (width * work * (17 / 16 if run.cpu else 1) + 16)
    if spread.ep * spread.etp > 1:
        per_token += (spread.etp + 1) * K * D * work  # every slice of an expert sees all its rows
    if moe.residual:
        per_token += _mlp(config.expert_hidden, moe.activation, run) + 2 * D * work + 12
    if moe.shared_hidden:
        per_token += _mlp(moe.shared_hidden, moe.activation, run) + (D * work + 4 if moe.shared_gate else 0)
    return per_token


def activations(config: ModelConfig, layout: Layout, run: Run) -> tuple[int, int, int]:
    """(kept without recomputation, kept with it, of the largest block): bytes of one micro-batch."""
    outside, largest = saved_outside(config, layout, run), 0
    kept = recomputed = outside
    for layer, number in layers(config):
        block = saved_by_layer(config, layout, layer, run)
        tokens = run.tokens // layout.tp
        choices = 8 * config.moe.top_k * tokens if config.experts_of(layer) else 0
        kept += number * block
        recomputed += number * (tokens * config.dim * run.work + choices)
        largest = max(largest, block)
    return kept, recomputed + largest, largest


def memory(config: ModelConfig, layout: Layout, run: Run) -> Memory:
    """Bytes of rank 0 at its fullest moment, and their parts."""
    counted = [(groups(config, layout, layer, run.work), number) for layer, number in layers(config)]
    counted.append((groups(config, layout, None, run.work), 1))
    shards = sum(g.shard * number for units, number in counted for g in units)
    whole = sum(g.whole * number for units, number in counted for g in units)
    summing = run.micros > 1 and not run.sync_every_micro
    gradients = 4 * (whole if summing and layout.world > 1 else shards)
    largest = max(g.whole for units, _ in counted for g in units)
    copies = layout.world > 1 or run.work < 4
    gathered = _gathered(counted, run) if copies else 0
    reduce = (run.work + 4) * largest if copies else 0
    kept, recomputed, block = activations(config, layout, run)
    saved = recomputed if run.recompute else kept
    exchange, logits = _exchange(config, layout, run), _logits(config, layout, run)
    forward = (gradients if summing else 0) + saved + max(exchange, logits)
    backward = gradients + reduce + block + exchange
    peak = 12 * shards + gathered + max(forward, backward)
    return Memory(
        4 * shards, 8 * shards, gradients, gathered, reduce, saved, kept, recomputed, exchange, logits, peak
    )


def _gathered(counted: list[tuple[tuple[Group, ...], int]], run: Run) -> int:
    """The root's copy stays; a layer's comes and goes, the next group's on its way already."""

    def size(units: Sequence[Group]) -> int:
        return sum(g.whole * (4 if g.wide else run.work) for g in units)

    *blocks, (root, _) = counted
    if not run.reshard:
        return size(root) + sum(number * size(units) for units, number in blocks)
    ahead = max(size([g]) for units, _ in blocks for g in units)
    return size(root) + max(size(units) for units, _ in blocks) + ahead


def _exchange(config: ModelConfig, layout: Layout, run: Run) -> int:
    """Rows sent and rows received of the largest MoE layer, which no one keeps."""
    spread = [layout.experts(e) for e in set(config.experts) - {0}]
    slices = max((s.etp for s in spread if s.ep * s.etp > 1), default=0)
    rows = run.tokens // layout.tp * config.moe.top_k
    return rows * config.dim * run.work * (1 + slices) if slices else 0


def _logits(config: ModelConfig, layout: Layout, run: Run) -> int:
    """A chunk as `kernels.cross_entropy.chunk_tokens` cuts it, and the fp32 sum of the head's gradient."""
    vocab = -(-config.vocab_size // layout.tp)
    least, elements = (512, 1 << 21) if run.cpu else (1024, 1 << 26)
    chunk = min(max(least, elements // vocab), run.tokens)
    return chunk * vocab * run.work + 4 * vocab * config.dim
