"""The router's choice: scores, the top k with group limits, their weights and the load, in one pass.

Shapes: T tokens, E experts, K choices, G groups of M = E / G experts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .backend import choose
from .gate_triton import gate_backward_triton, gate_triton


class Gated(NamedTuple):
    """What a router decided for T tokens. Differentiable in the logits: `scores_TE`, `weights_TK`."""

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
    """Scores every expert in fp32 and chooses `top_k` of them for every token.

    Args:
        logits_TE: (T, E), any float; taken as fp32.
        score: "softmax" over the experts, or "sigmoid" of each.
        bias_E: (E,) added to the scores for the choice alone (loss-free balancing, arXiv 2408.15664).
        groups: the experts form this many groups of equal size, in order. A group's score is the sum of its best two
            biased scores (DeepSeek-V3, arXiv 2412.19437 section 2.1.2), or the only one of a single member.
        topk_groups: only the experts of this many best groups compete.
        valid_T: (T,) bool; a token marked False chooses nothing: ids -1, weights 0, not counted.
        ids_TK: (T, K) int64 choices to replay; nothing is selected, -1 is no choice.

    Returns:
        scores_TE (T, E) fp32; weights_TK (T, K) fp32, the scores, not biased, at the choices; ids_TK (T, K) int64,
        in descending order of the biased score, ties to the lowest index; counts_E (E,) int64, choices per expert.

    Raises:
        ValueError: the numbers or shapes do not fit together.
    """
    _check(logits_TE, top_k, score, groups, topk_groups, ids_TK)
    if choose(logits_TE) == "reference":
        chosen = {"score": score, "bias_E": bias_E, "groups": groups, "topk_groups": topk_groups}
        return gate_reference(logits_TE, top_k, valid_T=valid_T, ids_TK=ids_TK, **chosen)
    bias_E = None if bias_E is None else bias_E.detach().float()
    return Gated(*_gate(logits_TE.float(), top_k, score, bias_E, groups, topk_groups, valid_T, ids_TK))


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
    """`gate` in plain torch, differentiated by autograd."""
    scores_TE = _scores(logits_TE.float(), score)
    if ids_TK is None:
        select_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E.float()
        if groups > 1:
            select_TGM = select_TE.unflatten(1, (groups, -1))
            best_TG = select_TGM.sort(dim=-1, descending=True).values[..., :2].sum(-1)
            chosen_TG = best_TG.sort(dim=1, descending=True, stable=True).indices[:, :topk_groups]
            closed_TG = torch.ones_like(best_TG, dtype=torch.bool).scatter(1, chosen_TG, False)
            select_TE = select_TGM.masked_fill(closed_TG[..., None], -torch.inf).flatten(1)
        ids_TK = select_TE.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    if valid_T is not None:
        ids_TK = ids_TK.masked_fill(~valid_T[:, None], -1)
    weights_TK = scores_TE.gather(1, ids_TK.clamp(min=0)).masked_fill(ids_TK < 0, 0)
    counts_E = (ids_TK[..., None] == torch.arange(logits_TE.shape[1], device=ids_TK.device)).sum((0, 1))
    return Gated(scores_TE, weights_TK, ids_TK, counts_E)


def _scores(logits_TE: Tensor, score: str) -> Tensor:
    return logits_TE.softmax(-1) if score == "softmax" else logits_TE.sigmoid()


def _check(logits_TE: Tensor, top_k: int, score: str, groups: int, topk_groups: int, ids_TK: Tensor | None) -> None:
    if logits_TE.dim() != 2:
        raise ValueError(f"gate takes logits of shape (tokens, experts), not {tuple(logits_TE.shape)}")
    tokens, experts = logits_TE.shape
    if score not in ("softmax", "sigmoid"):
        raise ValueError(f"score {score!r} is neither softmax nor sigmoid")
    if groups < 1 or experts % groups or not 1 <= topk_groups <= groups:
        raise ValueError(f"{experts} experts do not form {groups} equal groups with the best {topk_groups} open")
    if not 1 <= top_k <= experts // groups * topk_groups:
        raise ValueError(f"top_k {top_k} is not within 1 and {experts // groups * topk_groups} open experts")
    if ids_TK is not None and ids_TK.shape != (tokens, top_k):
        raise ValueError(f"choices to replay of shape {tuple(ids_TK.shape)} are not ({tokens}, {top_k})")


@torch.library.custom_op("coterie::gate", mutates_args=())
def _gate(
    logits_TE: Tensor,
    top_k: int,
    score: str,
    bias_E: Tensor | None,
    groups: int,
    topk_groups: int,
    valid_T: Tensor | None,
    ids_TK: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if choose(logits_TE) == "triton":
        return gate_triton(logits_TE, top_k, score, bias_E, groups, topk_groups, valid_T, ids_TK)
    if logits_TE.is_cpu:
        return _gate_cpu(logits_TE, top_k, score, bias_E, groups, topk_groups, valid_T, ids_TK)
    chosen = {"score": score, "bias_E": bias_E, "groups": groups, "topk_groups": topk_groups}
    own_TK = None if ids_TK is None else ids_TK.clone()  # an output may not alias an input
    gated = gate_reference(logits_TE, top_k, valid_T=valid_T, ids_TK=own_TK, **chosen)
    return gated.scores_TE, gated.weights_TK, gated.ids_TK, gated.counts_E


@_gate.register_fake
def _(logits_TE, top_k, score, bias_E, groups, topk_groups, valid_T, ids_TK):
    shape = (logits_TE.shape[0], top_k)
    return (
        torch.empty_like(logits_TE, memory_format=torch.contiguous_format),
        logits_TE.new_empty(shape),
        logits_TE.new_empty(shape, dtype=torch.int64),
        logits_TE.new_empty((logits_TE.shape[1],), dtype=torch.int64),
    )


@torch.library.custom_op("coterie::gate_backward", mutates_args=())
def _gate_backward(
    scores_TE: Tensor, ids_TK: Tensor, dscores_TE: Tensor | None, dweights_TK: Tensor | None, score: str
) -> Tensor:
    if choose(scores_TE) == "triton":
        return gate_backward_triton(scores_TE, ids_TK, dscores_TE, dweights_TK, score)
    ds_TE = torch.zeros_like(scores_TE) if dscores_TE is None else dscores_TE.clone()
    if dweights_TK is not None:
        ds_TE.scatter_add_(1, ids_TK.clamp(min=0), dweights_TK.masked_fill(ids_TK < 0, 0))
    if score == "softmax":
        return torch.ops.aten._softmax_backward_data(ds_TE, scores_TE, 1, torch.float32)
    return torch.ops.aten.sigmoid_backward(ds_TE, scores_TE)


@_gate_backward.register_fake
def _(scores_TE, ids_TK, dscores_TE, dweights_TK, score):
    return torch.empty_like(scores_TE)


def _save(ctx, inputs, output) -> None:
    ctx.score = inputs[2]
    ctx.save_for_backward(output[0], output[2])
    ctx.mark_non_differentiable(output[2], output[3])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dscores_TE, dweights_TK, _ids, _counts):
    scores_TE, ids_TK = ctx.saved_tensors
    if dscores_TE is None and dweights_TK is None:
        return (None,) * 8
    return _gate_backward(scores_TE, ids_TK, dscores_TE, dweights_TK, ctx.score), *(None,) * 7


_gate.register_autograd(_differentiate, setup_context=_save)


def _gate_cpu(logits_TE, top_k, score, bias_E, groups, topk_groups, valid_T, ids_TK):
    scores_TE = _scores(logits_TE, score)
    partial = valid_T is not None or ids_TK is not None
    if ids_TK is None:
        select_TE = scores_TE if bias_E is None else scores_TE + bias_E
        if groups > 1:
            select_TE = _close_groups(select_TE, groups, topk_groups)
        ids_TK = _top_ids(select_TE, top_k)
    else:
        ids_TK = ids_TK.clone(memory_format=torch.contiguous_format)
    if valid_T is not None:
        ids_TK.masked_fill_(~valid_T[:, None], -1)
    if partial:
        weights_TK = scores_TE.gather(1, ids_TK.clamp(min=0)).masked_fill_(ids_TK < 0, 0)
        counts_E = torch.bincount(ids_TK.flatten() + 1, minlength=scores_TE.shape[1] + 1)[1:].clone()
    else:
        weights_TK = scores_TE.gather(1, ids_TK)
        counts_E = torch.bincount(ids_TK.flatten(), minlength=scores_TE.shape[1])
    return scores_TE, weights_TK, ids_TK, counts_E


_INDEX_BITS = 29  # what widening fp32 to fp64 leaves zero at the end of the mantissa
_INDEX = 2**_INDEX_BITS - 1
_NUMBER = (2**63 - 1) & ~_INDEX


def _top_ids(select_TE: Tensor, top_k: int) -> Tensor:
    """Columns of the largest values, ties to the lowest; several times faster than a stable sort or `topk`.

    The value as fp64 bits and the column share one int64 key, so NumPy's vectorised partition sees no ties at all.
    """
    values_TE = select_TE.numpy()
    tokens, experts = values_TE.shape
    if top_k == 1:  # argmax returns the first of equals
        return torch.from_numpy(values_TE.argmax(1)[:, None])
    ids_TK = np.empty((tokens, top_k), np.int64)
    block = max(1, min(tokens, 2**15 // experts))  # two buffers that stay in the cache
    keys_BE = np.empty((block, experts), np.int64)
    flips_BE = np.empty_like(keys_BE)
    for first in range(0, tokens, block):
        values = values_TE[first : first + block]
        keys, flips = keys_BE[: len(values)], flips_BE[: len(values)]
        keys.view(np.float64)[...] = values
        # Negative floats order backwards as integers: flip all but the sign and the bits kept for the column.
        np.right_shift(keys, 63, out=flips)
        flips &= _NUMBER
        keys ^= flips
        np.subtract(np.arange(experts), keys, out=keys)
        keys.partition(top_k - 1, axis=1)
        best = keys[:, :top_k]
        best.sort(axis=1)
        np.bitwise_and(best, _INDEX, out=ids_TK[first : first + block])
    return torch.from_numpy(ids_TK)


def _close_groups(select_TE: Tensor, groups: int, topk_groups: int) -> Tensor:
    members_GMT = select_TE.t().contiguous().unflatten(0, (groups, -1))
    best_GT = members_GMT[:, 0]
    if members_GMT.shape[1] > 1:
        second_GT = torch.full_like(best_GT, -torch.inf)
        for member_GT in members_GMT.unbind(1)[1:]:
            second_GT = torch.maximum(second_GT, torch.minimum(best_GT, member_GT))
            best_GT = torch.maximum(best_GT, member_GT)
        best_GT = best_GT + second_GT
    best_TG = best_GT.t().contiguous()
    closed_TG = torch.ones(best_TG.shape, dtype=torch.bool).scatter_(1, _top_ids(best_TG, topk_groups), False)
    select_TGM = select_TE.unflatten(1, (groups, -1))
    return torch.where(closed_TG[..., None], -torch.inf, select_TGM).flatten(1)
