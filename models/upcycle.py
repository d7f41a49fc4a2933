"""Dense to MoE: a dense model's tensors under the names of a MoE that computes the same function.

Experts are slices of the dense layer's width (granularity G), each held by several experts. With virtual groups
(arXiv 2410.07524, section 2.3) a token's choices are whole groups, which hold every slice once.
"""

# Shapes: E experts, K choices, G slices, V slices that are routed (G less the shared ones), F hidden, P projections.

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..moe.config import GateConfig, MoEConfig
from ..moe.pyramid import parse, spread
from .config import ModelConfig
from .gpt import GPT
from .init import draw
from .parts import Box, Source


@dataclass(frozen=True)
class Upcycling:
    """What becomes of a dense model's feed-forward layers."""

    experts: tuple[int, ...]
    """Of each layer; 0 keeps a layer dense. `experts_of_layers` writes such lists."""
    top_k: int = 2
    granularity: int = 1
    """G: an expert has 1 / G of the dense width."""
    shared: int = 0
    """Slices that become one shared expert, which every token visits; the experts hold the others."""
    shared_gate: bool = False
    """A gate on the shared expert (Qwen2-MoE); it begins at zero, which halves, so the shared expert is doubled."""
    residual: bool = False
    """PR-MoE: the dense layer is the MLP beside the experts too. Both say the same, so any mixture of them does."""
    gate: GateConfig = field(default_factory=GateConfig)
    router_std: float = 0.02
    """Of the router's initial rows, one for each virtual group."""
    noise: float = 0.0
    """Each weight of an expert is multiplied by 1 + noise * normal. More than 0 does not keep the function."""
    seed: int = 1234


def experts_of_layers(text: str, layers: int, every: int = 1, only: Sequence[int] = ()) -> tuple[int, ...]:
    """Experts of each layer, from "8" (all alike), "8x10,16x2" or "0,8,0,8" (see `moe.pyramid.parse`).

    Args:
        every: only each so-many-th layer is a MoE layer, as in `moe.pyramid.pyramid`.
        only: MoE layers by number, counted from 0; the text is one number then.

    Raises:
        ValueError: a list that does not fit the layers.
    """
    if not text.strip().isdecimal():
        if only:
            raise ValueError(f"a list of layers goes with one number of experts, not with {text!r}")
        return parse(text, layers, every)
    if not only:
        return spread([int(text)] * (layers // max(every, 1)), layers, every)
    wrong = [layer for layer in only if not 0 <= layer < layers]
    if wrong or every != 1:
        told = f"there is no layer {wrong[0]}" if wrong else "give a list of layers or their interval, not both"
        raise ValueError(f"{told}: the layers are 0 to {layers - 1}")
    return tuple(int(text) if layer in only else 0 for layer in range(layers))


def upcycled_config(dense: ModelConfig, how: Upcycling) -> ModelConfig:
    """The MoE's config.

    Raises:
        ValueError: the numbers do not fit the dense model or each other, or the result could not be like it.
    """
    if any(dense.experts):
        raise ValueError("the model has experts already: upcycling starts from a dense one")
    if not any(how.experts):
        raise ValueError(f"no layer would have experts: {list(how.experts)} was asked for")
    if how.granularity < 1 or dense.hidden % how.granularity:
        raise ValueError(f"the dense width {dense.hidden} does not divide into granularity {how.granularity} slices")
    routed = how.granularity - how.shared
    if how.shared < 0 or routed < 1:
        told = f"{how.granularity - 1} of the {how.granularity} slices"
        raise ValueError(f"shared must be 0 to {told}, not {how.shared}")
    _check_groups(how, routed)
    hidden = dense.hidden // how.granularity
    moe = MoEConfig(
        top_k=how.top_k,
        hidden=hidden,
        activation=dense.activation,
        bias=dense.mlp_bias,
        residual=how.residual,
        shared_hidden=hidden * how.shared,
        shared_gate=how.shared_gate,
        gate=how.gate,
    )
    return replace(dense, experts=how.experts, moe=moe)


def _check_groups(how: Upcycling, routed: int) -> None:
    told = f"an expert holds one of {routed} slices"
    if how.top_k % routed:
        near = max(routed, how.top_k // routed * routed)
        raise ValueError(f"top_k={how.top_k} is no multiple of {routed}, but {told}: give {near}")
    for count in sorted(set(how.experts) - {0}):
        if count % routed:
            near = max(routed, count // routed * routed)
            raise ValueError(f"{count} experts are no multiple of {routed}, but {told}: give {near}")
        if how.gate.groups > 1 and count // how.gate.groups % routed:
            raise ValueError(f"gate groups of {count // how.gate.groups} experts would cut a set of {routed} slices")
    if how.residual and routed > 1:
        raise ValueError(f"the MLP of a residual MoE is as wide as an expert, but {told}: it needs granularity 1")
    if how.gate.capacity_factor is not None or how.gate.eval_capacity_factor is not None:
        raise ValueError("a capacity drops choices, and the dense function with them: upcycle dropless")
    if routed > 1 and (how.gate.noise == "gumbel" or how.gate.second_expert == "sampled"):
        raise ValueError(f"sampled choices cut a set of {routed} slices: use granularity 1, or no sampling")
    if how.router_std < 0 or how.noise < 0:
        raise ValueError("router_std and noise cannot be negative")


def difference(how: Upcycling) -> str:
    """Why the MoE does not say exactly what the dense model says; "": it does, up to rounding."""
    if how.noise:
        return f"the experts are copies with noise of {how.noise:g}"
    if how.router_std and any(not _sums_to_one(how, count) for count in how.experts if count):
        return (
            f"the weights of {how.top_k} choices are scaled for a router of zeros, and with rows of std "
            f"{how.router_std:g} their sum depends on the token: use router_std 0, or renormalised weights"
        )
    return ""


def _sums_to_one(how: Upcycling, experts: int) -> bool:
    """Whether a token's weights sum to a constant under any router."""
    renormalized = how.gate.renormalize != "none" and how.top_k > 1
    return renormalized or (how.gate.score == "softmax" and how.top_k == experts)


def weight_sum(how: Upcycling, experts: int) -> float:
    """W, the sum of a token's K weights: route_scale if they sum to one; else of a router of zeros, whose scores are
    1 / E (softmax) or 1 / 2 (sigmoid)."""
    if _sums_to_one(how, experts):
        return how.gate.route_scale
    return how.gate.route_scale * how.top_k * (1 / experts if how.gate.score == "softmax" else 1 / 2)


@dataclass(frozen=True)
class _Scales:
    """Factors of a network's tensors."""

    up: float = 1.0
    """Of the up half of swiglu."""
    out: float = 1.0
    b_out: float = 1.0


def _scales(how: Upcycling, part: str, experts: int, activation: str) -> _Scales:
    """What makes the sum over a token's choices the dense answer.

    K / V groups are chosen, and within one all weights are equal: every slice gets W / V in all, so an expert's
    answer is scaled by V / W. b_out would count W times; a shared expert takes it whole. Both factors of swiglu's
    answer take their part, because training goes better so (section 2.3.1); gelu is not homogeneous, and w_out takes
    all.
    """
    if part == "shared":
        double = 2.0 if how.shared_gate else 1.0
        return _Scales(out=double, b_out=double)
    if part == "residual":
        return _Scales(b_out=0.0 if how.shared else 1.0)
    total = weight_sum(how, experts)
    scale = (how.granularity - how.shared) / total
    # A power of two changes no digit: so a scale that is one changes none in bf16 either.
    up = 2.0 ** round(math.log2(scale) / 2) if activation == "swiglu" else 1.0
    return _Scales(up, scale / up, 0.0 if how.shared else 1 / total)


class Upcycled:
    """The MoE's tensors, read from the dense model's as they are asked for: a rank reads no more than its share.

    Args:
        config: of the dense model.
        dense: its tensors.
        how: see `Upcycling`.

    Attributes:
        config: of the MoE.

    Raises:
        ValueError: as `upcycled_config`.
    """

    def __init__(self, config: ModelConfig, dense: Source, how: Upcycling) -> None:
        self.config, self.how = upcycled_config(config, how), how
        self.source = dense.source
        self._dense, self._kept = dense, set(dense.names())
        model = GPT(self.config, device="meta").state_dict()
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.items()}
        self._slices = how.granularity - how.shared

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        if name in self._kept:
            return self._dense.dtype(name)
        layer, role = _place(name)
        return torch.float32 if role.startswith("gate.") else self._dense.dtype(f"blocks.{layer}.mlp.w_in")

    def read(self, name: str, box: Box) -> Tensor:
        if name in self._kept:
            return self._dense.read(name, box)
        box = box or tuple(slice(0, size) for size in self._shapes[name])
        layer, role = _place(name)
        part, _, kind = role.partition(".")
        if role == "gate.weight":
            return self._router(name, box)
        if part == "experts":
            return self._experts(name, layer, kind, box)
        if part in ("shared", "residual"):
            first = 0 if part == "shared" else self.how.shared
            return self._slice(layer, part, kind, first, box)
        # A bias of the choice, a gate of the shared expert, the mixture with the residual MLP: all begin at zero.
        return torch.zeros([b.stop - b.start for b in box], dtype=self.dtype(name))

    def _router(self, name: str, box: Box) -> Tensor:
        rows = {}
        for group in range(box[0].start // self._slices, -(-box[0].stop // self._slices)):
            rows[group] = draw(self.how.seed, f"{name}.{group}", self._shapes[name][1:], self.how.router_std)[box[1]]
        chosen = [rows[expert // self._slices] for expert in range(box[0].start, box[0].stop)]
        return torch.stack(chosen) if chosen else torch.zeros(0, box[1].stop - box[1].start)

    def _experts(self, name: str, layer: int, kind: str, box: Box) -> Tensor:
        """Expert e holds slice e % V of its group e // V: a tie, which goes to the lowest, takes whole groups."""
        target = torch.empty([b.stop - b.start for b in box], dtype=self.dtype(name))
        for row, expert in enumerate(range(box[0].start, box[0].stop)):
            before = row - self._slices
            if before >= 0 and not self.how.noise:
                target[row] = target[before]  # read once for all copies
                continue
            target[row] = self._slice(layer, "experts", kind, self.how.shared + expert % self._slices, box[1:])
            if self.how.noise and kind.startswith("w_"):
                normal = draw(self.how.seed, f"{name}.{expert}", self._shapes[name][1:], 1.0)[box[1:]]
                target[row] = target[row] * (1 + self.how.noise * normal)
        return target

    def _slice(self, layer: int, part: str, kind: str, number: int, box: Box) -> Tensor:
        """A box of the network that begins at a slice of the dense layer: w_in (P, F, D), w_out (D, F), b_in (P, F)
        have their width on axis 1."""
        start = number * self.config.moe.hidden
        if len(box) > 1:
            box = (box[0], slice(box[1].start + start, box[1].stop + start), *box[2:])
        found = self._dense.read(f"blocks.{layer}.mlp.{kind}", box)
        scales = _scales(self.how, part, self.config.experts_of(layer), self.config.activation)
        if kind in ("w_out", "b_out"):
            factor = scales.out if kind == "w_out" else scales.b_out
            return found if factor == 1 else found * factor
        if scales.up != 1:
            found, first = found.clone(), next(iter(box)).start
            found[max(1 - first, 0) : max(2 - first, 0)] *= scales.up
        return found


def _place(name: str) -> tuple[int, str]:
    match = re.fullmatch(r"blocks\.(\d+)\.moe\.(.+)", name)
    assert match is not None, f"{name} is neither the dense model's nor the MoE layer's"
    return int(match[1]), match[2]
