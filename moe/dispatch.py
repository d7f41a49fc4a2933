"""Bringing tokens to experts and answers back: on one rank, or over an expert-parallel group."""

# Shapes: T tokens, D model, E experts, K choices, R rows sent, Q rows received, P ranks, L experts of this rank.

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.permute import Plan, permute, plan_rows, plan_slots, unpermute
from ..parallel.all_to_all import Network
from ..parallel.exchange import Exchange, Flat
from ..parallel.exchange_replicas import Replicas
from ..parallel.traffic import Clock, Traffic
from .gate import Routing

RunExperts = Callable[[Tensor, Plan, Tensor | None], Tensor]


Finish = Callable[[RunExperts], Tensor]
"""Runs the experts on what has travelled since the start, and brings the answers home: y_TD. Called once."""


class LocalDispatch:
    """All experts are here: their rows are gathered and combined inside the experts' own operation."""

    def __call__(self, x_TD: Tensor, routing: Routing, experts: RunExperts) -> Tensor:
        return self.start(x_TD, routing)(experts)

    def start(self, x_TD: Tensor, routing: Routing) -> Finish:
        """Nothing travels."""
        plan = plan_rows(routing.ids_TK, routing.stats.kept_E.shape[0])
        return lambda experts: experts(x_TD, plan, routing.weights_TK)

    def rows(self, routing: Routing) -> Tensor:
        """Rows that experts compute for these tokens, padding included."""
        return routing.stats.kept_E.sum()


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
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_experts: int,
        even_capacity: int | Callable[[int], int | None] | None = None,
        *,
        exchange: Exchange | None = None,
    ) -> None:
        self.group, self.num_experts, self.even_capacity = group, num_experts, even_capacity
        self.ranks = group.size()
        if num_experts % self.ranks:
            raise ValueError(f"{num_experts} experts do not spread evenly over {self.ranks} ranks")
        self.exchange = Flat(Network(group)) if exchange is None else exchange

    @property
    def traffic(self) -> Traffic:
        """What this layer's exchanges sent."""
        return self.exchange.traffic

    @property
    def clock(self) -> Clock:
        """The seconds in which they held up the computation."""
        return self.traffic.clock

    def __call__(self, x_TD: Tensor, routing: Routing, experts: RunExperts) -> Tensor:
        return self.start(x_TD, routing)(experts)

    def start(self, x_TD: Tensor, routing: Routing) -> Finish:
        """Sends the rows on their way; compute what needs no expert before finishing."""
        if self.even_capacity is not None:
            return self._start_even(x_TD, routing, self._capacity(len(x_TD)))
        if self.ranks == 1:
            return LocalDispatch().start(x_TD, routing)
        plan = plan_rows(routing.ids_TK, self.num_experts)
        (trip,) = self.exchange.prepare(routing.ids_TK, plan.slot_TK, plan.counts_E.view(1, self.ranks, -1))
        plan = plan._replace(source_R=plan.source_R[: trip.leaving])  # empty rows stay at home
        arrive = trip.send(permute(x_TD, plan))

        def finish(experts: RunExperts) -> Tensor:
            x_QD = arrive()
            y_QD = experts(x_QD, _regroup(trip.counts_PL, len(x_QD)), None)
            return unpermute(trip.reply(y_QD)(), plan, routing.weights_TK)

        return finish

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

    def __init__(self, dispatch: AllToAllDispatch, replicas: Replicas) -> None:
        if dispatch.even_capacity is not None:
            raise ValueError("a share of the tokens has no even splits: coordinate a dispatch without even_capacity")
        self.dispatch, self.replicas = dispatch, replicas

    @property
    def clock(self) -> Clock:
        """The seconds in which exchanges held up the computation."""
        return self.dispatch.clock

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


def _regroup(counts_PL: Tensor, rows: int) -> Plan:
    """Rows that arrived by (rank, expert) in the order of their experts: a plan of one choice per row, so the experts
    gather and scatter them and nothing is copied."""
    ranks, experts = counts_PL.shape
    experts_PL = torch.arange(experts, device=counts_PL.device).repeat(ranks)
    ids_Q = experts_PL.repeat_interleave(counts_PL.flatten(), output_size=rows)
    return plan_rows(ids_Q[:, None], experts)
