"""The planner's search: swaps of two copies, for all layers at once, each of which lowers what is sought. No torch.

What is sought, for a layer: the mean over steps of the fullest rank's work, plus `Bonds.weight` x the share of the
pairs of a token's choices that lie on two nodes.
"""

# Shapes: L layers, S steps, N nodes, R ranks, C slots of a rank, E experts, Q ranks that may be swapped with.

from __future__ import annotations

import numpy as np

from .placement import held
from .routes import Routes

CANDIDATES = 8
"""Copies of each that are tried."""
EFFORT = 1 << 20
"""Numbers looked at, times the rounds: many rounds for few layers and ranks, few where one takes long."""
PARTNERS = 8
"""Ranks that one is tried with at a time."""
AT_ONCE = 1 << 17
"""Numbers of an array that many swaps are judged with: what a core's cache holds."""
_EPS = 1e-6


class Bonds:
    """What experts are chosen with, and how much of it each node holds.

    A pair counts for two copies as often as tokens chose both experts, over the copies of each: with several, a token
    may find them apart.

    Args:
        routes: tell how often two experts were chosen together.
        copies_LE: of each expert.
        nodes: how many.
        weight: of all pairs.
    """

    def __init__(self, routes: Routes, copies_LE: np.ndarray, nodes: int, weight: float) -> None:
        L, E = copies_LE.shape
        self.pairs_LEE, self.weight = routes.pairs_LEE, weight
        total_L = routes.pairs_L.clip(1) / 2
        self.scale_LE = (1 / copies_LE).astype(np.float32)
        self.unit_L = (weight / total_L).astype(np.float32)
        self.near_LNE = np.zeros((L, nodes, E), np.float32)
        """Over the copies that a node holds: how often they were chosen with each expert, over their copies."""
        self._more_LNE = np.empty_like(self.near_LNE)

    def held(self, e_LX: np.ndarray) -> np.ndarray:
        """What copies of experts of each layer are bound to on each node, (L, N, X)."""
        L, N, E = self.near_LNE.shape
        scale_LX = self.scale_LE.take(np.arange(L)[:, None] * E + e_LX) * self.unit_L[:, None]
        return self.near_LNE.take(np.arange(L * N).reshape(L, N, 1) * E + e_LX[:, None]) * scale_LX[:, None]

    def put(self, e_LN: np.ndarray) -> None:
        """A copy of an expert of each layer comes to each node."""
        L, E = self.scale_LE.shape
        at_LN = np.arange(L)[:, None] * E + e_LN
        self.pairs_LEE.reshape(L * E, E).take(at_LN, axis=0, out=self._more_LNE, mode="clip")
        self._more_LNE *= self.scale_LE.take(at_LN)[..., None]
        self.near_LNE += self._more_LNE

    def gain(self, rows: np.ndarray, e: np.ndarray, f: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """What is won when a copy of `e` on node `a` and one of `f` on node `b` change places; all index arrays that
        broadcast, `rows` the layers."""
        near, E = self.near_LNE, self.scale_LE.shape[1]
        scale_e, scale_f = self.scale_LE[rows, e], self.scale_LE[rows, f]
        e_wins = (near[rows, b, e] - near[rows, a, e]) * scale_e
        f_wins = (near[rows, a, f] - near[rows, b, f]) * scale_f
        met = self.pairs_LEE.take((rows * E + e) * E + f)  # the largest of these arrays: in place from here on
        met *= -2 * scale_e
        met *= scale_f
        met += e_wins
        met += f_wins
        met *= self.unit_L[rows] * (a != b)
        return met

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
    E = share_LE.shape[1]
    codes_LNJ = np.arange(L * N).reshape(L, N, 1) * E + members_LNJ
    on_LNE = np.bincount(codes_LNJ.ravel(), minlength=L * N * E).reshape(L, N, E).astype(np.int8)
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
        win_LPX = win.reshape(*win.shape[:2], -1)
        flat_LP = win_LPX.argmax(2)
        row, p = np.nonzero(np.take_along_axis(win_LPX, flat_LP[..., None], 2)[..., 0] > _EPS)
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
    L, N, E = on_LNE.shape
    e_LPJ, layer_L11 = members_LNJ[:, a_P], np.arange(L)[:, None, None]
    here_LPJ, there_LPJ = (((layer_L11 * N + at_P[:, None]) * E + e_LPJ) for at_P in (a_P, b_P))
    hold_LPJ = bonds.near_LNE.take(here_LPJ) - bonds.near_LNE.take(there_LPJ)
    hold_LPJ *= bonds.scale_LE.take(layer_L11 * E + e_LPJ)
    hold_LPJ[on_LNE.take(there_LPJ) > 0] = np.inf
    few = min(CANDIDATES, hold_LPJ.shape[2])
    return np.argpartition(hold_LPJ, few - 1, axis=2)[:, :, :few]


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
    load_LSR = np.ascontiguousarray(load_LRS.transpose(0, 2, 1))
    held_LRE = held(slots_LRC, work_LES.shape[1])
    tried_LR = np.zeros((L, R), np.int64)  # lots of partners without a swap that helps
    for _ in range(_rounds(load_LSR.size)):
        fullest_LS = load_LSR.argmax(2)
        row, r = _blamed(fullest_LS, tried_LR)
        if not row.size:
            break
        others = _partners(load_LSR[row], r, fullest_LS[row] == r[:, None], tried_LR[row, r])
        e_BC, f_BQC = slots_LRC[row, r], slots_LRC[row[:, None], others]
        win = _wins(work_LES, load_LSR[row], fullest_LS[row], row, r, others, e_BC, f_BQC)
        at = (row[:, None, None, None], e_BC[:, :, None, None], f_BQC[:, None])
        r_, q_ = r[:, None, None, None], others[:, None, :, None]
        if bonds is not None:
            win += bonds.gain(*at, r_ * nodes // R, q_ * nodes // R)
        win[held_LRE[at[0], q_, at[1]] | held_LRE[at[0], r_, at[2]]] = 0  # a rank would have twins
        flat = win.reshape(len(row), -1)
        best = flat.argmax(1)
        good = flat[np.arange(len(row)), best] > _EPS
        tried_LR[row[~good], r[~good]] += 1
        x, y, z = np.unravel_index(best[good], win.shape[1:])
        row, r, q = row[good], r[good], others[good, y]
        e, f = slots_LRC[row, r, x], slots_LRC[row, q, z]
        slots_LRC[row, r, x], slots_LRC[row, q, z] = f, e
        change = work_LES[row, f] - work_LES[row, e]
        load_LSR[row, :, r] += change
        load_LSR[row, :, q] -= change
        held_LRE[row, r, e] = held_LRE[row, q, f] = False
        held_LRE[row, r, f] = held_LRE[row, q, e] = True
        tried_LR[row] = 0
        if bonds is not None:
            bonds.swap(row, e, f, r * nodes // R, q * nodes // R)
    return slots_LRC


def _blamed(fullest_LS: np.ndarray, tried_LR: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Layers (B,) with a rank that is the fullest of a step and has partners left, and the one that is most often."""
    L, R = tried_LR.shape
    blame_LR = np.bincount((fullest_LS + np.arange(L)[:, None] * R).ravel(), minlength=L * R).reshape(L, R)
    blame_LR[tried_LR * PARTNERS >= R - 1] = 0
    row = np.flatnonzero(blame_LR.any(1))
    return row, blame_LR[row].argmax(1)


def _partners(load_BSR: np.ndarray, r_B: np.ndarray, hot_BS: np.ndarray, lot_B: np.ndarray) -> np.ndarray:
    """The ranks (B, Q) with the least work in the steps in which `r_B` has the most, or a later lot of PARTNERS."""
    work_BR = np.matmul(hot_BS[:, None].astype(np.float32), load_BSR)[:, 0]
    work_BR[np.arange(len(r_B)), r_B] = np.inf
    last = work_BR.shape[1] - 2  # behind it comes the rank itself
    places = np.minimum(lot_B[:, None] * PARTNERS + np.arange(min(PARTNERS, last + 1)), last)
    return np.take_along_axis(np.argsort(work_BR, axis=1, kind="stable"), places, 1)


def _wins(
    work_LES: np.ndarray,
    load_BSR: np.ndarray,
    fullest_BS: np.ndarray,
    row: np.ndarray,
    r: np.ndarray,
    q_BQ: np.ndarray,
    e_BC: np.ndarray,
    f_BQC: np.ndarray,
) -> np.ndarray:
    """What each swap of a copy of rank `r` for one of a partner lowers the fullest rank's work by, (B, C, Q, C). It
    uses up `load_BSR`."""
    b, row_ = np.arange(len(row)), row[:, None]
    load_r_BS = load_BSR[b, :, r]
    load_q_BQS = load_BSR[b[:, None], :, q_BQ]
    now_BS = _at(load_BSR, fullest_BS)
    load_BSR[b, :, r] = -1
    first_BS = load_BSR.argmax(2)
    top_BS = _at(load_BSR, first_BS)
    np.put_along_axis(load_BSR, first_BS[..., None], -1, 2)
    # The most of all ranks but these two: the first of the others, or the second where the partner is the first.
    next_BS = _at(load_BSR, load_BSR.argmax(2))
    rest_BQS = np.where(first_BS[:, None] == q_BQ[..., None], next_BS[:, None], top_BS[:, None])
    mine_BCS, their_BQCS = work_LES[row_, e_BC], work_LES[row_[..., None], f_BQC]
    mine_left_BCS, their_left_BQCS = load_r_BS[:, None] - mine_BCS, load_q_BQS[:, :, None] - their_BQCS
    (B, Q, C, S), sums = their_BQCS.shape, []
    lot = max(1, AT_ONCE // (C * Q * C * S))
    for i in (slice(start, start + lot) for start in range(0, B, lot)):
        after = mine_left_BCS[i, :, None, None] + their_BQCS[i, None]
        np.maximum(after, mine_BCS[i, :, None, None] + their_left_BQCS[i, None], out=after)
        np.maximum(after, rest_BQS[i, None, :, None], out=after)
        sums.append(np.einsum("bcqds->bcqd", after))  # `sum` takes ten times as long for a few numbers each
    return (now_BS.sum(1)[:, None, None, None] - np.concatenate(sums)) / S


def _at(load_BSR: np.ndarray, rank_BS: np.ndarray) -> np.ndarray:
    return np.take_along_axis(load_BSR, rank_BS[..., None], 2)[..., 0]
