"""The last search, for small cases: any change of one or two slots, judged by the objectives themselves. No torch.

Where ranks hold a few of a few experts, one copy more or less is much of a rank's work, and which experts have copies
matters more than where they lie. There are few enough changes to try all of them at once.
"""

# Shapes: S steps, R ranks, C slots, E experts, M changes.

from __future__ import annotations

from itertools import combinations

import numpy as np

from .placement_score import Aim
from .replicas import concentrate

MOST = 1 << 15
"""Changes x steps x ranks that are tried at once; a larger case is left as it is."""
PATIENCE = 40
"""Changes in a row that may find nothing better."""


def small(ranks: int, slots: int, experts: int, steps: int) -> bool:
    """Whether a layer is small enough."""
    filled = ranks * slots
    return filled * (experts + filled) * steps * ranks <= MOST


def polish(
    slots_RC: np.ndarray, loads_SE: np.ndarray, aim: Aim, pairs_EE: np.ndarray | None, nodes: int
) -> np.ndarray:
    """The best of one layer's slots that were met on a walk which always takes the best change that leads somewhere
    new, be it a worse one (tabu search: Glover, Computers and Operations Research 13, 1986).

    Args:
        slots_RC: no slot empty.
        pairs_EE: None: crossings do not count.
    """
    loads_SE = loads_SE[loads_SE.any(1)]
    held_RE = np.zeros((len(slots_RC), loads_SE.shape[1]), bool)
    np.put_along_axis(held_RE, slots_RC, True, 1)
    best_RE, best = held_RE, _cost(held_RE[None], loads_SE, aim, pairs_EE, nodes)[0]
    met, idle = {_name(held_RE)}, 0
    while idle < PATIENCE and len(tried_MRE := _changes(held_RE)):
        cost_M = _cost(tried_MRE, loads_SE, aim, pairs_EE, nodes)
        fresh = (m for m in np.argsort(cost_M, kind="stable") if _name(tried_MRE[m]) not in met)
        if (m := next(fresh, None)) is None:
            break
        held_RE, idle = tried_MRE[m], idle + 1
        met.add(_name(held_RE))
        if cost_M[m] < best - 1e-6:
            best_RE, best, idle = held_RE, cost_M[m], 0
    return np.nonzero(best_RE)[1].reshape(slots_RC.shape)


def _name(held_RE: np.ndarray) -> bytes:
    """The same for placements that differ in the ranks' names alone."""
    return b"".join(sorted(row.tobytes() for row in held_RE))


def _changes(held_RE: np.ndarray) -> np.ndarray:
    """What comes of it (M, R, E) when a copy with another elsewhere is replaced, or two of two ranks are swapped."""
    flips: list[list[tuple[int, int]]] = []
    spare_E = held_RE.sum(0) > 1
    for r, mine in enumerate(held_RE):
        flips += [[(r, e), (r, f)] for e in _places(mine & spare_E) for f in _places(~mine)]
    for r, q in combinations(range(len(held_RE)), 2):
        mine, theirs = _places(held_RE[r] & ~held_RE[q]), _places(held_RE[q] & ~held_RE[r])
        flips += [[(r, e), (r, f), (q, e), (q, f)] for e in mine for f in theirs]
    tried_MRE = np.repeat(held_RE[None], len(flips), 0)
    which = np.repeat(np.arange(len(flips)), [len(f) for f in flips])
    at = np.array([place for f in flips for place in f], np.int64).reshape(-1, 2)
    tried_MRE[which, at[:, 0], at[:, 1]] ^= True
    return tried_MRE


def _places(flags_E: np.ndarray) -> list[int]:
    return np.flatnonzero(flags_E).tolist()


def _cost(
    held_MRE: np.ndarray, loads_SE: np.ndarray, aim: Aim, pairs_EE: np.ndarray | None, nodes: int
) -> np.ndarray:
    """`placement_score.costs` of many placements of one layer, (M,)."""
    (M, R, E), S = held_MRE.shape, len(loads_SE)
    share_MRE = held_MRE / held_MRE.sum(1, keepdims=True)
    cost_M = np.zeros(M)
    if aim.tokens:
        tokens_MRS = share_MRE @ loads_SE.T.astype(np.float64)
        cost_M += aim.tokens * (tokens_MRS.max(1) / tokens_MRS.mean(1)).mean(1)
    if aim.activated:
        loads_BE = np.broadcast_to(loads_SE, (M, S, E)).reshape(M * S, E)
        rank_BE = concentrate(loads_BE, np.repeat(held_MRE, S, 0))
        read_BR = (rank_BE[:, None] == np.arange(R)[:, None]).sum(2)
        cost_M += aim.activated * (read_BR.max(1) / read_BR.mean(1)).reshape(M, S).mean(1)
    if pairs_EE is not None:
        on_MNE = share_MRE.reshape(M, nodes, -1, E).sum(2)
        together_M = ((on_MNE @ pairs_EE) * on_MNE).sum((1, 2))
        cost_M += aim.crossings * (1 - together_M / max(1, pairs_EE.sum()))
    return cost_M
