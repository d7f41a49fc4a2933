"""Which tokens top_k, top_p and min_p leave, without sorting a whole vocabulary.

Probabilities are held as whole numbers: `w = round(exp(score - max) * 2^34)`. Sums of whole numbers below 2^53 are
exact in float64 in whatever order they are added, so that neither the batch's size nor the way a device splits a sum
can change a token. A token 2^35 times less likely than the likeliest has w = 0 and is never drawn.

R rows, V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

ONE = 2.0**34
MOST = 1 << 19  # tokens whose whole numbers surely sum to less than 2^53
_CANDIDATES = 128  # how many are looked at before all are sorted


def whole_numbers(scores_BV: Tensor) -> Tensor:
    """exp(score - max) in units of 2^-34, whole numbers as float32; NaN in a row without a finite maximum.

    exp of one number at a time, and not a softmax, whose sum goes another way for another shape.
    """
    return (scores_BV - scores_BV.amax(dim=-1, keepdim=True)).exp_().mul_(ONE).round_()


def cut(scores_RV: Tensor, limits_R3: Tensor) -> Iterator[tuple[list[int], Tensor | None, Tensor]]:
    """What top_k, top_p and min_p leave: rows of which a few candidates surely hold all that stay, then the rest.

    Args:
        scores_RV: float32, after the temperature.
        limits_R3: top_k (0: all), top_p, min_p, float64.

    Yields: rows; the ids of their candidates, ascending (None: all tokens); whole-number weights, 0 for what is cut.
    """
    size = scores_RV.shape[1]
    k_R1, p_R1, least_R1 = limits_R3.split(1, dim=1)
    k_R1 = k_R1.where(k_R1 > 0, size).clamp(max=size)
    # The mass of which top_p is a part is that of all tokens, or else of the first top_k.
    mass_R1 = torch.zeros_like(p_R1)
    if bool((open_R := k_R1[:, 0] == size).any()):
        w_RV = whole_numbers(scores_RV if bool(open_R.all()) else scores_RV[open_R])
        mass_R1[open_R] = w_RV.sum(dim=-1, keepdim=True, dtype=torch.float64)
    limits_R4 = torch.cat([k_R1, p_R1, ONE * least_R1.float(), mass_R1], dim=1)
    sure_R = torch.zeros_like(open_R)
    if size > 4 * _CANDIDATES:
        best_RK, ids_RK = _first(scores_RV, _CANDIDATES)
        w_RK, keep_RK = _kept(best_RK, limits_R4)
        # Of tokens as likely as the last candidate others may lie outside: a row that keeps one is not decided.
        bound_R1 = best_RK.gather(1, (keep_RK.sum(dim=-1, keepdim=True) - 1).clamp_(min=0))
        sure_R = ((bound_R1 > best_RK[:, -1:]) & ((k_R1 < _CANDIDATES) | (k_R1 == size)))[:, 0]
        if done := sure_R.nonzero()[:, 0].tolist():
            # By id, as all tokens are: the number drawn then leads to the same token whichever way it is looked up.
            ids_RK, order_RK = ids_RK[sure_R].sort(dim=-1)
            yield done, ids_RK, w_RK.where(keep_RK, 0.0)[sure_R].gather(1, order_RK)
    if left := (~sure_R).nonzero()[:, 0].tolist():
        every = len(left) == len(scores_RV)
        yield left, None, _bounded(*((scores_RV, limits_R4) if every else (scores_RV[~sure_R], limits_R4[~sure_R])))


def _kept(best_RK: Tensor, limits_R4: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of the likeliest tokens, likeliest first, and which of them stay: always the first few."""
    k_R1, p_R1, least_R1, mass_R1 = limits_R4.split(1, dim=1)
    w_RK = (best_RK - best_RK[:, :1]).exp_().mul_(ONE).round_()
    within_RK = torch.arange(best_RK.shape[1], device=best_RK.device) < k_R1
    sums_RK = (w_RK * within_RK).cumsum(dim=-1, dtype=torch.float64)
    mass_R1 = mass_R1.where(mass_R1 != 0, sums_RK[:, -1:])
    return w_RK, within_RK & (sums_RK - w_RK < p_R1 * mass_R1) & (w_RK >= least_R1)


def _bounded(scores_RV: Tensor, limits_R4: Tensor) -> Tensor:
    """Weights of all tokens, 0 for those below the score of the last one that stays.

    Only the scores are sorted, without their ids: numpy does that with vector instructions, 40 times as fast as
    torch sorts both (0.3 ms for 152 k on one core).
    """
    size = scores_RV.shape[1]
    if scores_RV.device.type == "cpu":
        best_RV = torch.from_numpy(np.sort(scores_RV.detach().numpy(), axis=-1)).flip(1)
    else:
        best_RV = scores_RV.sort(dim=-1, descending=True).values
    for part in (size // 16, size):  # what stays is mostly among the first: the rest need not be looked at
        count_R1 = _kept(best_RV[:, :part], limits_R4)[1].sum(dim=-1, keepdim=True)
        if bool(((count_R1 < part) & ((limits_R4[:, :1] <= part) | (limits_R4[:, 3:] != 0))).all()):
            break
    bound_R1 = best_RV.gather(1, (count_R1 - 1).clamp_(min=0))
    keep_RV, equal_RV = scores_RV >= bound_R1, scores_RV == bound_R1
    spare_R1 = keep_RV.sum(dim=-1, keepdim=True) - count_R1
    if bool((spare_R1 > 0).any()):  # equals of the last one: the lowest ids stay
        keep_RV &= ~equal_RV | (equal_RV.cumsum(dim=-1) <= equal_RV.sum(dim=-1, keepdim=True) - spare_R1)
    w_RV = whole_numbers(scores_RV)
    return w_RV.where(keep_RV | w_RV.isnan(), 0.0)


def _first(scores_RV: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` largest, largest first, of equals the lowest id first; but which of those that equal the last
    one are among them is left open, unless all are asked for."""
    if width >= scores_RV.shape[1]:
        return scores_RV.sort(dim=-1, descending=True, stable=True)
    best_RK, ids_RK = scores_RV.topk(width, dim=-1)
    ids_RK, order_RK = ids_RK.sort(dim=-1)
    best_RK, order_RK = best_RK.gather(1, order_RK).sort(dim=-1, descending=True, stable=True)
    return best_RK, ids_RK.gather(1, order_RK)


def largest(scores_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest and their ids, largest first, of equals the lowest ids."""
    best_RK, ids_RK = _first(scores_RV, min(2 * count + 8, scores_RV.shape[1]))
    open_R = best_RK[:, count - 1] == best_RK[:, -1]
    if best_RK.shape[1] < scores_RV.shape[1] and bool(open_R.any()):
        some_RV, more_RV = _first(scores_RV[open_R], scores_RV.shape[1])
        best_RK[open_R], ids_RK[open_R] = some_RV[:, : best_RK.shape[1]], more_RV[:, : ids_RK.shape[1]]
    return best_RK[:, :count], ids_RK[:, :count]
