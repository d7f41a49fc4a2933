"""From the present placement to a better one, moving little; and names of nodes that let tokens stay where they are.

Ranks are alike, and so are nodes: which of them is called which changes no balance. So names are free to be chosen.
No torch.
"""

# Shapes: L layers, R ranks, N nodes of G ranks, C slots, E experts, B matrices to match.

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .placement import Placement, moved


def align(fresh: Placement, present: Placement) -> Placement:
    """The same placement with nodes, and ranks within them, named so that they hold much of what they held."""
    L, R, _ = fresh.slots_LRC.shape
    N, G = fresh.nodes, R // fresh.nodes
    held, was = (p.held_LRE.reshape(L, N, G, -1).astype(np.float32) for p in (fresh, present))
    nodes_LN = match(was.max(2) @ held.max(2).transpose(0, 2, 1))
    held_LNGE = np.take_along_axis(held, nodes_LN[:, :, None, None], 1)
    ranks_BG = match((was @ held_LNGE.transpose(0, 1, 3, 2)).reshape(L * N, G, G))
    order_LR = (nodes_LN[:, :, None] * G + ranks_BG.reshape(L, N, G)).reshape(L, R)
    return Placement(np.take_along_axis(fresh.slots_LRC, order_LR[:, :, None], 1), fresh.experts, N)


def follow(placement: Placement, transitions_LEE: np.ndarray) -> Placement:
    """The same placement with nodes named, layer by layer, so that a token which goes on at the node of its first
    choice finds much of the next layer's choices there (ExFlow, arXiv 2401.08383)."""
    L, R, C = placement.slots_LRC.shape
    N = placement.nodes
    nodes_LNE = placement.held_LRE.reshape(L, N, R // N, -1).sum(2) / placement.copies_LE.clip(1)[:, None]
    nodes_LNE = nodes_LNE.astype(np.float32)
    flow_LNN = nodes_LNE[:-1] @ transitions_LEE @ nodes_LNE[1:].transpose(0, 2, 1)
    slots = placement.slots_LRC.reshape(L, N, R // N, C).copy()
    order_N = np.arange(N)
    for layer in range(1, L):
        order_N = match(flow_LNN[layer - 1, order_N][None])[0]
        slots[layer] = slots[layer, order_N]
    return Placement(slots.reshape(L, R, C), placement.experts, N)


def match(worth_BXX: np.ndarray) -> np.ndarray:
    """A column (B, X) for each row, each one once: the worthiest pair first, and so on. Ties take the lowest."""
    B, X, _ = worth_BXX.shape
    left, rows = worth_BXX.astype(np.float32).reshape(B, X * X), np.arange(B)
    x_P, y_P, gone_PP = _taken(X)
    out_BX = np.zeros((B, X), np.int64)
    for _ in range(X):
        p_B = left.argmax(1)
        out_BX[rows, x_P[p_B]] = y_P[p_B]
        left += gone_PP[p_B]
    return out_BX


@lru_cache(maxsize=8)
def _taken(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each pair its row and column, and what it takes with it, with minus infinity: all pairs of either."""
    x_P, y_P = np.divmod(np.arange(size * size), size)
    return x_P, y_P, np.where((x_P == x_P[:, None]) | (y_P == y_P[:, None]), -np.inf, 0.0).astype(np.float32)


def adopt(
    present: Placement, fresh: Placement, before_L: np.ndarray, after_L: np.ndarray, moves: int | None
) -> Placement:
    """The present placement with the layers of the fresh one that cost less, those first that win the most for a
    copy fetched, as long as no more than `moves` copies are fetched in all.

    Args:
        before_L, after_L: what each layer costs.
        moves: None: no bound.
    """
    win_L, moved_L = before_L - after_L, moved(present, fresh)
    left = int(moved_L.sum()) if moves is None else moves
    slots = present.slots_LRC.copy()
    for layer in np.argsort(-win_L / moved_L.clip(1), kind="stable"):
        if win_L[layer] > 0 and moved_L[layer] <= left:
            left -= int(moved_L[layer])
            slots[layer] = fresh.slots_LRC[layer]
    return Placement(slots, present.experts, present.nodes)
