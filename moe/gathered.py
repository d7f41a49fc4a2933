"""Experts on several ranks for the few tokens of an inference step: every rank gets all tokens, computes those of its
own experts, and the answers are summed at home. No counts travel and no size is read: all ranks know who brings what.
"""

# Shapes: T tokens of this rank, M the most that a rank brings, A tokens of all, D model, K choices, E experts,
# P shares of them, C slots of each.

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..parallel.collectives import all_reduce_sum
from ..parallel.exchange_replicas import shared
from ..parallel.tensor import all_gather_single, reduce_scatter_single
from .dispatch import Dispatch, Finish, RunExperts
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
    """Which experts the ranks of a group hold: `shares` of them, each with a number of slots, and each on `etp`
    neighbours that hold slices of the experts there.

    Attributes:
        group, etp: as given.
        shares, share: how many there are, and which is this rank's.
        slots: places for an expert in each share.
        even: experts of a share at first, when each has a run of them.
    """

    def __init__(self, group: dist.ProcessGroup, experts: int, etp: int = 1, *, slots: int = 0) -> None:
        """slots: 0: as many as an even share needs, which is where experts lie at first."""
        self.group, self.etp, self.shares = group, etp, group.size() // etp
        if group.size() % etp or experts % self.shares:
            raise ValueError(f"{experts} experts in {etp} slices do not spread evenly over {group.size()} ranks")
        self.even = even = experts // self.shares
        self.share, self.slots = group.rank() // etp, max(slots, even)
        every_PC = torch.arange(experts).view(self.shares, even)
        self.place(
            F.pad(every_PC, (0, self.slots - even), value=-1), torch.arange(experts).expand(self.shares, -1) // even
        )

    def place(self, slots_PC: Tensor, target_PE: Tensor) -> None:
        """Takes a placement: the expert in each slot of each share (-1: none), and which share computes an expert for
        tokens of each. All ranks of the group must take the same at the same step."""
        shares, experts = target_PE.shape
        slot_PE = torch.full((shares, experts + 1), -1)
        for share, slots_C in enumerate(slots_PC.tolist()):
            for slot, expert in enumerate(slots_C):
                if expert >= 0:
                    slot_PE[share, expert] = slot
        where_PE = slot_PE.gather(0, target_PE)
        if int(where_PE.min()) < 0:
            raise ValueError("a share is to compute an expert that it does not hold")
        none_P1 = torch.full((shares, 1), -1)
        # An id of -1 is the column behind the last expert.
        self._local_PE = torch.cat([where_PE.where(target_PE == self.share, -1), none_P1], 1)
        self._slot_E = torch.cat([target_PE * self.slots + where_PE, none_P1], 1)[self.share]

    def local(self, ids_AK: Tensor, shares_A: Tensor) -> Tensor:
        """This rank's slots for tokens of these shares; -1 for experts that others compute, and for none."""
        return self._local_PE.to(ids_AK.device)[shares_A[:, None], ids_AK]

    def slot(self, ids_TK: Tensor) -> Tensor:
        """The slots of all shares, counted on, that compute this rank's tokens; -1 for none."""
        return self._slot_E.to(ids_TK.device)[ids_TK]


class Placed:
    """A dispatch to slots, for experts that lie anywhere: every share of its group has `own.slots`."""

    def __init__(self, dispatch: Dispatch, own: Own) -> None:
        self.dispatch, self.own = dispatch, own

    def start(self, x_TD: Tensor, routing: Routing) -> Finish:
        """Sends the rows on their way."""
        return self.dispatch.start(x_TD, routing._replace(ids_TK=self.own.slot(routing.ids_TK)))

    def rows(self, routing: Routing) -> Tensor:
        """Rows that experts compute for these tokens."""
        return routing.stats.rows


class Summed:
    """For tokens that all ranks of the group hold: one sum a layer."""

    def __init__(self, own: Own) -> None:
        self.own = own

    def start(self, x_TD: Tensor, routing: Routing) -> Finish:
        """Nothing travels before the experts."""
        shares_T = torch.arange(len(x_TD), device=x_TD.device) % self.own.shares  # copies of an expert take turns
        ids_TK = self.own.local(routing.ids_TK, shares_T)
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
            shares_A = torch.arange(len(x_AD), device=x_AD.device) // (most * self.own.etp)
            y_AD = experts(x_AD, self.own.local(ids_AK, shares_A), weights_AK, own=True)
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
