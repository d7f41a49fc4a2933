"""Experts on several ranks for the few tokens of an inference step: every rank gets all tokens, computes those of its
own experts, and the answers are summed at home. No counts travel and no size is read: all ranks know who brings what.
"""

# Shapes: T tokens of this rank, M the most that a rank brings, P ranks of a group, A = P * M, D model, K choices.

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..parallel.collectives import all_reduce_sum
from ..parallel.exchange_replicas import shared
from ..parallel.tensor import all_gather_single, reduce_scatter_single
from .dispatch import Finish, RunExperts
from .gate import Routing


class Turn:
    """What all ranks know of the pass under way. A lane is the `tp` ranks that hold the same tokens; each of them
    brings its share, as `parallel.exchange_replicas.Replicas` cuts it.

    Attributes:
        tp: ranks of a lane.
        lanes: tokens of each lane.
        tokens: that each rank brings to a MoE layer.
    """

    def __init__(self, tp: int = 1) -> None:
        self.tp = tp
        self.lanes: tuple[int, ...] = ()
        self.tokens: tuple[int, ...] = ()

    def begin(self, lanes: Sequence[int]) -> None:
        """Says what each lane brings to the pass that follows; every rank must say the same."""
        self.lanes = tuple(lanes)
        self.tokens = tuple(len(shared(total, self.tp, place)) for total in lanes for place in range(self.tp))


class Own:
    """Which of a layer's experts this rank of a group computes: one share of them, of which `etp` neighbours hold
    slices."""

    def __init__(self, group: dist.ProcessGroup, experts: int, etp: int = 1) -> None:
        self.group, shares = group, group.size() // etp
        if group.size() % etp or experts % shares:
            raise ValueError(f"{experts} experts in {etp} slices do not spread evenly over {group.size()} ranks")
        self.count = experts // shares
        self.first = group.rank() // etp * self.count

    def local(self, ids: Tensor) -> Tensor:
        """Experts counted from this rank's first; -1 for those of others, and for none."""
        ids = ids - self.first
        return ids.where((ids >= 0) & (ids < self.count), -1)


class Summed:
    """For tokens that all ranks of the group hold: one sum a layer."""

    def __init__(self, own: Own) -> None:
        self.own = own

    def __call__(self, x_TD: Tensor, routing: Routing, experts: RunExperts) -> Tensor:
        return self.start(x_TD, routing)(experts)

    def start(self, x_TD: Tensor, routing: Routing) -> Finish:
        """Nothing travels before the experts."""
        ids_TK = self.own.local(routing.ids_TK)
        return lambda experts: all_reduce_sum(experts(x_TD, ids_TK, routing.weights_TK, own=True), self.own.group)

    def rows(self, routing: Routing) -> Tensor:
        """Rows that experts compute for these tokens."""
        return routing.stats.rows


class Gathered:
    """For tokens that one rank of the group holds: tokens, choices and weights are gathered by one collective, and
    another sums the answers and returns each rank its own. Every rank runs both, unless none brings a token."""

    def __init__(self, own: Own, turn: Turn) -> None:
        self.own, self.turn = own, turn
        self._members = dist.get_process_group_ranks(own.group)

    def __call__(self, x_TD: Tensor, routing: Routing, experts: RunExperts) -> Tensor:
        return self.start(x_TD, routing)(experts)

    def start(self, x_TD: Tensor, routing: Routing) -> Finish:
        """Gathers; the experts compute when all is there.

        Raises:
            ValueError: this rank brings other tokens than the ranks were told.
        """
        told = [self.turn.tokens[rank] for rank in self._members]
        if told[self.own.group.rank()] != len(x_TD):
            raise ValueError(f"{len(x_TD)} tokens came to a layer, but all ranks were told {told}")
        most = max(told)
        if not most:
            return lambda experts: x_TD.clone()
        x_AD, ids_AK, weights_AK = self._gather(x_TD, routing, most)

        def finish(experts: RunExperts) -> Tensor:
            y_AD = experts(x_AD, self.own.local(ids_AK), weights_AK, own=True)
            y_MD = x_TD.new_empty(most, x_TD.shape[1])
            reduce_scatter_single(y_MD, y_AD, group=self.own.group)
            return y_MD[: len(x_TD)]

        return finish

    def _gather(self, x_TD: Tensor, routing: Routing, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """All ranks' tokens (A, D), choices (A, K) and weights; -1 where a rank brings fewer than the most."""
        # As bytes: three types travel in one message. A choice of an int64 would take twice the room of a weight.
        parts = x_TD, routing.ids_TK.int(), routing.weights_TK.float()
        rows_TW = torch.cat([part.contiguous().view(torch.uint8) for part in parts], 1)
        filled_MW = F.pad(rows_TW, (0, 0, 0, most - len(rows_TW)))
        K, ranks = routing.ids_TK.shape[1], self.own.group.size()
        filled_MW[len(rows_TW) :, -8 * K : -4 * K].view(torch.int32).fill_(-1)
        all_AW = filled_MW.new_empty(ranks * most, filled_MW.shape[1])
        all_gather_single(all_AW, filled_MW, group=self.own.group)
        x_AX, ids_AX, weights_AX = all_AW.split([all_AW.shape[1] - 8 * K, 4 * K, 4 * K], 1)
        ids_AK = ids_AX.contiguous().view(torch.int32).long()
        return x_AX.contiguous().view(x_TD.dtype), ids_AK, weights_AX.contiguous().view(torch.float32)

    def rows(self, routing: Routing) -> Tensor:
        """Rows that experts compute for this rank's tokens."""
        return routing.stats.rows
