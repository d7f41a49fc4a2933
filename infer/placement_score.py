"""What a placement costs on recorded routes: the three objectives, each for every step or token. No torch.

prefill     sum over steps and layers of the most loaded rank's tokens, copies sharing evenly
decode      sum over steps and layers of the most experts that a rank computes, one copy of each computing
crossings   nodes that a token is sent to, by layer; its bytes are crossings x the model's width x bytes of a number
"""

# Shapes: S steps, L layers, R = P ranks, E experts, T sampled tokens, K choices, N nodes.

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .placement import Placement
from .replicas import concentrate, spread
from .routes import Routes


@dataclass(frozen=True)
class Aim:
    """What a step is taken to cost.

    Attributes:
        tokens: of the fullest rank's tokens, as a share of the mean's.
        activated: of the most experts computed on a rank, as a share of the mean.
        crossings: of the share of pairs of a token's choices whose experts lie on two nodes.
        follow: tokens go on at the node of their first choice, so nodes are named to suit that.
    """

    tokens: float = 1.0
    activated: float = 0.0
    crossings: float = 0.25
    follow: bool = False


PREFILL = Aim()
DECODE = Aim(tokens=0.0, activated=1.0)


@dataclass(frozen=True)
class Score:
    """Sums over all steps and layers, and means that do not depend on how many there were."""

    prefill: float
    decode: float
    imbalance: float
    """Mean over steps and layers of the most loaded rank's tokens over the mean rank's; 1 is balance."""
    activated: float
    """Mean over steps and layers of the most experts that a rank computes."""
    crossings: float
    """Nodes that a sampled token is sent to from its home in a layer, on average; its answers come back that way."""
    following: float
    """The same where a token goes on at the node of its first choice (ExFlow, arXiv 2401.08383): half of the
    crossings to the experts and of the answers' to that node."""


def score(placement: Placement, routes: Routes) -> Score:
    """Of all steps. A layer without tokens in a step counts neither there nor in the means.

    Raises:
        ValueError: the routes are of other layers.
    """
    if placement.experts != routes.experts:
        raise ValueError(f"a placement of {placement.experts} experts is not one for routes of {routes.experts}")
    tokens, even, activated, busy = [], [], [], []
    targets = []
    for layer, held_RE in enumerate(placement.held_LRE):
        loads_SE = routes.loads_SLE[:, layer]
        tokens_SR = rank_tokens(loads_SE, held_RE)
        tokens.append(tokens_SR.max(1))
        even.append(tokens_SR.mean(1))
        activated.append(rank_activated(loads_SE, held_RE).max(1))
        busy.append(loads_SE.any(1))
        targets.append(spread(held_RE, placement.nodes))
    most, mean, read, some = (np.stack(values) for values in (tokens, even, activated, busy))
    where = (routes.sampled_LTK, np.stack(targets), placement.nodes)
    count = max(1, some.sum())
    return Score(
        float(most.sum()),
        float(read.sum()),
        float((most[some] / mean[some]).sum() / count),
        float(read.sum() / count),
        crossings(*where),
        crossings(*where, follow=True),
    )


def costs(placement: Placement, routes: Routes, aim: Aim) -> np.ndarray:
    """What an aim takes each layer (L,) to cost in a recorded step on average: the sum of its three parts."""
    out_L = np.zeros(len(routes.experts))
    for layer, held_RE in enumerate(placement.held_LRE):
        loads_SE = routes.loads_SLE[:, layer]
        loads_SE = loads_SE[loads_SE.any(1)]
        for weight, rank_work in ((aim.tokens, rank_tokens), (aim.activated, rank_activated)):
            if weight and len(loads_SE):
                work_SR = rank_work(loads_SE, held_RE)
                out_L[layer] += weight * (work_SR.max(1) / work_SR.mean(1)).mean()
        if aim.crossings and placement.nodes > 1:
            out_L[layer] += aim.crossings * _apart(held_RE, routes.pairs_LEE[layer], placement.nodes)
    return out_L


def _apart(held_RE: np.ndarray, pairs_EE: np.ndarray, nodes: int) -> float:
    """The share of pairs of choices on two nodes, each copy of an expert counting alike."""
    on_NE = held_RE.reshape(nodes, -1, held_RE.shape[1]).sum(1) / held_RE.sum(0).clip(1)
    return float(1 - ((on_NE @ pairs_EE) * on_NE).sum() / max(1, pairs_EE.sum()))


def rank_tokens(loads_SE: np.ndarray, copies_RE: np.ndarray) -> np.ndarray:
    """Tokens (S, R) of each rank when every copy of an expert gets an equal share."""
    return loads_SE.astype(np.float64) @ (copies_RE / copies_RE.sum(0).clip(1)).T


def rank_activated(loads_SE: np.ndarray, held_RE: np.ndarray) -> np.ndarray:
    """Experts (S, R) that each rank computes when one copy of each does."""
    rank_SE = concentrate(loads_SE, held_RE)
    S, R = len(rank_SE), len(held_RE)
    codes = (rank_SE + np.arange(S)[:, None] * R)[rank_SE >= 0]
    return np.bincount(codes, minlength=S * R).reshape(S, R)


def crossings(sampled_LTK: np.ndarray, targets_LPE: np.ndarray, nodes: int, follow: bool = False) -> float:
    """Mean nodes crossed to, for a token and layer: from where it is to the nodes of its choices, a node counting
    once, and back from them; half of the sum. Token t lives on rank t % P.

    Args:
        sampled_LTK: choices, -1 for none.
        targets_LPE: to which rank each rank's tokens go.
        nodes: over which the ranks are divided.
        follow: the answers do not go home, but to the node of the first choice, where the token goes on.
    """
    L, T, _ = sampled_LTK.shape
    P = targets_LPE.shape[1]
    rank_T, places, total = np.arange(T) % P, np.arange(T), 0
    for ids_TK, target_PE in zip(sampled_LTK, targets_LPE, strict=True):
        node_TK = np.where(ids_TK < 0, nodes, target_PE[rank_T[:, None], ids_TK] * nodes // P)
        hit_TN = np.zeros((T, nodes + 1), bool)
        np.put_along_axis(hit_TN, node_TK, True, 1)
        hit_TN[:, nodes] = False
        here_T = there_T = rank_T * nodes // P
        if follow:
            there_T = np.where(ids_TK[:, 0] < 0, here_T, node_TK[:, 0])
            rank_T = there_T * (P // nodes) + rank_T % (P // nodes)
        total += 2 * hit_TN.sum() - hit_TN[places, here_T].sum() - hit_TN[places, there_T].sum()
    return float(total / max(1, 2 * L * T))
