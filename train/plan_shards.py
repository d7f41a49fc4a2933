"""Which parameters a model has, and what of each a rank holds under a layout: the FSDP groups, in elements.

Everything is computed from a `ModelConfig` and a `Layout`; nothing is built. The rank meant is rank 0, which holds
the largest share wherever a division does not come out even.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from ..models.config import ModelConfig
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
        return found + _feed_forward("mlp", dim, config.hidden, config.activation, config.mlp_bias)
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
    if config.attention_bias != "none":
        found += [Weight("attention", (heads, width), 0), Weight("attention", (2, keys, width), 1)]
    found += [Weight("attention", (dim,))] if config.attention_bias == "all" else []
    norms = {"none": [], "head": [width, width], "all": [heads * width, keys * width]}[config.qk_norm]
    return found + [Weight("attention", (size,)) for size in norms]


def _feed_forward(module: str, dim: int, hidden: int, activation: str, bias: bool) -> list[Weight]:
    gates = 2 if activation == "swiglu" else 1
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
