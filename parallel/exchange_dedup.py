"""The deduplicated exchange: a token that goes to several experts of one node crosses to that node once."""

# Shapes: T tokens, K choices, C chunks, P = N * G ranks, N nodes of G ranks, L experts of one rank and chunk,
# R rows sent, Q rows received, U tokens that cross, V tokens that one rank gets, D model.

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .all_to_all import Land, Network
from .exchange import Carry, Exchange, Flat, Hierarchical, Trip, flat_trip, on_host
from .traffic import Traffic

WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # what a choice is written as beside a row of this width


class _Sizes(NamedTuple):
    """One chunk's tokens on this rank's ways, on the host."""

    crossing_N: np.ndarray  # mine, to each node
    crossed_N: np.ndarray  # from my place on each node
    passing_NG: np.ndarray  # of these, those that each rank of my node gets
    met_GN: np.ndarray  # what each rank of my node passes to me, by the node it came from
    rows: int  # that they become here


class Deduplicated:
    """A token crosses to a node once, to the same place there, with the list of its choices; that rank passes it to
    each rank of the node that needs it, and there it becomes its rows. Answers and all gradients travel flat, row by
    row, because their sum must keep the order of k."""

    def __init__(self, network: Network, traffic: Traffic | None = None, overlap: bool = True) -> None:
        self.traffic = Traffic() if traffic is None else traffic
        self.nodes = network.grid()
        self.place = network.group.rank() % self.nodes.per_node
        self.lane = network.whole(self.traffic, overlap)
        self.within, self.across = network.within(self.traffic), network.across(self.traffic, overlap)

    def even(self, rows: int) -> Trip:
        """Flat: with rows of static number there is nothing to leave out."""
        share = np.full(len(self.lane.links), rows)
        return flat_trip(self.lane, share, share, torch.from_numpy(share)[:, None])

    def prepare(self, ids_TK: Tensor, slot_TK: Tensor, counts_CPL: Tensor) -> list[Trip]:
        (N, G), (C, P, L) = self.nodes, counts_CPL.shape
        hit_CNGT = _reached(ids_TK // L, C * P).view(C, N, G, len(ids_TK))
        crossing_CN, passing_CNG = hit_CNGT.any(2).sum(-1), hit_CNGT.sum(-1)
        told = [crossing_CN[..., None], passing_CNG, counts_CPL.view(C, N, G * L)]
        heard = self.across.swap(torch.cat(told, -1).transpose(0, 1))().transpose(0, 1)  # (C, N, 1 + G + G * L)
        crossed_CN, passed_CNG, rows_CNGL = (
            heard[..., 0],
            heard[..., 1 : 1 + G],
            heard[..., 1 + G :].unflatten(-1, (G, L)),
        )
        told = torch.cat([passed_CNG[..., None], rows_CNGL], -1).permute(2, 0, 1, 3)  # (G, C, N, 1 + L)
        heard = self.within.swap(told)().transpose(0, 1)  # (C, G, N, 1 + L)
        coming_CPL = heard[..., 1:].transpose(1, 2).reshape(C, P, L)
        met_CGN, rows_CP = heard[..., 0], coming_CPL.sum(2)
        sizes = on_host(crossing_CN, crossed_CN, passed_CNG, met_CGN, counts_CPL.sum(2), rows_CP)
        trips, first = [], 0
        for c, (crossing_N, crossed_N, passing_NG, met_GN, leaving_P, coming_P) in enumerate(
            zip(*sizes, strict=True)
        ):
            trip = flat_trip(self.lane, leaving_P, coming_P, coming_CPL[c])
            at = _Sizes(crossing_N, crossed_N, passing_NG, met_GN, int(coming_P.sum()))
            local_TK = ids_TK - c * P * L
            trips.append(trip._replace(tokens=self._carry(local_TK, slot_TK - first, hit_CNGT[c].any(1), at, L)))
            first += trip.leaving
        return trips

    def _carry(self, local_TK: Tensor, row_TK: Tensor, crosses_NT: Tensor, at: _Sizes, L: int) -> Carry:
        """The way of one chunk's tokens. `local_TK`: choices as rank * L + expert, outside that range in others."""
        G = self.nodes.per_node

        def there(x_RD: Tensor) -> Land:
            tokens = len(local_TK)
            pair_U = _positions(crosses_NT, int(at.crossing_N.sum()))
            token_U = pair_U % max(tokens, 1)
            choice_UK = local_TK[token_U] - (pair_U // max(tokens, 1) * (G * L))[:, None]
            elsewhere_UK = (choice_UK < 0) | (choice_UK >= G * L)
            row_U = row_TK[token_U].masked_fill(elsewhere_UK, -1).amax(1)  # any copy of the token will do
            parcels = torch.cat([x_RD[row_U], _write(choice_UK.masked_fill(elsewhere_UK, -1), x_RD.dtype)], 1)
            crossing = self.across.swap(parcels, at.crossing_N.tolist(), at.crossed_N.tolist())
            return lambda: self._unpack(self._pass_on(crossing(), at, L, x_RD.shape[1]), at, L, x_RD.shape[1])

        return there

    def _pass_on(self, parcels: Tensor, at: _Sizes, L: int, dim: int) -> Tensor:
        """To each rank of the node what it needs, in the order (node, t)."""
        rank_UK = _read(parcels[:, dim:]) // L
        places = torch.arange(self.nodes.per_node, device=parcels.device)
        for_GU = (rank_UK == places[:, None, None]).any(-1)
        chosen = _positions(for_GU, int(at.passing_NG.sum())) % max(len(parcels), 1)
        return self.within.swap(parcels[chosen], at.passing_NG.sum(0).tolist(), at.met_GN.sum(1).tolist())()

    def _unpack(self, parcels: Tensor, at: _Sizes, L: int, dim: int) -> Tensor:
        """Tokens that came by (place, node, t) into rows by (source rank, expert, t * K + k)."""
        expert_VK = _read(parcels[:, dim:]) - self.place * L
        source_NG = torch.arange(self.nodes.ranks, device=parcels.device).view(self.nodes)
        met = torch.from_numpy(at.met_GN.flatten()).to(parcels.device)
        source_V = source_NG.t().flatten().repeat_interleave(met, output_size=len(parcels))
        here_VK = (expert_VK >= 0) & (expert_VK < L)
        key_VK = (source_V[:, None] * L + expert_VK).masked_fill(~here_VK, self.nodes.ranks * L)
        order_Q = key_VK.flatten().argsort(stable=True)[: at.rows]
        return parcels[:, :dim].index_select(0, order_Q // expert_VK.shape[1])


def _reached(place_TK: Tensor, places: int) -> Tensor:
    """(places, T): whether a token goes there."""
    tokens = len(place_TK)
    token_T1 = torch.arange(tokens, device=place_TK.device)[:, None]
    cell_TK = torch.where(place_TK < 0, places * tokens, place_TK * tokens + token_T1)
    hit = torch.zeros(places * tokens + 1, dtype=torch.bool, device=place_TK.device)
    return hit.index_fill_(0, cell_TK.flatten(), True)[:-1].view(places, tokens)


def _positions(mask: Tensor, count: int) -> Tensor:
    """Where a mask with `count` true values is true, row by row. On a GPU without waiting for it."""
    if not mask.is_cuda:
        return mask.flatten().nonzero()[:, 0]
    return mask.flatten().logical_not().byte().argsort(stable=True)[:count]


def _write(choice_UK: Tensor, dtype: torch.dtype) -> Tensor:
    """Whole numbers as the bits of a row's dtype; they are only ever copied."""
    return choice_UK.to(WHOLE[dtype.itemsize]).view(dtype)


def _read(columns: Tensor) -> Tensor:
    return columns.view(WHOLE[columns.element_size()]).long()


EXCHANGES = {"flat": Flat, "hierarchical": Hierarchical, "deduplicated": Deduplicated}


def make_exchange(name: str, network: Network, traffic: Traffic | None = None, overlap: bool = True) -> Exchange:
    """One of EXCHANGES by its name.

    Args:
        network: the ranks and their machines; layers share it.
        traffic: the counters; None: its own.
        overlap: rows travel while others compute; else every collective is waited for where it starts.
    """
    if name not in EXCHANGES:
        raise ValueError(f"exchange {name!r} is not one of {', '.join(EXCHANGES)}")
    return EXCHANGES[name](network, traffic, overlap)
