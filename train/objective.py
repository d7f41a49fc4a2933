"""What a loop minimises: token sums, and the counts that divide them. Language modelling is the first one."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..moe.config import GateConfig
from ..moe.gate import Stats
from .data import Batch


class Term(NamedTuple):
    """One part of a loss."""

    value: Tensor
    """fp32 scalar: a SUM over this micro-batch's tokens, with its gradient."""
    weight: float
    per: str
    """The name of the count that divides it, summed over the whole global batch."""


def total(terms: dict[str, Term], counts: dict[str, float]) -> Tensor:
    """The loss of a micro-batch: each term times its weight, over its count."""
    parts = [t.value * (t.weight / max(counts[t.per], 1)) for t in terms.values() if t.weight]
    return torch.stack(parts).sum()


class Losses(NamedTuple):
    """What one micro-batch gives: loss = sum of weight * value / count over the terms. The first is the headline."""

    terms: dict[str, Term]
    stats: tuple[Stats, ...] = ()
    """One per MoE layer."""


class Objective(Protocol):
    """A loop calls `counts` for all micro-batches of a step before the first pass, so that every gradient is divided
    by the global count, whatever the micro-batch size and the number of ranks."""

    def counts(self, batch: Any) -> dict[str, Tensor]:
        """Scalars on this rank, by the names that terms use."""
        ...

    def __call__(self, model: nn.Module, batch: Any, history: tuple[Tensor, ...] | None) -> Losses:
        """`history`: per MoE layer, this rank's assignments in the step's earlier micro-batches."""
        ...


class LanguageModelling:
    """Next-token cross-entropy, with the router losses at the weights that the model's config gives."""

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        valid = batch.valid_BS
        tokens = (batch.targets_BS.new_tensor(batch.tokens_BS.numel())) if valid is None else valid.sum()
        return {"targets": (batch.targets_BS != -100).sum(), "tokens": tokens}

    def __call__(self, model: nn.Module, batch: Batch, history: tuple[Tensor, ...] | None) -> Losses:
        out = model(batch.tokens_BS, targets_BS=batch.targets_BS, valid_BS=batch.valid_BS, history=history)
        terms = {"loss": Term(out.lm, 1.0, "targets")}
        if out.stats:
            gate: GateConfig = model.config.moe.gate  # type: ignore[assignment,union-attr]
            terms["aux"] = Term(out.aux, gate.aux_weight, "tokens")
            terms["z"] = Term(out.z, gate.z_weight, "tokens")
        return Losses(terms, out.stats)
