"""Router diagnostics: sums that add up over micro-batches and ranks, and the floats that go to a log."""

# Shapes: E experts, L MoE layers.

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .gate import Stats


def add(left: Sequence[Stats], right: Sequence[Stats]) -> tuple[Stats, ...]:
    """Layer by layer sums of two micro-batches."""
    return tuple(Stats(*(a + b for a, b in zip(x, y, strict=True))) for x, y in zip(left, right, strict=True))


def pack(stats: Sequence[Stats]) -> Tensor:
    """All layers in one fp64 vector (counts stay exact to 2^53): one all-reduce, one copy to the host."""
    if not stats:
        return torch.zeros(0, dtype=torch.float64)
    return torch.cat([field.reshape(-1).double() for layer in stats for field in layer])


def unpack(packed: Tensor, stats: Sequence[Stats]) -> tuple[Stats, ...]:
    """The inverse of `pack`; `stats` gives shapes and dtypes."""
    layers, at = [], 0
    for layer in stats:
        fields = []
        for field in layer:
            fields.append(packed[at : at + field.numel()].view(field.shape).to(field.dtype))
            at += field.numel()
        layers.append(Stats(*fields))
    return tuple(layers)


def loads(stats: Sequence[Stats]) -> list[list[int]]:
    """Assignments per expert before drops, for every MoE layer."""
    return [layer.asked_E.tolist() for layer in stats]


def summarize(stats: Sequence[Stats]) -> dict[str, float]:
    """Floats for a log line, from sums over the whole batch. Each is given as p50, p95 and worst over the layers.

    load: busiest expert / mean expert, before drops (OLMo-core's "load imbalance"), 1.0 is balance.
    drop: share of the assignments that found no room. waste: share of computed rows that held no token.
    entropy: of the router, as a share of log E: 1.0 is undecided, 0.0 is sure of one expert (its worst is the least).
    idle: share of the experts without a token.

    One copy to the host; no layers give no floats.
    """
    if not stats:
        return {}
    stats = unpack(pack(stats).cpu(), stats)
    table: dict[str, list[float]] = {"load": [], "drop": [], "entropy": [], "waste": [], "idle": []}
    for layer in stats:
        asked, kept = int(layer.asked_E.sum()), int(layer.kept_E.sum())
        table["load"].append(int(layer.asked_E.max()) * layer.asked_E.numel() / asked if asked else 1.0)
        table["drop"].append(1 - kept / asked if asked else 0.0)
        table["entropy"].append(float(layer.entropy) / max(int(layer.tokens), 1))
        table["waste"].append(1 - kept / int(layer.rows) if int(layer.rows) else 0.0)
        table["idle"].append(float((layer.asked_E == 0).double().mean()))
    out: dict[str, float] = {}
    for name, values in table.items():
        column = torch.tensor(values, dtype=torch.float64)
        out[f"{name}_p50"] = column.quantile(0.5).item()
        out[f"{name}_p95"] = column.quantile(0.05 if name == "entropy" else 0.95).item()
        out[f"{name}_worst"] = min(values) if name == "entropy" else max(values)
    return out
