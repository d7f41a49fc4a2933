"""One model on several ranks: the first leads, and all compute every step together, those without tokens too.

R rows that want logits, V vocabulary, L MoE layers, T tokens of a lane, K choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..models.gpt import GPT
from ..moe.gathered import Turn
from ..parallel.collectives import all_reduce_sum
from .moving import Movers, unpack_pieces, unpack_slots
from .paged import KVPool, PagedCache
from .step import Step
from .wire import Kind, Order, Part, decode, encode, encode_numbers

_FIRST = 2048  # numbers that are sent whatever a message's length: most steps need no second one


class RankLost(RuntimeError):
    """A rank has failed or does not answer: nothing can be computed any more."""


class Passed(NamedTuple):
    """What a pass gave the first rank."""

    logits_RV: Tensor
    """Of the rows that were asked for, in their order."""
    routes: tuple[Tensor, ...]
    """Per MoE layer the experts of the step's tokens, (T, K); () where they were not wanted."""


class Fleet:
    """This rank among those that serve one model. A lane is the tp ranks that hold the same sequences.

    What the first rank says is numbers (`wire`); what comes back is logits and, where wanted, experts of tokens.

    Attributes:
        rank, world: this one, of so many.
        tp, lanes, lane: ranks of a lane, how many lanes there are, and which one this rank is of.
        movers: where experts are.
    """

    def __init__(self, model: GPT, turn: Turn, movers: Movers, *, tp: int) -> None:
        self.movers = movers
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.tp, self.lanes, self.lane = tp, self.world // tp, self.rank // tp
        self.model, self.turn = model.eval(), turn
        self.device = model.embed.weight.device
        self._cache: PagedCache | None = None

    def agree(self, blocks: int) -> int:
        """The fewest blocks that any rank has room for. Every rank must ask."""
        least = torch.tensor(blocks)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return int(least)

    def use(self, pool: KVPool) -> None:
        """Keeps keys and values of this rank's heads there."""
        self._cache = PagedCache(pool)

    @torch.inference_mode()
    def lead(self, step: Step, rows: Sequence[int], routes: bool) -> Passed:
        """Computes a step on all ranks; the first one calls this. Without `parts` every lane computes the same.

        Args:
            step: its slices hold one token at least.
            rows: tokens, counted through all slices, whose logits are wanted.
            routes: whether the experts of all tokens are wanted.

        Raises:
            RankLost: another rank has failed.
        """
        parts, places = self._parts(step, rows)
        order = Order(Kind.STEP, routes, tuple(p.tokens for p in parts), tuple(len(p.rows) for p in parts), parts[0])
        try:
            self._tell(encode(Kind.STEP, parts, routes))
            logits_RV, own = self._compute(order)
            passed = self._collect(order, logits_RV, own)
        except RuntimeError as error:
            raise RankLost(f"a rank is lost: {error}") from error
        logits_RV = passed.logits_RV
        if places != list(range(len(rows))):
            logits_RV = logits_RV[torch.tensor(places, device=self.device)]
        if not step.parts:
            routes_L = tuple(ids_TK[: step.tokens] for ids_TK in passed.routes)
            return Passed(logits_RV, routes_L)
        return Passed(logits_RV, passed.routes)

    def _parts(self, step: Step, rows: Sequence[int]) -> tuple[list[Part], list[int]]:
        """Each lane's part, and where each row's logits come among those of all lanes."""
        if not step.parts:
            same = Part(step.copies, step.slices, tuple(rows))
            return [same, *[same._replace(rows=())] * (self.lanes - 1)], list(range(len(rows)))
        ends, total = [], 0
        for part in step.parts:
            ends.append(total := total + part.tokens)
        own: list[list[int]] = [[] for _ in step.parts]
        at: list[tuple[int, int]] = []
        for row in rows:
            lane = next(i for i, end in enumerate(ends) if row < end)
            at.append((lane, len(own[lane])))
            own[lane].append(row - (ends[lane] - step.parts[lane].tokens))
        before = [sum(len(rows) for rows in own[:lane]) for lane in range(len(own))]
        parts = [Part(part.copies, part.slices, tuple(mine)) for part, mine in zip(step.parts, own, strict=True)]
        return parts, [before[lane] + place for lane, place in at]

    def follow(self) -> None:
        """Computes what the first rank says, until it says that all is over.

        Raises:
            RankLost: another rank has failed.
        """
        while True:
            try:
                order = decode(self._hear(), self.lane)
                if order.kind is Kind.END:
                    return
                if order.kind is Kind.STEP:
                    self._answer(order)
                else:
                    self._rest(order.kind, order.numbers)
            except RuntimeError as error:
                raise RankLost(f"a rank is lost: {error}") from error

    @torch.inference_mode()
    def _answer(self, order: Order) -> None:
        logits_RV, routes = self._compute(order)
        if self.rank % self.tp == 0:
            if order.rows[self.lane]:
                dist.send(logits_RV.contiguous(), 0)
            if order.routes and order.part.tokens and routes:
                dist.send(torch.stack(routes).short(), 0)

    def say(self, kind: Kind, numbers: Sequence[int] = ()) -> None:
        """Has all ranks do what is no step: answer a pulse, send pieces of experts, put them in place, or end.

        Raises:
            RankLost: another rank has failed.
        """
        try:
            self._tell(encode_numbers(kind, numbers))
            self._rest(kind, numbers)
        except RuntimeError as error:
            raise RankLost(f"a rank is lost: {error}") from error

    @torch.inference_mode()
    def _rest(self, kind: Kind, numbers: Sequence[int]) -> None:
        if kind is Kind.PULSE:
            all_reduce_sum(torch.ones(()))
        elif kind is Kind.MOVE:
            some = unpack_pieces(numbers)
            self.movers.move(some[0].layer, some)
        elif kind is Kind.PLACE:
            self.movers.place(*unpack_slots(numbers))

    def _tell(self, message: Tensor) -> None:
        first = torch.zeros(_FIRST, dtype=torch.int64)
        first[0], some = len(message), message[: _FIRST - 1]
        first[1 : 1 + len(some)] = some
        dist.broadcast(first, 0)
        if len(message) > len(some):
            dist.broadcast(message[len(some) :].clone(), 0)

    def _hear(self) -> Tensor:
        first = torch.empty(_FIRST, dtype=torch.int64)
        dist.broadcast(first, 0)
        length = int(first[0])
        if length < _FIRST:
            return first[1 : 1 + length]
        rest = torch.empty(length - _FIRST + 1, dtype=torch.int64)
        dist.broadcast(rest, 0)
        return torch.cat([first[1:], rest])

    def _compute(self, order: Order) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits of this lane's rows (R, V), and per MoE layer its tokens' experts (T, K)."""
        assert self._cache is not None
        part = order.part
        self.turn.begin(order.tokens)
        self._cache.pool.copy(part.copies)
        tokens_1T, positions_1T = self._cache.begin(part.slices) if part.slices else self._cache.idle()
        rows_R = torch.tensor(part.rows, dtype=torch.int64, device=self.device)
        out = self.model(tokens_1T, positions_1T, cache=self._cache, rows_R=rows_R)
        assert out.logits_BSV is not None
        return out.logits_BSV[0], out.routes

    def _collect(self, order: Order, logits_RV: Tensor, routes: tuple[Tensor, ...]) -> Passed:
        """What all lanes found, in the order of lanes."""
        found, told = [logits_RV], [torch.stack(routes)] if order.routes and routes else []
        for lane in range(1, self.lanes):
            if order.rows[lane]:
                found.append(logits_RV.new_empty(order.rows[lane], logits_RV.shape[1]))
                dist.recv(found[-1], lane * self.tp)
            if told and order.tokens[lane]:
                ids_LTK = told[0].new_empty(len(routes), order.tokens[lane], told[0].shape[2], dtype=torch.int16)
                dist.recv(ids_LTK, lane * self.tp)
                told.append(ids_LTK.long())
        return Passed(torch.cat(found), torch.cat(told, 1).unbind() if told else ())
