"""Which rank should hold which expert, looked at anew while a model is served: the first rank plans, and all move.

A plan is made from the loads of the last steps, on a thread of its own. It is followed where it should win more time
over as many steps as it was made from than the move takes. Experts then travel in slices between steps, so short that
no step waits long, layer by layer.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from .fleet import Fleet
from .moving import pack_pieces, pack_slots
from .placement import Cluster, Placement, moved
from .placement_plan import plan
from .placement_score import PREFILL, Aim, costs
from .rearrange import Piece
from .routes import Recorder, Routes
from .wire import Kind

TURN = 1 << 16
"""Bytes of experts that a rank gets at once; several turns where they take less than SHARE of a step."""
SHARE = 0.1
LEAST = 0.03
"""Of what a step's experts cost: a plan that wins less is not followed."""
EXPERTS = 0.5
"""Of a step's time that its experts take, as far as a plan's gain is concerned."""
FIRST_RATE = 2e8
"""Bytes a second of a rank, for what a move takes, until one was timed."""
log = logging.getLogger("coterie")


class Replanner:
    """Sees every step on the first rank, and does something between steps.

    Attributes:
        plans, moves: plans that were followed, and experts that ranks were sent, since the start.
    """

    def __init__(self, fleet: Fleet, experts: Sequence[int], top_k: int, *, every: int, most: int) -> None:
        """Raises ValueError: the layers' experts are not all over the same ranks.

        Args:
            experts: of each MoE layer.
            every: steps from which a plan is made.
            most: bytes of experts that a rank gets between two steps.
        """
        shares = {None if slots is None else len(slots) for slots in fleet.movers.slots}
        if len(shares) != 1 or None in shares or shares == {1}:
            raise ValueError("experts can move where every MoE layer has them on the same ranks: give ep over 1")
        self.fleet, self.every, self.most, self.top_k = fleet, every, most, top_k
        self.recorder = Recorder(experts, top_k, sampled=0, memory=1 << 26)
        self.plans = self.moves = 0
        self._steps, self._seconds, self._rate = 0, 0.0, 0.0
        self._queue: deque[tuple[Kind, list[Piece] | list[int]]] = deque()
        self._thread = ThreadPoolExecutor(1)
        self._plan: Future[list[tuple[int, np.ndarray]]] | None = None

    def seen(self, loads: Sequence[Sequence[int]], prompts: int, seconds: float) -> None:
        """One step: per layer the tokens of each expert, tokens of prompts, and how long it took."""
        self.recorder.add(loads, None, prompts)
        self._steps += 1
        self._seconds += seconds

    def tick(self) -> None:
        """What is due between two steps. Raises what `Fleet.say` does."""
        if self._queue:
            self._advance()
        elif self._plan is not None:
            if self._plan.done():
                planned, self._plan = self._plan, None
                try:
                    self.follow(planned.result())
                except Exception:  # where experts lie is never worth an answer
                    log.exception("no plan of where experts should lie could be made")
        elif self._steps >= self.every:
            window = self.recorder.routes(), self._seconds / self._steps * self.every
            self.recorder.clear()
            self._steps, self._seconds = 0, 0.0
            self._plan = self._thread.submit(self._decide, *window)

    @property
    def moving(self) -> bool:
        """Whether experts are on their way."""
        return bool(self._queue)

    def _decide(self, routes: Routes, seconds: float) -> list[tuple[int, np.ndarray]]:
        """Layers and the experts that their shares should hold; none where it does not pay.

        Args:
            seconds: of as many steps.
        """
        tokens = routes.loads_SLE[:, 0].sum(dtype=np.int64) / self.top_k
        prompts = min(1.0, float(routes.prompts_S.sum() / max(1, tokens)))
        aim = replace(PREFILL, tokens=prompts, activated=1 - prompts)
        before = after = taken = 0.0
        changes = []
        for which in self._alike():
            some = routes.layers(which)
            now, wanted = self._planned(some, which, aim)
            before, after = before + costs(now, some, aim).sum(), after + costs(wanted, some, aim).sum()
            fetched_L = moved(now, wanted)
            taken += sum(int(n) * self.fleet.movers.bytes(layer) for n, layer in zip(fetched_L, which, strict=True))
            changes += [(layer, wanted.slots_LRC[i]) for i, layer in enumerate(which) if fetched_L[i]]
        gain = 1 - after / before
        wins = gain * EXPERTS * seconds
        if not changes or gain < LEAST or wins < taken / (self._rate or FIRST_RATE):
            return []
        log.info(f"experts of {len(changes)} layers move: steps should cost {gain:.1%} less in experts")
        return changes

    def _alike(self) -> Iterable[list[int]]:
        """Layers with the same number of slots together."""
        groups: dict[int, list[int]] = {}
        for layer, slots_PC in enumerate(self.fleet.movers.slots):
            assert slots_PC is not None
            groups.setdefault(slots_PC.shape[1], []).append(layer)
        return groups.values()

    def _planned(self, routes: Routes, which: Sequence[int], aim: Aim) -> tuple[Placement, Placement]:
        movers = self.fleet.movers
        slots_LPC = np.stack([movers.slots[layer] for layer in which])  # type: ignore[arg-type]
        nodes, (_, shares, slots) = movers.nodes, slots_LPC.shape
        now = Placement(slots_LPC, routes.experts, nodes)
        return now, plan(routes, Cluster(nodes, shares // nodes, slots), aim, present=now)

    def follow(self, changes: Sequence[tuple[int, np.ndarray]]) -> None:
        """Queues what brings experts to where these layers' shares should hold them, (P, C) each."""
        movers = self.fleet.movers
        for layer, wanted_PC in changes:
            turns, slots_PC = movers.plan(layer, wanted_PC, min(TURN, self.most))
            self._queue.extend((Kind.MOVE, turn) for turn in turns)
            self._queue.append((Kind.PLACE, pack_slots(layer, slots_PC)))
            now_PC = movers.slots[layer]
            assert now_PC is not None
            self.moves += int((slots_PC != now_PC)[slots_PC >= 0].sum())
        self.plans += bool(changes)

    def _advance(self) -> None:
        """Sends what fits between two steps."""
        kind, numbers = self._queue.popleft()
        if kind is Kind.PLACE:
            self.fleet.say(kind, numbers)  # type: ignore[arg-type]
            return
        pieces: list[Piece] = list(numbers)  # type: ignore[arg-type]
        step = self._seconds / max(1, self._steps)
        turns = int(min(self.most, self._rate * SHARE * step) / TURN)
        while turns > 1 and self._queue[0][0] is Kind.MOVE:
            pieces += self._queue.popleft()[1]  # type: ignore[operator]
            turns -= 1
        begin = time.perf_counter()
        self.fleet.say(kind, pack_pieces(pieces))
        self.fleet.say(Kind.PULSE)  # all have got it
        width = self.fleet.model.embed.weight.element_size()
        sent = max(np.bincount([p.fetch.share for p in pieces], [(p.end - p.begin) * width for p in pieces]))
        rate = sent / (time.perf_counter() - begin)
        self._rate = min(rate, self._rate + 0.2 * (rate - self._rate)) if self._rate else rate
