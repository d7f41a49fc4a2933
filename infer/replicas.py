"""Which copy of an expert computes a token: pure functions that every rank can evaluate alike. No torch.

Two ways, for two kinds of steps:

`spread`: of many tokens (prompts) every copy gets an equal share, so tokens of a rank go to the copy that is near. It
depends on the placement alone, so it is made once and costs a look-up.

`concentrate`: of few tokens (decodes) what a rank pays for is reading the experts that it must compute, whatever
their tokens. So each expert is computed by one of its copies, chosen so that no rank reads many (METRO, arXiv
2512.09277). It depends on which experts the step has, so all ranks must know the step's loads.
"""

# Shapes: B steps, R ranks, P source ranks (the same ones), E experts.

from __future__ import annotations

import numpy as np

SWEEPS = 5
_FULL = np.int32(1 << 30)


def spread(held_RE: np.ndarray, nodes: int) -> np.ndarray:
    """To which rank the tokens of each source rank go, (P, E).

    Every copy serves as many source ranks as the others, give or take one: its own rank first, then those of its
    node, then any. Which copies serve one more rotates with the expert's number.
    """
    ranks = len(held_RE)
    target_PE = np.broadcast_to(held_RE.argmax(0), held_RE.shape).copy()
    node_R = np.arange(ranks) * nodes // ranks
    for e in np.flatnonzero(held_RE.sum(0) > 1):
        copies = np.flatnonzero(held_RE[:, e])
        c = len(copies)
        left = [ranks // c + ((i + e) % c < ranks % c) for i in range(c)]
        waiting = list(range(ranks))
        same_rank, same_node = copies == np.arange(ranks)[:, None], node_R[copies] == node_R[:, None]
        for near in (same_rank, same_node, np.ones_like(same_node)):
            rest = []
            for p in waiting:
                open_ = [i for i in range(c) if near[p, i] and left[i]]
                if open_:
                    # The emptiest takes the next one, so that the copies of a node share its ranks.
                    i = max(open_, key=lambda i: left[i])
                    left[i] -= 1
                    target_PE[p, e] = copies[i]
                else:
                    rest.append(p)
            waiting = rest
    return target_PE


def concentrate(loads_BE: np.ndarray, held: np.ndarray) -> np.ndarray:
    """On which rank each expert is computed, (B, E); -1 where it has no token.

    Experts with one copy are given. The others go, those with the fewest copies first, to the rank that reads the
    fewest. Then each is moved to one that reads no more than where it is would without it, SWEEPS - 1 times: moves
    that change nothing yet carry what is too much on one rank along to one with room.

    Args:
        held: which rank holds which expert, (R, E), or for each step another one, (B, R, E).
    """
    active_BE = np.asarray(loads_BE) > 0
    held_BRE = held if held.ndim == 3 else held[None]
    copies_E = held_BRE.sum(1).max(0)
    given_E = copies_E == 1
    rank_BE = np.where(active_BE, held_BRE.argmax(1), -1)
    reads_BRG = held_BRE[:, :, given_E].astype(np.float32) @ active_BE[:, given_E, None].astype(np.float32)
    read_BR = reads_BRG[..., 0].astype(np.int32)
    steps = np.arange(len(active_BE))
    order = [(e, np.flatnonzero(held_BRE[:, :, e].any(0))) for e in np.argsort(copies_E, kind="stable")]
    for sweep in range(SWEEPS):
        for e, holders in order:
            if copies_E[e] < 2:
                continue
            active_B = active_BE[:, e]
            there_BC = np.where(held_BRE[:, holders, e], 2 * read_BR[:, holders], _FULL)
            if sweep:
                # Taken out, it counts one less where it is; a half more sends it elsewhere on a tie.
                there_BC -= holders == rank_BE[:, e, None]
                read_BR[steps, rank_BE[:, e]] -= active_B
            pick_B = holders[there_BC.argmin(1)]
            read_BR[steps, pick_B] += active_B
            rank_BE[:, e] = np.where(active_B, pick_B, -1)
    return rank_BE
