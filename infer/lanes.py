"""Several schedulers as one: a lane is a group of ranks with its own keys and values, and has its own sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from .blocks import BlockPool
from .request import FinishReason, Key, Request
from .roster import Counts
from .scheduler import Scheduler
from .step import Event, Result, SchedulerConfig, Step


class Lanes:
    """What `Scheduler` is, over one pool of blocks for each lane. A request goes to the lane with the fewest tokens
    left to compute, and stays there. A step has a part for each lane; one without work has an empty part.

    Attributes:
        lanes: a scheduler for each.
    """

    def __init__(self, config: SchedulerConfig, pools: Sequence[BlockPool]) -> None:
        """Raises ValueError where a limit of sequences is too small to share."""
        count = len(pools)
        limits = {
            name: -(-getattr(config, name) // count)
            for name in ("max_sequences", "max_queued_requests", "max_queued_tokens")
        }
        self.lanes = [Scheduler(replace(config, **limits), pool) for pool in pools]
        self._flight: Step | None = None
        self._steps = 0

    @property
    def busy(self) -> bool:
        """Whether there is anything to schedule."""
        return any(lane.busy for lane in self.lanes)

    def knows(self, id: str) -> bool:
        """Whether a request is under way."""
        return any(lane.knows(id) for lane in self.lanes)

    def counts(self) -> Counts:
        """Of all lanes together."""
        return Counts(*map(sum, zip(*(lane.counts() for lane in self.lanes), strict=True)))

    def add(self, request: Request) -> list[Request]:
        """As `Scheduler.add`."""
        lane = next((one for one in self.lanes if one.knows(request.id)), None)  # it is refused there
        return (lane or min(self.lanes, key=_left)).add(request)

    def finish(self, key: Key, reason: FinishReason) -> Event | None:
        """As `Scheduler.finish`."""
        return next((event for lane in self.lanes if (event := lane.finish(key, reason))), None)

    def abort(self, id: str) -> list[Event]:
        """As `Scheduler.abort`."""
        return [event for lane in self.lanes for event in lane.abort(id)]

    def schedule(self, now: float) -> Step:
        """The next step of every lane, its `parts`, and all their slices after each other."""
        self._steps += 1
        parts = tuple(lane.schedule(now) for lane in self.lanes)
        self._flight = Step(
            self._steps,
            tuple(piece for part in parts for piece in part.slices),
            preempted=tuple(key for part in parts for key in part.preempted),
            expired=tuple(event for part in parts for event in part.expired),
            parts=parts,
        )
        return self._flight

    def commit(self, step: Step, results: Mapping[Key, Result]) -> list[Event]:
        """As `Scheduler.commit`."""
        self._land(step)
        return [
            event for lane, part in zip(self.lanes, step.parts, strict=True) for event in lane.commit(part, results)
        ]

    def rollback(self, step: Step) -> None:
        """As `Scheduler.rollback`."""
        self._land(step)
        for lane, part in zip(self.lanes, step.parts, strict=True):
            lane.rollback(part)

    def _land(self, step: Step) -> None:
        if step is not self._flight:
            raise RuntimeError(f"step {step.number} is not the one under way")
        self._flight = None


def _left(lane: Scheduler) -> int:
    """Tokens that a lane has yet to compute, as far as they are known: answers may end before their longest."""
    return sum(request.total - request.computed + request.params.max_tokens for request in lane.roster)
