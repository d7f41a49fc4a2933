"""The router's choice: scores, the top k with group limits, their weights and the load, in one pass."""

# Shapes: T tokens, E experts, K choices, G groups of M = E / G experts.

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Gated(NamedTuple):
    """What a router decided for T tokens. Differentiable: `scores_TE`, `weights_TK`."""

    scores_TE: Tensor
    weights_TK: Tensor
    ids_TK: Tensor
    counts_E: Tensor


def gate(
    logits_TE: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    bias_E: Tensor | None = None,
    groups: int = 1,
    topk_groups: int = 1,
    valid_T: Tensor | None = None,
    ids_TK: Tensor | None = None,
) -> Gated:
    """Scores every expert and chooses `top_k` of them for every token. See `gate_reference`."""
    return gate_reference(
        logits_TE,
        top_k,
        score=score,
        bias_E=bias_E,
        groups=groups,
        topk_groups=topk_groups,
        valid_T=valid_T,
        ids_TK=ids_TK,
    )


def gate_reference(
    logits_TE: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    bias_E: Tensor | None = None,
    groups: int = 1,
    topk_groups: int = 1,
    valid_T: Tensor | None = None,
    ids_TK: Tensor | None = None,
) -> Gated:
    """`gate` in plain torch."""
    logits_TE = logits_TE.float()
    scores_TE = logits_TE.softmax(-1) if score == "softmax" else logits_TE.sigmoid()
    if ids_TK is None:
        ids_TK = _select(scores_TE.detach(), top_k, bias_E, groups, topk_groups)
    if valid_T is not None:
        ids_TK = ids_TK.masked_fill(~valid_T[:, None], -1)
    weights_TK = scores_TE.gather(1, ids_TK.clamp(min=0)).masked_fill(ids_TK < 0, 0)
    counts_E = (ids_TK[..., None] == torch.arange(logits_TE.shape[1], device=ids_TK.device)).sum((0, 1))
    return Gated(scores_TE, weights_TK, ids_TK, counts_E)


def _select(scores_TE: Tensor, top_k: int, bias_E: Tensor | None, groups: int, topk_groups: int) -> Tensor:
    select_TE = scores_TE if bias_E is None else scores_TE + bias_E.float()
    if groups > 1:
        select_TGM = select_TE.unflatten(1, (groups, -1))
        best_TG = select_TGM.sort(-1, descending=True).values[..., :2].sum(-1)
        kept_TG = torch.zeros_like(best_TG, dtype=torch.bool)
        kept_TG.scatter_(1, best_TG.sort(dim=1, descending=True, stable=True).indices[:, :topk_groups], True)
        select_TE = select_TGM.masked_fill(~kept_TG[..., None], -torch.inf).flatten(1)
    return select_TE.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
