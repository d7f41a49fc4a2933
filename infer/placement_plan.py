"""The fast planner: replicas, packing and a search, for all layers of one size at a time. No torch.

    1. replicas   one by one to the expert with the most work for each copy
    2. nodes      copies, heaviest first, to the node with the least work and the most of what they are chosen with;
                  then swaps between nodes where tokens cross less for it
    3. ranks      within a node, heaviest first, to the rank with the least work
    4. search     swaps that lower the sum over steps of the fullest rank's work, which is the objective itself
    5. polish     where there are few experts and ranks: any change that lowers the cost, other replicas too

An expert's work in a step is `aim.tokens` x its tokens over those of the mean rank, plus, where it has any,
`aim.activated` over the experts of the mean rank. So prefill and decode are two settings of one planner.

The search is made where tokens count: copies share tokens evenly, so the sum that it lowers is the objective. In
decode one copy of each expert computes, and searching with even shares instead finds what does not last: out of
window it cost more than it won.
"""

# Shapes: L layers, S steps, N nodes of G ranks, R = N * G ranks, C slots of a rank, E experts, M copies of all.

from __future__ import annotations

import numpy as np

from .placement import Cluster, Placement
from .placement_moves import adopt, align, follow, match
from .placement_polish import polish, small
from .placement_score import PREFILL, Aim, costs
from .placement_search import Bonds, search, trade
from .routes import Routes

STEPS, MOST_STEPS, NUMBERS = 32, 128, 1 << 19
"""Steps that are looked at, spread evenly over those recorded: as many as have so many loads, within these bounds.
Loads of small steps are mostly chance, and what a search finds in 32 of them does not last."""
APART = 4.0
"""What it costs that experts which meet are on one rank, by how much the work of a step grows: more than once, as the
fullest rank is where most of them meet."""
_FULL = 1e9
"""Worse than any place with room."""


def plan(
    routes: Routes,
    cluster: Cluster,
    aim: Aim = PREFILL,
    *,
    present: Placement | None = None,
    moves: int | None = None,
) -> Placement:
    """A placement for steps like the recorded ones. The same input gives the same placement.

    Args:
        present: what there is. Each layer stays as it is unless that costs more in the recorded steps.
        moves: copies that ranks may fetch to get there, in all; layers that win the most for each come first.

    Raises:
        ValueError: the experts do not fit, nothing was recorded, or the present placement is of something else.
    """
    if not routes.loads_SLE.any():
        raise ValueError("no step with tokens was recorded, so there is nothing to plan by")
    mean_LE = routes.loads_SLE.mean(0)
    skew_L = mean_LE.max(1) / mean_LE.mean(1).clip(1e-9)
    sizes = list(zip(routes.experts, cluster.room(routes.experts, skew_L.tolist()), strict=True))
    slots_LRC = np.full((len(sizes), cluster.world, cluster.slots), -1, np.int16)
    for size in sorted(set(sizes)):
        which = [layer for layer, other in enumerate(sizes) if other == size]
        some = routes if len(which) == len(sizes) else routes.layers(which)
        slots_LRC[which, :, : size[1]] = _plan(some, cluster, size[1], aim)
    fresh = Placement(slots_LRC, routes.experts, cluster.nodes)
    if present is None:
        return follow(fresh, routes.transitions_LEE) if aim.follow else fresh
    present.check(cluster)
    if present.experts != routes.experts:
        raise ValueError("the present placement and the routes are of different layers")
    fresh = align(fresh, present)
    before_L, after_L = (costs(placement, routes, aim) for placement in (present, fresh))
    return adopt(present, fresh, before_L, after_L, moves)


def work_of(loads_SLE: np.ndarray, ranks: int, aim: Aim) -> np.ndarray:
    """Work (L, S, E) of each expert in each step; 1 is that of a rank in a balanced step."""
    loads_LSE = loads_SLE.transpose(1, 0, 2).astype(np.float32)
    out = np.zeros_like(loads_LSE)
    for weight, part in ((aim.tokens, loads_LSE), (aim.activated, (loads_LSE > 0).astype(np.float32))):
        if weight:
            out += part * (weight * ranks / part.sum(2, keepdims=True).clip(1))
    return out


def _plan(routes: Routes, cluster: Cluster, room: int, aim: Aim) -> np.ndarray:
    N, G = cluster.nodes, cluster.ranks
    count = min(MOST_STEPS, max(STEPS, NUMBERS // routes.loads_SLE[0].size))
    chosen = np.unique(np.linspace(0, len(routes) - 1, count).astype(int))
    work_LSE = work_of(routes.loads_SLE[chosen], N * G, aim)
    mean_LE = work_LSE.mean(1)
    copies_LE = replicate(mean_LE, N * G * room, N * G)
    work_LSE /= copies_LE[:, None]
    share_LE = mean_LE / copies_LE
    bonds = Bonds(routes, copies_LE, N, aim.crossings) if aim.crossings and N > 1 else None
    members_LNJ = to_nodes(items(copies_LE, share_LE), share_LE, N, G, bonds)
    if bonds is not None:
        trade(members_LNJ, share_LE, bonds, G)
    met = (routes.pairs_LEE, meeting(routes, chosen, N * G, aim)) if aim.activated and G > 1 else None
    slots_LRC = to_ranks(members_LNJ, share_LE, G, met)
    if aim.tokens and N * G > 1:
        slots_LRC = search(slots_LRC, work_LSE, bonds, N)
    few = chosen[:: -(-len(chosen) // STEPS)]
    if small(N * G, room, work_LSE.shape[2], len(few)):
        for layer, slots_RC in enumerate(slots_LRC):
            pairs_EE = None if bonds is None else routes.pairs_LEE[layer]
            slots_LRC[layer] = polish(slots_RC, routes.loads_SLE[few, layer], aim, pairs_EE, N)
    return slots_LRC


def replicate(work_LE: np.ndarray, slots: int, ranks: int) -> np.ndarray:
    """Copies (L, E) of each expert: one, and each further slot to the expert with the most work for a copy. An expert
    has no more copies than there are ranks."""
    copies_LE = np.ones(work_LE.shape, np.int64)
    layers = np.arange(len(work_LE))
    share_LE = work_LE.copy()
    for _ in range(slots - work_LE.shape[1]):
        e_L = share_LE.argmax(1)
        n_L = copies_LE[layers, e_L] + 1
        copies_LE[layers, e_L] = n_L
        share_LE[layers, e_L] = np.where(n_L < ranks, work_LE[layers, e_L] / n_L, -1)
    return copies_LE


def items(copies_LE: np.ndarray, share_LE: np.ndarray) -> np.ndarray:
    """The copies (L, M) as expert numbers, those with the most work first, copies of one expert together."""
    order_LE = np.argsort(-share_LE, axis=1, kind="stable")
    counts_LE = np.take_along_axis(copies_LE, order_LE, 1)
    return np.repeat(order_LE.ravel(), counts_LE.ravel()).reshape(len(copies_LE), -1)


def to_nodes(items_LM: np.ndarray, share_LE: np.ndarray, nodes: int, ranks: int, bonds: Bonds | None) -> np.ndarray:
    """Which copies each node gets, (L, N, J = M / N), the heaviest first.

    In rounds: every node gets one of the next N copies, so that heavy ones come where there is little work, and bound
    ones where they are bound to. A node that has the expert already takes another copy last.
    """
    L, M = items_LM.shape
    rows_L1 = np.arange(L)[:, None]
    members_LNJ = np.empty((L, nodes, M // nodes), np.int64)
    work_LN = np.zeros((L, nodes), np.float32)
    has_LNE = np.zeros((L, nodes, share_LE.shape[1]), bool)
    first_LN1 = np.arange(L * nodes).reshape(L, nodes, 1) * share_LE.shape[1]
    for j in range(M // nodes):
        e_LN = items_LM[:, j * nodes : (j + 1) * nodes]
        share_LN = share_LE[rows_L1, e_LN]
        # Over all pairs, the sum of squares of the nodes' work falls the most.
        worth_LNN = -(work_LN[:, :, None] / ranks) * share_LN[:, None]
        worth_LNN -= 1e3 * has_LNE.take(first_LN1 + e_LN[:, None])
        if bonds is not None:
            worth_LNN += bonds.held(e_LN)
        e_LN = np.take_along_axis(e_LN, match(worth_LNN), 1)
        members_LNJ[:, :, j] = e_LN
        work_LN += share_LE[rows_L1, e_LN]
        has_LNE[rows_L1, np.arange(nodes), e_LN] = True
        if bonds is not None:
            bonds.put(e_LN)
    return members_LNJ


def meeting(routes: Routes, chosen: np.ndarray, ranks: int, aim: Aim) -> np.ndarray:
    """Factors (L, E): those of two experts x how often they met in the sample is the work that a rank holding both
    has beyond that of two experts that meet by chance.

    Both are active in a step because of one token, tokens x the pair's share of the sample, where neither is so for
    another token's sake.
    """
    loads_SLE = routes.loads_SLE[chosen]
    active_LE = (loads_SLE > 0).mean(0)
    choices_L = loads_SLE.sum((0, 2)) / len(chosen)
    each_L = APART * aim.activated * choices_L * (routes.tokens_SMLK.shape[3] - 1) / routes.pairs_L.clip(1)
    each_L *= ranks / active_LE.sum(1).clip(1e-9)
    return ((1 - active_LE) * np.sqrt(each_L)[:, None]).astype(np.float32)


def to_ranks(
    members_LNJ: np.ndarray, share_LE: np.ndarray, ranks: int, met: tuple[np.ndarray, np.ndarray] | None = None
) -> np.ndarray:
    """Which copies each rank gets, (L, R, C): each to the rank of its node with the least work that has room.

    Args:
        met: how often two experts met (L, E, E), and `meeting`; None: that they meet costs nothing.
    """
    L, N, J = members_LNJ.shape
    room = J // ranks
    flat_BJ = members_LNJ.reshape(L * N, J)  # B = L * N
    share_BJ = np.take_along_axis(share_LE, members_LNJ.reshape(L, N * J), 1).reshape(L * N, J)
    order_BJ = np.argsort(-share_BJ, axis=1, kind="stable")
    flat_BJ, share_BJ = np.take_along_axis(flat_BJ, order_BJ, 1), np.take_along_axis(share_BJ, order_BJ, 1)
    rows = np.arange(L * N)
    slots_BGC = np.full((L * N, ranks, room), -1, np.int64)
    bad_BG, used_BG = np.zeros((L * N, ranks), np.float32), np.zeros((L * N, ranks), np.int64)
    E = share_LE.shape[1]
    twin_BGE = np.zeros((L * N, ranks, E), np.float32)
    factor_BGC = np.zeros(slots_BGC.shape, np.float32)
    for j in range(J):
        e_B = flat_BJ[:, j]
        worse_BG, factor_B = bad_BG + twin_BGE[rows, :, e_B], None
        if met is not None:
            at_B = rows // N * E + e_B
            factor_B = met[1].take(at_B)
            met_BGC = met[0].take(at_B[:, None, None] * E + slots_BGC)  # of an empty slot anything, with factor 0
            worse_BG += np.einsum("bgc,bgc->bg", met_BGC, factor_BGC) * factor_B[:, None]
        g_B = worse_BG.argmin(1)
        used_B = used_BG[rows, g_B]
        slots_BGC[rows, g_B, used_B] = e_B
        if factor_B is not None:
            factor_BGC[rows, g_B, used_B] = factor_B
        used_BG[rows, g_B] = used_B + 1
        bad_BG[rows, g_B] += share_BJ[:, j] + _FULL * (used_B == room - 1)
        twin_BGE[rows, g_B, e_B] = 1e3
    slots_LRC = slots_BGC.reshape(L, N * ranks, room)
    _part_twins(slots_LRC)
    return slots_LRC


def _part_twins(slots_LRC: np.ndarray) -> None:
    """Where the last room left put two copies of an expert on a rank, one is swapped with another rank's."""
    in_order = np.sort(slots_LRC, axis=2)
    for layer, rank in np.argwhere((in_order[:, :, 1:] == in_order[:, :, :-1]).any(2)):
        mine_C = slots_LRC[layer, rank]
        for c in range(len(mine_C)):
            if mine_C[c] not in mine_C[:c]:
                continue
            for other_C in slots_LRC[layer]:
                if mine_C[c] not in other_C and (free := np.flatnonzero(~np.isin(other_C, mine_C))).size:
                    other_C[free[-1]], mine_C[c] = mine_C[c], other_C[free[-1]]
                    break
