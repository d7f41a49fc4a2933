"""How rows reach the experts of other ranks and their answers come back: flat, or node by node. Differentiable.

Every exchange delivers the same rows in the same order, so that all give the same bits: rows leave in the order
(rank, expert, t * K + k) and arrive in the order (source rank, expert, t * K + k).
"""

# Shapes: T tokens, K choices, C chunks, P = N * G ranks, N nodes of G ranks, L experts of one rank and chunk,
# R rows sent, Q rows received, D model.

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .all_to_all import Land, Lane, Network
from .traffic import Traffic

Carry = Callable[[Tensor], Land]


class Trip(NamedTuple):
    """One way from this rank's rows to the experts and back, with all sizes known."""

    leaving: int
    """R, rows that this rank sends."""
    counts_PL: Tensor
    """Rows that arrive, by source rank and expert."""
    there: Carry
    """(R, D) rows to (Q, D)."""
    back: Carry
    """(Q, D) rows to (R, D)."""
    tokens: Carry | None = None
    """`there` for rows that are copies of tokens, where that can be had for less."""

    def send(self, x_RD: Tensor) -> Land:
        """Starts to carry tokens to their experts. The gradient comes back row by row."""
        return _fly(x_RD, self.tokens or self.there, self.back)

    def reply(self, y_QD: Tensor) -> Land:
        """Starts to carry the answers home."""
        return _fly(y_QD, self.back, self.there)


class Exchange(Protocol):
    """Carries rows between the ranks of a group. Every rank runs every collective, forward and backward, with or
    without rows."""

    traffic: Traffic

    def prepare(self, ids_TK: Tensor, slot_TK: Tensor, counts_CPL: Tensor) -> list[Trip]:
        """Tells the ranks what will come, and reads all sizes on the host at once. One trip for each chunk.

        Args:
            ids_TK: where assignments go, as (c * P + rank) * L + expert; -1: nowhere.
            slot_TK: their rows, in that order; -1: none.
            counts_CPL: rows for each of these experts.
        """
        ...

    def even(self, rows: int) -> Trip:
        """The trip of exactly `rows` rows from every rank to every rank: nothing needs telling."""
        ...


class Flat:
    """Each rank sends to each rank: P messages."""

    def __init__(self, network: Network, traffic: Traffic | None = None, overlap: bool = True) -> None:
        self.traffic = Traffic() if traffic is None else traffic
        self.lane = network.whole(self.traffic, overlap)

    def prepare(self, ids_TK: Tensor, slot_TK: Tensor, counts_CPL: Tensor) -> list[Trip]:
        coming_CPL = self.lane.swap(counts_CPL.transpose(0, 1))().transpose(0, 1)
        sizes = on_host(counts_CPL.sum(2), coming_CPL.sum(2))
        return [flat_trip(self.lane, *c) for c in zip(*sizes, coming_CPL, strict=True)]

    def even(self, rows: int) -> Trip:
        share = np.full(len(self.lane.links), rows)
        return flat_trip(self.lane, share, share, torch.from_numpy(share)[:, None])


def flat_trip(lane: Lane, leaving_P: np.ndarray, coming_P: np.ndarray, coming_PL: Tensor) -> Trip:
    """One all-to-all each way."""
    send, receive = leaving_P.tolist(), coming_P.tolist()
    there, back = (lambda x: lane.swap(x, send, receive)), (lambda y: lane.swap(y, receive, send))
    return Trip(sum(send), coming_PL, there, back)


class Hierarchical:
    """The ranks of a node exchange first, so that each then talks to the ranks of its own place on other nodes alone:
    G + N messages instead of N * G, and at most twice the bytes, of which those between nodes stay as they were
    (DeepSpeed-MoE section 5.2). Between nodes rows travel while something else is computed; within, they are waited
    for."""

    def __init__(self, network: Network, traffic: Traffic | None = None, overlap: bool = True) -> None:
        self.traffic = Traffic() if traffic is None else traffic
        self.nodes = network.grid()
        self.within, self.across = network.within(self.traffic), network.across(self.traffic, overlap)

    def prepare(self, ids_TK: Tensor, slot_TK: Tensor, counts_CPL: Tensor) -> list[Trip]:
        C, _, L = counts_CPL.shape
        own_CNGL = counts_CPL.view(C, *self.nodes, L)
        mates_GCNL = self.within.swap(own_CNGL.permute(2, 0, 1, 3))()  # what each of my node sends to my place
        coming_NGCL = self.across.swap(mates_GCNL.permute(2, 0, 1, 3))()
        coming_CNGL = coming_NGCL.permute(2, 0, 1, 3)
        sizes = on_host(own_CNGL.sum(3), mates_GCNL.sum(3).transpose(0, 1), coming_CNGL.sum(3))
        coming_CPL = coming_CNGL.reshape(C, -1, L)
        return [self._trip(*c) for c in zip(*sizes, coming_CPL, strict=True)]

    def even(self, rows: int) -> Trip:
        own_NG = np.full(self.nodes, rows)
        return self._trip(own_NG, own_NG.T, own_NG, torch.from_numpy(own_NG).reshape(-1, 1))

    def _trip(self, own_NG: np.ndarray, mates_GN: np.ndarray, coming_NG: np.ndarray, coming_PL: Tensor) -> Trip:
        inner = own_NG.sum(0).tolist(), mates_GN.sum(1).tolist()
        outer = mates_GN.sum(0).tolist(), coming_NG.sum(1).tolist()

        def there(x_RD: Tensor) -> Land:
            met = self.within.swap(turn(x_RD, own_NG), *inner)()
            return self.across.swap(turn(met, mates_GN), *outer)

        def back(y_QD: Tensor) -> Land:
            coming = self.across.swap(y_QD, *reversed(outer))
            return lambda: turn(self.within.swap(turn(coming(), mates_GN.T), *reversed(inner))(), own_NG.T)

        return Trip(int(own_NG.sum()), coming_PL, there, back)


def turn(x: Tensor, sizes_AB: np.ndarray) -> Tensor:
    """Blocks of rows in the order (a, b), of these sizes, into the order (b, a)."""
    if 1 in sizes_AB.shape:
        return x
    blocks = x.split(sizes_AB.flatten().tolist())
    return torch.cat([blocks[i] for i in np.arange(sizes_AB.size).reshape(sizes_AB.shape).T.flatten()])


def on_host(*tensors: Tensor) -> list[np.ndarray]:
    """Integers as arrays, by one read of the device."""
    numbers = torch.cat([t.flatten() for t in tensors]).cpu().numpy()
    ends = np.cumsum([t.numel() for t in tensors])
    return [part.reshape(t.shape) for part, t in zip(np.split(numbers, ends[:-1]), tensors, strict=True)]


class _Journey:
    """A departure, an arrival, and the same for the gradient: four moments, between which others may compute."""

    def __init__(self, there: Carry, back: Carry) -> None:
        self.there, self.back = there, back
        self.under_way: Land | None = None

    def take(self) -> Tensor:
        land, self.under_way = self.under_way, None
        assert land is not None
        return land()


def _fly(x: Tensor, there: Carry, back: Carry) -> Land:
    journey = _Journey(there, back)
    token = _Depart.apply(x, journey)
    return lambda: _Arrive.apply(token, journey)


class _Depart(torch.autograd.Function):
    # Its output is empty: it only ties the arrival to the departure.
    @staticmethod
    def forward(ctx: Any, x: Tensor, journey: _Journey) -> Tensor:
        ctx.journey = journey
        journey.under_way = journey.there(x.detach())
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.journey.take(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, journey: _Journey) -> Tensor:
        ctx.journey = journey
        return journey.take()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.journey.under_way = ctx.journey.back(grads[0])
        return grads[0].new_empty(0), None
