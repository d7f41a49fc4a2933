"""DeepSeek's EPLB, written from its description (github.com/deepseek-ai/EPLB): the peer of the placement's benchmark.

It sees the tokens of each expert over a window. Replicas go one by one to the expert with the most tokens for each
copy; `pack` then gives the heaviest copy to the pack with the least that has room. Hierarchical, where the nodes
divide the expert groups: groups are packed to nodes, replicas made within a node, and packed to its ranks. Global
otherwise.

A rank may get two copies of one expert. Tokens of an expert are dealt to its copies in turn, as serving engines do.
"""

# Shapes: S steps, R ranks, E experts, W weights to pack.

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def eplb(tokens_E: np.ndarray, slots: int, nodes: int, ranks: int, groups: int = 1) -> np.ndarray:
    """Copies (R, E) that each rank holds of one layer's experts.

    Args:
        tokens_E: over the window.
        slots: in all, a multiple of the ranks.
        nodes, ranks: of the cluster, ranks in all.
        groups: of experts; 1 for models without.
    """
    E = len(tokens_E)
    nodes, groups = (nodes, groups) if groups % nodes == 0 else (1, 1)
    node_of_group = pack(tokens_E.reshape(groups, -1).sum(1), nodes)
    copies_RE = np.zeros((ranks, E), np.int64)
    per_node = ranks // nodes
    for node in range(nodes):
        mine = np.flatnonzero(np.repeat(node_of_group == node, E // groups))
        count, physical = np.ones(len(mine), np.int64), list(range(len(mine)))  # further copies come last
        for _ in range(slots // nodes - len(mine)):
            physical.append(int((tokens_E[mine] / count).argmax()))
            count[physical[-1]] += 1
        rank_W = pack((tokens_E[mine] / count)[physical], per_node)
        np.add.at(copies_RE, (node * per_node + rank_W, mine[physical]), 1)
    return copies_RE


def pack(weights_W: np.ndarray, packs: int) -> np.ndarray:
    """The pack (W,) of each weight; all packs get as many."""
    room = len(weights_W) // packs
    pack_W = np.zeros(len(weights_W), np.int64)
    total, used = np.zeros(packs), np.zeros(packs, np.int64)
    for w in np.argsort(-weights_W, kind="stable"):
        least = np.where(used < room, total, np.inf).argmin()
        pack_W[w] = least
        total[least] += weights_W[w]
        used[least] += 1
    return pack_W


def dealt_activated(loads_SE: np.ndarray, copies_RE: np.ndarray) -> np.ndarray:
    """Copies (S, R) that are read when an expert's tokens are dealt to its copies in turn: the first of them."""
    return np.stack([read_SE.sum(1) for read_SE in dealt(loads_SE, copies_RE)], 1)


def dealt(loads_SE: np.ndarray, copies_RE: np.ndarray) -> Iterator[np.ndarray]:
    """The same for each rank, by expert (S, E)."""
    before_RE = copies_RE.cumsum(0) - copies_RE
    for before_E, copies_E in zip(before_RE, copies_RE, strict=True):
        yield np.clip(loads_SE.astype(np.int64) - before_E, 0, copies_E)


def dealt_targets(copies_RE: np.ndarray) -> np.ndarray:
    """To which rank the tokens of each source rank go, (P, E), dealt in turn: copy p % count."""
    P, E = copies_RE.shape
    target_PE = np.zeros((P, E), np.int64)
    for e in range(E):
        holders = np.repeat(np.arange(P), copies_RE[:, e])
        target_PE[:, e] = holders[np.arange(P) % len(holders)]
    return target_PE
