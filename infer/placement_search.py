"""The planner's search: swaps of two copies, for all layers at once, each of which lowers what is sought. No torch.

What is sought, for a layer: the mean over steps of the fullest rank's work, plus `Bonds.weight` x the share of the
pairs of a token's choices that lie on two nodes.
"""

# Shapes: L layers, S steps, N nodes, R ranks, C slots of a rank, E experts, Q ranks that may be swapped with.

from __future__ import annotations

import numpy as np

from .placement import held

CANDIDATES = 8
"""Copies of each that are tried."""
EFFORT = 1 << 20
"""Numbers looked at, times the rounds: many rounds for few layers and ranks, few where one takes long."""
PARTNERS = 8
"""Ranks that one is tried with at a time."""
_EPS = 1e-6


class Bonds:
    """What experts are chosen with, and how much of it each node holds.

    A pair counts for two copies as often as tokens chose both experts, over the copies of each: with several, a token
    may find them apart.

    Args:
        pairs_LEE: how often two experts were chosen together.
        copies_LE: of each expert.
        nodes: how many.
        weight: of all pairs.
    """

    def __init__(self, pairs_LEE: np.ndarray, copies_LE: np.ndarray, nodes: int, weight: float) -> None:
        L, E = copies_LE.shape
        self.pairs_LEE, self.weight = pairs_LEE, weight
        total_L = pairs_LEE.sum((1, 2)).clip(1) / 2
        self.scale_LE = (1 / copies_LE).astype(np.float32)
        self.unit_L = (weight / total_L).astype(np.float32)
        self.near_LNE = np.zeros((L, nodes, E), np.float32)
        """Over the copies that a node holds: how often they were chosen with each expert, over their copies."""

    def held(self, e_LX: np.ndarray) -> np.ndarray:
        """What copies of experts of each layer are bound to on each node, (L, N, X)."""
        rows = np.arange(len(e_LX))[:, None]
        scale_LX = self.scale_LE[rows, e_LX] * self.unit_L[:, None]
        return np.take_along_axis(self.near_LNE, e_LX[:, None], 2) * scale_LX[:, None]

    def put(self, e_LN: np.ndarray) -> None:
        """A copy of an expert of each layer comes to each node."""
        rows = np.arange(len(e_LN))[:, None]
        self.near_LNE += self.pairs_LEE[rows, e_LN] * self.scale_LE[rows, e_LN][..., None]

    def gain(self, rows: np.ndarray, e: np.ndarray, f: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """What is won when a copy of `e` on node `a` and one of `f` on node `b` change places; all index arrays that
        broadcast, `rows` the layers."""
        near, scale = self.near_LNE, self.scale_LE
        e_wins = (near[rows, b, e] - near[rows, a, e]) * scale[rows, e]
        f_wins = (near[rows, a, f] - near[rows, b, f]) * scale[rows, f]
        met = self.pairs_LEE[rows, e, f] * scale[rows, e] * scale[rows, f]
        return np.where(a == b, 0, (e_wins + f_wins - 2 * met) * self.unit_L[rows])

    def swap(self, rows: np.ndarray, e: np.ndarray, f: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
        """They do; no two of the same layer and node."""
        pairs, scale = self.pairs_LEE, self.scale_LE
        change = pairs[rows, f] * scale[rows, f][:, None] - pairs[rows, e] * scale[rows, e][:, None]
        change[a == b] = 0
        self.near_LNE[rows, a] += change
        self.near_LNE[rows, b] -= change


def trade(members_LNJ: np.ndarray, share_LE: np.ndarray, bonds: Bonds, ranks: int) -> None:
    """Swaps copies between nodes, in place, while less is bound apart and the nodes' work does not suffer more.

    In a round nodes meet in pairs, and each pair swaps the best two of a few candidates.
    """
    L, N, _ = members_LNJ.shape
    layers = np.arange(L)
    on_LNE = np.zeros(bonds.near_LNE.shape, np.int8)
    np.add.at(on_LNE, (layers[:, None, None], np.arange(N)[:, None], members_LNJ), 1)
    work_LN = np.take_along_axis(share_LE[:, None], members_LNJ, 2).sum(2)
    row_LP11 = layers[:, None, None, None]
    meetings = _meetings(N)
    quiet = 0
    for i in range(_rounds(on_LNE.size)):
        if quiet == len(meetings):
            break
        a_P, b_P = meetings[i % len(meetings)]
        a, b = a_P[:, None, None], b_P[:, None, None]
        i_LPF, j_LPF = (_leavers(members_LNJ, on_LNE, bonds, *way) for way in ((a_P, b_P), (b_P, a_P)))
        e_LPF1 = np.take_along_axis(members_LNJ[:, a_P], i_LPF, 2)[..., None]
        f_LP1F = np.take_along_axis(members_LNJ[:, b_P], j_LPF, 2)[:, :, None]
        gap = (work_LN[:, a_P] - work_LN[:, b_P])[..., None, None]
        more = share_LE[row_LP11, e_LPF1] - share_LE[row_LP11, f_LP1F]
        win = bonds.gain(row_LP11, e_LPF1, f_LP1F, a, b) - (abs(gap - 2 * more) - abs(gap)) / (2 * ranks)
        win[(on_LNE[row_LP11, b, e_LPF1] > 0) | (on_LNE[row_LP11, a, f_LP1F] > 0)] = 0
        flat_LP = win.reshape(*win.shape[:2], -1).argmax(2)
        row, p = np.nonzero(win.max((2, 3)) > _EPS)
        quiet = 0 if row.size else quiet + 1
        x, y = np.divmod(flat_LP[row, p], j_LPF.shape[2])
        e, f, a, b = e_LPF1[row, p, x, 0], f_LP1F[row, p, 0, y], a_P[p], b_P[p]
        members_LNJ[row, a, i_LPF[row, p, x]], members_LNJ[row, b, j_LPF[row, p, y]] = f, e
        for node, gone, come in ((a, e, f), (b, f, e)):
            on_LNE[row, node, gone] -= 1
            on_LNE[row, node, come] += 1
            work_LN[row, node] += share_LE[row, come] - share_LE[row, gone]
        bonds.swap(row, e, f, a, b)


def _rounds(size: int) -> int:
    return min(256, max(4, EFFORT // size))


def _meetings(nodes: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rounds in which every node meets another one, until each has met all: a round-robin tournament."""
    ring = list(range(nodes + nodes % 2))  # with an odd number one rests
    rounds = []
    for _ in range(len(ring) - 1):
        half = len(ring) // 2
        pairs = [p for p in zip(ring[:half], ring[: half - 1 : -1], strict=True) if max(p) < nodes]
        rounds.append(tuple(np.array(side) for side in zip(*pairs, strict=True)))
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return rounds


def _leavers(
    members_LNJ: np.ndarray, on_LNE: np.ndarray, bonds: Bonds, a_P: np.ndarray, b_P: np.ndarray
) -> np.ndarray:
    """Places (L, P, F), in each node of `a_P`, of the copies that are most bound to the node of `b_P`."""
    pull_LPE = (bonds.near_LNE[:, b_P] - bonds.near_LNE[:, a_P]) * bonds.scale_LE[:, None]
    pull_LPE[on_LNE[:, b_P] > 0] = -np.inf
    pull_LPJ = np.take_along_axis(pull_LPE, members_LNJ[:, a_P], 2)
    few = min(CANDIDATES, pull_LPJ.shape[2])
    return np.argpartition(-pull_LPJ, few - 1, axis=2)[:, :, :few]


def search(slots_LRC: np.ndarray, work_LSE: np.ndarray, bonds: Bonds | None, nodes: int) -> np.ndarray:
    """Swaps copies between ranks while that lowers what is sought; a layer ends when no rank that is ever the
    fullest has a swap that helps.

    Args:
        slots_LRC: no slot empty.
        work_LSE: of a copy of each expert in each step.
        bonds: None: only work counts.
        nodes: over which the ranks are divided.
    """
    slots_LRC = slots_LRC.copy()
    L, R, _ = slots_LRC.shape
    work_LES = np.ascontiguousarray(work_LSE.transpose(0, 2, 1))
    layers = np.arange(L)
    load_LRS = work_LES[layers[:, None, None], slots_LRC].sum(2)
    held_LRE = held(slots_LRC, work_LES.shape[1])
    tried_LR = np.zeros((L, R), np.int64)  # lots of partners without a swap that helps
    for _ in range(_rounds(load_LRS.size)):
        fullest_LS = load_LRS.argmax(1)
        blame_LR = np.bincount((fullest_LS + layers[:, None] * R).ravel(), minlength=L * R).reshape(L, R)
        blame_LR[tried_LR * PARTNERS >= R - 1] = 0
        row = np.flatnonzero(blame_LR.any(1))
        if not row.size:
            break
        r = blame_LR[row].argmax(1)
        others = _partners(load_LRS[row], r, fullest_LS[row] == r[:, None], tried_LR[row, r])
        win = _wins(slots_LRC, work_LES, load_LRS, held_LRE, bonds, row, r, others, R // nodes)
        best = win.reshape(len(row), -1).argmax(1)
        good = win.reshape(len(row), -1)[np.arange(len(row)), best] > _EPS
        tried_LR[row[~good], r[~good]] += 1
        x, y, z = np.unravel_index(best[good], win.shape[1:])
        row, r, q = row[good], r[good], others[good, y]
        e, f = slots_LRC[row, r, x], slots_LRC[row, q, z]
        slots_LRC[row, r, x], slots_LRC[row, q, z] = f, e
        change = work_LES[row, f] - work_LES[row, e]
        load_LRS[row, r] += change
        load_LRS[row, q] -= change
        held_LRE[row, r, e] = held_LRE[row, q, f] = False
        held_LRE[row, r, f] = held_LRE[row, q, e] = True
        tried_LR[row] = 0
        if bonds is not None:
            bonds.swap(row, e, f, r * nodes // R, q * nodes // R)
    return slots_LRC


def _partners(load_BRS: np.ndarray, r_B: np.ndarray, hot_BS: np.ndarray, lot_B: np.ndarray) -> np.ndarray:
    """The ranks (B, Q) with the least work in the steps in which `r_B` has the most, or a later lot of PARTNERS."""
    work_BR = np.einsum("brs,bs->br", load_BRS, hot_BS.astype(np.float32))
    work_BR[np.arange(len(r_B)), r_B] = np.inf
    last = work_BR.shape[1] - 2  # behind it comes the rank itself
    places = np.minimum(lot_B[:, None] * PARTNERS + np.arange(min(PARTNERS, last + 1)), last)
    return np.take_along_axis(np.argsort(work_BR, axis=1, kind="stable"), places, 1)


def _wins(
    slots_LRC: np.ndarray,
    work_LES: np.ndarray,
    load_LRS: np.ndarray,
    held_LRE: np.ndarray,
    bonds: Bonds | None,
    row: np.ndarray,
    r: np.ndarray,
    q_BQ: np.ndarray,
    ranks: int,
) -> np.ndarray:
    """What each swap of a slot of rank `r` with one of a partner wins, (B, C, Q, C); 0 where a rank would have twins.
    `row` (B,) are the layers, `ranks` those of a node."""
    b, row_ = np.arange(len(row)), row[:, None]
    rest_BRS = load_LRS[row]
    rest_BRS[b, r] = -1
    first_BS = rest_BRS.argmax(1)
    top_BS = np.take_along_axis(rest_BRS, first_BS[:, None], 1)[:, 0]
    np.put_along_axis(rest_BRS, first_BS[:, None], -1, 1)
    next_BS = rest_BRS.max(1)
    # The most of all ranks but these two: the first of the others, or the second where the partner is the first.
    rest_BQS = np.where(first_BS[:, None] == q_BQ[..., None], next_BS[:, None], top_BS[:, None])
    e_BC, f_BQC = slots_LRC[row, r], slots_LRC[row_, q_BQ]
    mine_BCS, their_BQCS = work_LES[row_, e_BC], work_LES[row_[..., None], f_BQC]
    more = their_BQCS[:, None] - mine_BCS[:, :, None, None]
    load_r, load_q = load_LRS[row, r][:, None, None, None], load_LRS[row_, q_BQ][:, None, :, None]
    after = np.maximum(load_r + more, load_q - more)
    np.maximum(after, rest_BQS[:, None, :, None], out=after)
    win = load_LRS[row].max(1).mean(1)[:, None, None, None] - after.mean(4)
    e, f = e_BC[:, :, None, None], f_BQC[:, None]
    if bonds is not None:
        here, there = (r // ranks)[:, None, None, None], (q_BQ // ranks)[:, None, :, None]
        win += bonds.gain(row[:, None, None, None], e, f, here, there)
    twins = held_LRE[row[:, None, None], q_BQ[:, None], e_BC[..., None]][..., None]
    twins = twins | held_LRE[row_[..., None], r[:, None, None], f_BQC][:, None]
    win[twins] = 0
    return win
