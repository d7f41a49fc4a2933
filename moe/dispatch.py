"""Bringing tokens to experts and answers back: on one rank, or over an expert-parallel group."""

# Shapes: T tokens, D model, E experts, K choices, R rows sent, Q rows received, P ranks, L experts of this rank.

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels import expert_decode_triton, native
from ..kernels.permute import Plan, permute, plan_rows, plan_slots, unpermute
from ..parallel.all_to_all import Land, Network
from ..parallel.exchange import Exchange, Flat, Trip
from ..parallel.exchange_replicas import Replicas
from ..parallel.traffic import Traffic
from .experts import Chunks
from .gate import Routing

RunExperts = Callable[..., Any]
"""`Experts.forward`: (rows, plan or choices, weights) to answers, or `Chunks` of rows."""


Finish = Callable[[RunExperts], Tensor]
"""Runs the experts on what has travelled since the start, and brings the answers home: y_TD. Called once."""


class Dispatch(Protocol):
    """A layer's way to its experts and back. Every rank runs every pass, with or without tokens."""

    def start(self, x_TD: Tensor, routing: Routing) -> Finish:
        """Sends the rows on their way; compute what needs no expert before finishing."""
        ...

    def rows(self, routing: Routing) -> Tensor:
        """Rows that experts compute for these tokens, padding included."""
        ...


class LocalDispatch:
    """All experts are here: their rows are gathered and combined inside the experts' own operation."""

    def __call__(self, x_TD: Tensor, routing: Routing, experts: RunExperts) -> Tensor:
        return self.start(x_TD, routing)(experts)

    def start(self, x_TD: Tensor, routing: Routing) -> Finish:
        """Nothing travels."""
        if native.ready(x_TD) or expert_decode_triton.ready(x_TD):  # these take the choices as they are
            return lambda experts: experts(x_TD, routing.ids_TK, routing.weights_TK)
        plan = plan_rows(routing.ids_TK, routing.stats.kept_E.shape[0])
        return lambda experts: experts(x_TD, plan, routing.weights_TK)

    def rows(self, routing: Routing) -> Tensor:
        """Rows that experts compute for these tokens, padding included."""
        return routing.stats.rows


class AllToAllDispatch:
    """Experts live on the ranks of `group`, E / P consecutive ones on each; tokens travel to them and back.

    By default every row that was routed travels and nothing else: one exchange of counts, one of rows each way (as
    DeepSpeed since #8190), one read of the split sizes on the host.

    With `even_capacity` each rank sends exactly that many rows to every expert, empty ones included: no counts, no
    host read, static shapes (the layout of DeepSpeed and Tutel). Routing must then have dropped what passes it, so
    give `Gate.capacity`, which is called with the number of tokens, padding included; all ranks must get the same.

    Every rank runs every collective, with or without tokens. Weights are applied at home.

    Args:
        exchange: how rows travel (`parallel.exchange_dedup.make_exchange`); all give the same bits. None: flat.
        chunks: parts of each rank's experts whose rows travel by themselves, so that the experts of one compute
            while the next is under way; the same bits again. It must divide the experts of a rank.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_experts: int,
        even_capacity: int | Callable[[int], int | None] | None = None,
        *,
        exchange: Exchange | None = None,
        chunks: int = 1,
    ) -> None:
        self.group, self.num_experts, self.even_capacity = group, num_experts, even_capacity
        self.chunks = chunks
        self.ranks = group.size()
        if num_experts % self.ranks:
            raise ValueError(f"{num_experts} experts do not spread evenly over {self.ranks} ranks")
        if chunks < 1 or num_experts // self.ranks % chunks:
            raise ValueError(f"the {num_experts // self.ranks} experts of a rank do not divide into {chunks} chunks")
        if chunks > 1 and even_capacity is not None:
            raise ValueError(f"even splits travel in one piece: give chunks={chunks} without even_capacity")
        self.exchange = Flat(Network(group)) if exchange is None else exchange

    @property
    def traffic(self) -> Traffic:
        """What this layer's exchanges sent, and how long they held up the computation."""
        return self.exchange.traffic

    def __call__(self, x_TD: Tensor, routing: Routing, experts: RunExperts) -> Tensor:
        return self.start(x_TD, routing)(experts)

    def start(self, x_TD: Tensor, routing: Routing) -> Finish:
        """Sends the rows on their way; compute what needs no expert before finishing."""
        if self.even_capacity is not None:
            return self._start_even(x_TD, routing, self._capacity(len(x_TD)))
        if self.ranks == 1:
            return LocalDispatch().start(x_TD, routing)
        ids_TK = self._by_chunk(routing.ids_TK)
        plan = plan_rows(ids_TK, self.num_experts)
        counts_CPL = plan.counts_E.view(self.chunks, self.ranks, -1)
        trips = self.exchange.prepare(ids_TK, plan.slot_TK, counts_CPL)
        leaving = [trip.leaving for trip in trips]
        plan = plan._replace(source_R=plan.source_R[: sum(leaving)])  # empty rows stay at home
        rows_C = permute(x_TD, plan).split(leaving)
        arrivals = [trip.send(x_RD) for trip, x_RD in zip(trips, rows_C, strict=True)]

        def finish(experts: RunExperts) -> Tensor:
            if len(trips) == 1:
                x_QD = arrivals[0]()
                answers = [trips[0].reply(experts(x_QD, _experts_of(trips[0].counts_PL, len(x_QD)), None))]
            else:
                answers = _stream(trips, arrivals, experts)
            y_RD = answers[0]() if len(answers) == 1 else torch.cat([arrive() for arrive in answers])
            return unpermute(y_RD, plan, routing.weights_TK)

        return finish

    def _by_chunk(self, ids_TK: Tensor) -> Tensor:
        """Experts numbered by (chunk, rank, expert in the chunk), so that a chunk's rows lie together."""
        if self.chunks == 1:
            return ids_TK
        each = self.num_experts // self.ranks // self.chunks
        rank_TK, chunk_TK = ids_TK // (each * self.chunks), ids_TK // each % self.chunks
        return ((chunk_TK * self.ranks + rank_TK) * each + ids_TK % each).where(ids_TK >= 0, -1)

    def rows(self, routing: Routing) -> Tensor:
        """Rows that experts compute for this rank's tokens, padding included."""
        kept = routing.stats.kept_E.sum()
        if self.even_capacity is None:
            return kept
        return torch.full_like(kept, self.num_experts * self._capacity(len(routing.ids_TK)))

    def _capacity(self, tokens: int) -> int:
        capacity = self.even_capacity(tokens) if callable(self.even_capacity) else self.even_capacity
        if capacity is None:
            raise ValueError("even splits need a capacity, but the gate is dropless: set capacity_factor")
        return capacity

    def _start_even(self, x_TD: Tensor, routing: Routing, capacity: int) -> Finish:
        plan = plan_slots(routing.ids_TK, self.num_experts, capacity)
        here = self.num_experts // self.ranks
        trip = self.exchange.even(here * capacity)
        arrive = trip.send(permute(x_TD, plan))

        def finish(experts: RunExperts) -> Tensor:
            x_QD = arrive()
            rows_Q = torch.arange(len(x_QD), device=x_QD.device)
            source_Q = rows_Q.view(self.ranks, here, capacity).transpose(0, 1).flatten()
            slot_Q = rows_Q.view(here, self.ranks, capacity).transpose(0, 1).flatten()  # the inverse of source_Q
            counts_L = plan.counts_E.view(self.ranks, -1).sum(0)
            y_QD = experts(x_QD, Plan(source_Q, slot_Q[:, None], counts_L), None)
            return unpermute(trip.reply(y_QD)(), plan, routing.weights_TK)

        return finish


class Coordinated:
    """For tokens that all of `replicas` hold, as tensor-parallel ranks without sequence parallelism do: each carries
    its share of them through `dispatch`, over the ranks that have its place among the replicas, and the answers are
    gathered. O(p / L) + O(L) messages for L replicas (DeepSpeed-MoE section 5.3)."""

    def __init__(self, dispatch: Dispatch, replicas: Replicas) -> None:
        if getattr(dispatch, "even_capacity", None) is not None:
            raise ValueError("a share of the tokens has no even splits: coordinate a dispatch without even_capacity")
        self.dispatch, self.replicas = dispatch, replicas

    def __call__(self, x_TD: Tensor, routing: Routing, experts: RunExperts) -> Tensor:
        return self.start(x_TD, routing)(experts)

    def start(self, x_TD: Tensor, routing: Routing) -> Finish:
        """Sends this rank's share on its way."""
        total, take = len(x_TD), self.replicas.take
        share = routing._replace(
            ids_TK=routing.ids_TK[self.replicas.share(total)], weights_TK=take(routing.weights_TK)
        )
        finish = self.dispatch.start(take(x_TD), share)
        return lambda experts: self.replicas.gather(finish(experts), total)

    def rows(self, routing: Routing) -> Tensor:
        """Rows that experts compute for all these tokens."""
        return self.dispatch.rows(routing)


def _stream(trips: list[Trip], arrivals: list[Land], experts: RunExperts) -> list[Land]:
    """Each chunk's rows through its experts as they arrive, and the answers on their way at once. The experts are
    called once for all chunks: what wraps them, such as FSDP, gathers their weights once."""
    answers: list[Land] = []

    def chunks() -> Iterator[tuple[Tensor, Plan]]:
        for trip, arrive in zip(trips, arrivals, strict=True):
            x_QD = arrive()
            yield x_QD, plan_rows(_experts_of(trip.counts_PL, len(x_QD)), trip.counts_PL.shape[1])

    def answer(y_QD: Tensor) -> None:
        answers.append(trips[len(answers)].reply(y_QD))

    experts(Chunks(len(trips), chunks(), answer))
    return answers


def _experts_of(counts_PL: Tensor, rows: int) -> Tensor:
    """The expert (Q, 1) of each row that arrived by (rank, expert): one choice a row, so the experts gather and
    scatter them and nothing is copied."""
    ranks, experts = counts_PL.shape
    experts_PL = torch.arange(experts, device=counts_PL.device).repeat(ranks)
    return experts_PL.repeat_interleave(counts_PL.flatten(), output_size=rows)[:, None]
