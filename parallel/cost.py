"""What an exchange sends and how long that takes: formulas without ranks, and the choice between exchanges.

A phase is one collective: a matrix of bytes from every rank to every rank. An exchange is a list of phases, and its
messages, bytes and seconds follow from them.
"""

# Shapes: T tokens of a rank, K choices, P = N * G ranks, N nodes of G ranks, E experts, L = E / P.

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .traffic import LINKS, Nodes, Sent, link

COUNT_BYTES = 8  # counts travel as int64


class Batch(NamedTuple):
    """What every rank brings to a layer."""

    tokens: int
    dim: int
    top_k: int
    experts: int
    element_bytes: int = 4


class Routed(NamedTuple):
    """What the ranks' tokens ask for; expectations need not be whole."""

    rows_PP: np.ndarray
    """Rows from rank to rank."""
    reached_PP: np.ndarray
    """Tokens of a rank that have a row on the other."""
    crossing_PN: np.ndarray
    """Tokens of a rank that have a row on the node."""


class Rate(NamedTuple):
    """One kind of link, all ranks using it at once."""

    latency: float
    """Seconds until the first message of a phase is there."""
    bandwidth: float
    """Bytes per second of one rank."""
    message: float = 0.0
    """Seconds of each message on top of that, which do not overlap."""


class Links(NamedTuple):
    """How fast one kind of collective is: within a node, and between nodes."""

    intra: Rate
    inter: Rate

    def slower(self, times: float) -> Links:
        """The links of ranks that get a core for one part in `times`."""
        return Links(*(Rate(r.latency * times, r.bandwidth / times, r.message * times) for r in self))


class Rings(NamedTuple):
    """Links of the ring collectives, where each kind has a pace of its own (gloo's: a reduce-scatter is an all-reduce
    of a copy). A message is one hop."""

    gather: Links
    scatter: Links
    total: Links
    """Of all-reduces."""


class Choice(NamedTuple):
    """The exchange to take, and the predicted seconds of each, forward and backward."""

    name: str
    predictions: dict[str, float]

    def __str__(self) -> str:
        best = sorted(self.predictions.items(), key=lambda item: item[1])
        return f"exchange {self.name} ({', '.join(f'{name} {seconds * 1e3:.3g} ms' for name, seconds in best)})"


def observe(ids: Sequence[np.ndarray], experts: int, nodes: Nodes) -> Routed:
    """Counts the choices (T, K) of every rank's tokens, -1 for none."""
    P, here = nodes.ranks, experts // nodes.ranks
    rows_PP, reached_PP = np.zeros((P, P), int), np.zeros((P, P), int)
    crossing_PN = np.zeros((P, nodes.nodes), int)
    for p, ids_TK in enumerate(ids):
        hits_TP = np.stack([((ids_TK // here) == q).sum(1) for q in range(P)], 1)
        rows_PP[p], reached_PP[p] = hits_TP.sum(0), (hits_TP > 0).sum(0)
        crossing_PN[p] = (hits_TP.reshape(-1, *nodes).sum(2) > 0).sum(0)
    return Routed(rows_PP, reached_PP, crossing_PN)


def expect(batch: Batch, nodes: Nodes) -> Routed:
    """The mean over even routing: every token takes K distinct experts, all alike."""
    tokens, P, N = batch.tokens, nodes.ranks, nodes.nodes
    rows = tokens * batch.top_k / P
    reached = tokens * _touched(batch, batch.experts // P)
    crossing = tokens * _touched(batch, batch.experts // N)
    return Routed(np.full((P, P), rows), np.full((P, P), reached), np.full((P, N), crossing))


def _touched(batch: Batch, some: int) -> float:
    """The chance that a token has a choice among `some` of the experts."""
    return 1 - math.comb(batch.experts - some, batch.top_k) / math.comb(batch.experts, batch.top_k)


def phases(name: str, routed: Routed, nodes: Nodes, batch: Batch, backward: bool = True) -> list[np.ndarray]:
    """Bytes (P, P) from rank to rank of every collective of one layer's forward pass, and of its backward pass.

    flat: counts; rows there; answers back; their gradients there; gradients of rows back.
    hierarchical: each of these twice, within the nodes and across them.
    deduplicated: flat, but tokens go across and then within.
    """
    row = batch.dim * batch.element_bytes
    try:
        told, there, back_there, back = PARTS[name](routed, nodes, batch, row)
    except KeyError:
        raise ValueError(f"exchange {name!r} is not one of {', '.join(PARTS)}") from None
    return [*told, *there, *back, *((*back_there, *back) if backward else ())]


def _flat(routed: Routed, nodes: Nodes, batch: Batch, row: int) -> tuple[list[np.ndarray], ...]:
    if nodes.ranks == 1:
        return [], [], [], []
    told = np.full((nodes.ranks, nodes.ranks), COUNT_BYTES * batch.experts // nodes.ranks)
    rows = routed.rows_PP * row
    return [told], [rows], [rows], [rows.T]


def _hierarchical(routed: Routed, nodes: Nodes, batch: Batch, row: int) -> tuple[list[np.ndarray], ...]:
    (N, G), here = nodes, batch.experts // nodes.ranks
    rows_NGNG = (routed.rows_PP * row).reshape(N, G, N, G)
    told = [
        *_within(np.full((N, G, G), COUNT_BYTES * N * here)),
        *_across(np.full((N, N, G), COUNT_BYTES * G * here)),
    ]
    there = [*_within(rows_NGNG.sum(2)), *_across(rows_NGNG.sum(1))]
    return told, there, there, [m.T for m in reversed(there)]


def _deduplicated(routed: Routed, nodes: Nodes, batch: Batch, row: int) -> tuple[list[np.ndarray], ...]:
    (N, G), here = nodes, batch.experts // nodes.ranks
    parcel = row + batch.top_k * batch.element_bytes
    told = [
        *_across(np.full((N, N, G), COUNT_BYTES * (1 + G + G * here))),
        *_within(np.full((N, G, G), COUNT_BYTES * N * (1 + here))),
    ]
    crossing_NNG = routed.crossing_PN.reshape(N, G, N).transpose(0, 2, 1) * parcel
    passed_NGG = routed.reached_PP.reshape(N, G, N, G).sum(0).transpose(1, 0, 2) * parcel
    _, rows, _, back = _flat(routed, nodes, batch, row)
    return told, [*_across(crossing_NNG), *_within(passed_NGG)], rows, back


PARTS: dict[str, Callable[[Routed, Nodes, Batch, int], tuple[list[np.ndarray], ...]]] = {
    "flat": _flat,
    "hierarchical": _hierarchical,
    "deduplicated": _deduplicated,
}


def _within(bytes_NGG: np.ndarray) -> list[np.ndarray]:
    """Between the ranks of each node; nothing where a node has one."""
    N, G, _ = bytes_NGG.shape
    whole = np.zeros((N, G, N, G), bytes_NGG.dtype)
    whole[np.arange(N), :, np.arange(N)] = bytes_NGG
    return [whole.reshape(N * G, N * G)] if G > 1 else []


def _across(bytes_NNG: np.ndarray) -> list[np.ndarray]:
    """Between the ranks of the same place on every node; nothing where there is one node."""
    N, _, G = bytes_NNG.shape
    whole = np.zeros((N, G, N, G), bytes_NNG.dtype)
    whole[:, np.arange(G), :, np.arange(G)] = bytes_NNG.transpose(2, 0, 1)
    return [whole.reshape(N * G, N * G)] if N > 1 else []


def sent(matrices: Sequence[np.ndarray], nodes: Nodes, rank: int) -> dict[str, Sent]:
    """What `Traffic` counts on a rank for these phases."""
    kinds = np.array([link(rank, other, nodes.per_node) for other in range(nodes.ranks)])
    mine = [matrix[rank] for matrix in matrices]
    return {
        kind: Sent(
            sum(int((line[kinds == kind] > 0).sum()) for line in mine),
            sum(line[kinds == kind].sum().item() for line in mine),
        )
        for kind in LINKS
    }


def seconds(
    matrices: Sequence[np.ndarray], nodes: Nodes, rates: Mapping[str, Rate], ranks: Sequence[int] | None = None
) -> float:
    """Time of phases that follow each other, each as long as its slowest rank takes: the greatest latency among its
    links, and then for each kind its messages and bytes. `ranks`: those to look at, where others are like them."""
    total = 0.0
    for matrix in matrices:
        slowest = 0.0
        for rank in range(nodes.ranks) if ranks is None else ranks:
            used = {kind: s for kind, s in sent([matrix], nodes, rank).items() if s.messages and kind in rates}
            latency = max((rates[kind].latency for kind in used), default=0.0)
            moved = (s.messages * rates[k].message + s.bytes / rates[k].bandwidth for k, s in used.items())
            slowest = max(slowest, latency + sum(moved))
        total += slowest
    return total


def ring_seconds(ranks: int, nodes: int, shard: float, links: Links, rounds: int = 1) -> float:
    """Time of an all-gather of, or a reduce-scatter to, `shard` bytes of each rank; rounds=2: an all-reduce of as
    many shards. `nodes`: that the ranks lie on.

    A ring leaves a node once; the ring's ranks of a node share their nodes' links between as many rings.
    """
    if ranks == 1:
        return 0.0
    crossing, local = nodes - 1, ranks / nodes
    hops = crossing * links.inter.message + (ranks - 1 - crossing) * links.intra.message
    moved = rounds * (ranks - 1) * shard
    slowest = moved / links.intra.bandwidth if local > 1 else 0.0
    slowest = max(slowest, moved / local / links.inter.bandwidth) if crossing else slowest
    return (links.inter if crossing else links.intra).latency + rounds * hops + slowest


def choose_exchange(
    batch: Batch,
    nodes: Nodes,
    rates: Mapping[str, Rate],
    *,
    routed: Routed | None = None,
    backward: bool = True,
    override: str | None = None,
) -> Choice:
    """Predicts every exchange for such a batch and takes the fastest; of equals the simplest.

    Args:
        rates: per kind of link; a kind that is missing costs nothing.
        routed: what the tokens ask for, where it is known; None: even routing.
        override: take this one, whatever is predicted.
    """
    ranks = [0] if routed is None else None
    routed = expect(batch, nodes) if routed is None else routed
    predictions = {n: seconds(phases(n, routed, nodes, batch, backward), nodes, rates, ranks) for n in PARTS}
    if override is not None and override not in predictions:
        raise ValueError(f"exchange {override!r} is not one of {', '.join(predictions)}")
    return Choice(override or min(predictions, key=lambda name: predictions[name]), predictions)
