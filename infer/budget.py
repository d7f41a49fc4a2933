"""How many tokens a step may have, from how long steps take here: measured when the engine starts.

DeepSpeed-FastGen fixes 768 tokens. What a step costs differs by model and machine, and for a mixture of experts it
does not grow evenly: each token more also visits experts that none did before, until all are read. So steps of many
sizes are timed on the real runner, with keys and values in blocks that nobody uses yet, and a step gets the most
prompt tokens that leave every decode its next token in time. The steps that are served correct what was measured.
"""

from __future__ import annotations

import random
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .drafts import Drafter
from .step import Budget, Due, Slice, Step

LEAST = 16
"""Prompt tokens in any step, so that prompts get on however slow the machine is."""
PATIENCE = 0.5
"""Seconds that a step may take when nothing decodes: a request that comes meanwhile waits for its end."""
_SPARE = 0.5
"""Of a prompt's time: one that would take more than that hurries the step. Others come meanwhile and decode too."""
_REPEATS = 4
_RATE = 0.1  # of a step's mistake that its size takes over; half of that at half and at double its size
_DECODES = 32
_CONTEXT = 1024
_SMALL = 64  # tokens: so many are timed even when time is up, while a step takes no more than _QUICK seconds
_QUICK = 0.1


class Timed(Protocol):
    """What is measured: a `runner.Runner`."""

    pool: Any
    """Its `blocks`, and the tokens of each: `size`."""
    config: Any
    """Its `vocab_size` and `max_positions`."""

    def run(self, step: Step, *, loads: bool = False) -> Any:
        """A step; its result's `loads` are read."""
        ...


@dataclass(frozen=True)
class Point:
    """One size of step."""

    tokens: int
    seconds: float
    distinct: float
    """Experts visited, mean of the MoE layers; 0 for a model without."""


class StepTimes:
    """Seconds of a step: piecewise linear in its tokens, and linear in decoding sequences and in their context.

    Attributes:
        points: what was measured, by tokens; seconds never fall. The experts that so many tokens visit are in them.
        per_decode: seconds for a sequence's logits beyond one.
        per_key: seconds for a token of context.
        most: tokens of a step, at most.
    """

    def __init__(self, points: Sequence[Point], per_decode: float, per_key: float, most: int) -> None:
        self.points, self.per_decode, self.per_key, self.most = tuple(points), per_decode, per_key, most
        self._sizes = [point.tokens for point in points]
        self._seconds = [point.seconds for point in points]
        slope = _dearest(points)
        while self._sizes[-1] < most:  # further on every token costs as much as the dearest so far
            size = min(2 * self._sizes[-1], most)
            self._seconds.append(self._seconds[-1] + slope * (size - self._sizes[-1]))
            self._sizes.append(size)

    @classmethod
    def measure(
        cls,
        runner: Timed,
        *,
        seconds: float = 1.0,
        most: int = 8192,
        clock: Callable[[], float] = time.perf_counter,
    ) -> StepTimes:
        """Times steps of the runner, all of whose blocks are free.

        Args:
            seconds: about how long after the first passes; a step once begun is not cut short, and one of a token
                is always timed.
            most: tokens of a step, at most.
        """
        return _Measurer(runner, seconds, clock).measure(most)

    def predict(self, tokens: int, decodes: int = 0, context: int = 0) -> float:
        """Seconds of a step of so many tokens, of which `decodes` go on from texts of `context` tokens together."""
        at, share = self._place(tokens)
        low, high = self._seconds[at : at + 2] if share else [self._seconds[at]] * 2
        return low + share * (high - low) + self._rest(decodes, context)

    def _place(self, tokens: int) -> tuple[int, float]:
        """The size below `tokens`, and how far it is from there to the next."""
        sizes = self._sizes
        at = max(0, bisect_right(sizes, tokens) - 1)
        if at == len(sizes) - 1 or tokens <= sizes[0]:
            return at, 0.0
        return at, (tokens - sizes[at]) / (sizes[at + 1] - sizes[at])

    def _rest(self, decodes: int, context: int) -> float:
        return self.per_decode * max(0, decodes - 1) + self.per_key * context

    def observe(self, tokens: int, decodes: int, context: int, seconds: float) -> None:
        """Corrects the times of sizes near this one by a step that was run: a machine that was busy when it was
        measured, or is now, and all that the measured steps leave out. One odd step moves them little."""
        ratio = seconds / self.predict(tokens, decodes, context)
        at, share = self._place(tokens)
        factor = min(max(ratio, 0.5), 2.0) ** _RATE
        times = [old * factor**2.0 ** -abs(i - at - share) for i, old in enumerate(self._seconds)]
        for i in range(at + 1, len(times)):
            times[i] = max(times[i], times[i - 1])
        for i in range(at - 1, -1, -1):
            times[i] = min(times[i], times[i + 1])
        self._seconds = [min(max(one, 1e-9), 1e9) for one in times]

    def budget(self, target_s: float, limit_s: float = 0.0, *, each: int = 1) -> Budget:
        """Tokens of a step that takes `target_s` at most, or up to `limit_s` where a prompt would else be late;
        `most` at most, and LEAST more than decodes at least.

        Args:
            each: tokens of a decode, with its guesses.
        """

        def tokens(decodes: int, context: int, due: Sequence[Due] = ()) -> int:
            if not decodes:
                return min(self.most, max(LEAST, self._fits(max(target_s, PATIENCE))))
            rest = self._rest(decodes, context)
            fits = self._fits(target_s - rest)
            ready = max(0, fits - decodes * each)  # prompt tokens in target_s
            if limit_s > target_s and any(ahead * target_s > ready * left * _SPARE for ahead, left in due):
                fits = self._fits(limit_s - rest)
            return min(self.most, max(fits, decodes * each + LEAST))

        return tokens

    def _fits(self, seconds: float) -> int:
        """The most tokens that take no longer; 0 where one does."""
        at = bisect_right(self._seconds, seconds) - 1
        if at < 0:
            return 0
        if at == len(self._sizes) - 1:
            return self._sizes[at]
        low, high = self._seconds[at : at + 2]
        more = int((seconds - low) / (high - low) * (self._sizes[at + 1] - self._sizes[at]))
        return self._sizes[at] + more

    def table(self) -> list[tuple[int, float, float]]:
        """(tokens, milliseconds, distinct experts) of each size that was timed."""
        return [(p.tokens, 1e3 * p.seconds, p.distinct) for p in self.points]

    def told(self, target_s: float, budget: Budget) -> str:
        """One line for the log."""
        every = max(1, len(self.points) // 5)
        sizes = ", ".join(f"{p.tokens} tokens {_ms(p.seconds)}{_visited(p)}" for p in self.points[::every])
        return (
            f"steps of {budget(1, 0, ())} tokens beside a decode, for {_ms(target_s)} between tokens "
            f"({budget(0, 0, ())} without): {sizes}"
        )


def _dearest(points: Sequence[Point]) -> float:
    """Seconds of one token more, past the last point."""
    last = points[-1]
    if len(points) == 1:
        return last.seconds / last.tokens
    before = points[-2]
    return max(last.seconds / last.tokens, (last.seconds - before.seconds) / (last.tokens - before.tokens))


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _visited(point: Point) -> str:
    return f" ({point.distinct:.0f} experts)" if point.distinct else ""


class Followed:
    """A runner whose steps a drafter follows, as in the engine."""

    def __init__(self, runner: Timed, drafter: Drafter | None) -> None:
        self.runner, self.drafter = runner, drafter
        self.pool, self.config = runner.pool, runner.config

    def run(self, step: Step, *, loads: bool = False) -> Any:
        """See `Timed`."""
        if self.drafter is not None:
            self.drafter.follow(step)
        return self.runner.run(step, loads=loads)


class _Measurer:
    def __init__(self, runner: Timed, seconds: float, clock: Callable[[], float]) -> None:
        self.runner, self.seconds, self.clock = runner, seconds, clock
        self.started = clock()
        self.size, self.blocks = runner.pool.size, runner.pool.blocks
        self.longest = min(runner.config.max_positions, self.blocks * self.size)
        self.dice = random.Random(0)

    def measure(self, most: int) -> StepTimes:
        for tokens in (1, min(4, self.longest)):  # the first passes of all also make memory and kernels ready
            self._time(self._prompts(tokens))
        self.started = self.clock()
        points = [self._point(1)]
        size = 2
        while size <= min(most, self.blocks * self.size) and self._worth(size, points[-1].seconds):
            points.append(self._point(size, points[-1].seconds))
            size *= 2
        deepest = min(_CONTEXT, self.longest - 1, points[-1].tokens) // self.size * self.size
        rising = _rising(points)
        times = StepTimes(rising, 0.0, 0.0, most)
        count = min(_DECODES, self.blocks - deepest // self.size)
        while count > 1 and 3 * times.predict(count) > max(self._left(), _QUICK):
            count //= 2
        if count < 2:
            return times
        near, far = (self._least(self._decodes(count, depth))[0] for depth in (0, deepest))
        per_decode = max(0.0, near - times.predict(count)) / (count - 1)
        per_key = max(0.0, far - near) / (count * deepest) if deepest else 0.0
        return StepTimes(rising, per_decode, per_key, most)

    def _worth(self, size: int, last: float) -> bool:
        """Whether to time a size, after one that took `last` seconds: the smallest tell most."""
        return self._left() > 3 * last or (size <= _SMALL and last < _QUICK and self._left() > -self.seconds)

    def _left(self) -> float:
        return self.seconds - (self.clock() - self.started)

    def _point(self, tokens: int, last: float = 0.0) -> Point:
        step = self._prompts(tokens)
        seconds, loads = self._least(step)
        for _ in range(_REPEATS):
            if last and seconds > 4 * last:  # twice the tokens cannot cost so much: something else ran
                seconds = min(seconds, self._time(step)[0])
        visited = [sum(map(bool, layer)) for layer in loads]
        return Point(tokens, seconds, sum(visited) / len(visited) if visited else 0.0)

    def _least(self, step: Step) -> tuple[float, Sequence[Sequence[int]]]:
        """The quickest of a few: whatever else the machine does only adds. Once where time is short."""
        best, loads = self._time(step)
        for _ in range(_REPEATS - 1):
            if self._left() < 4 * best:
                break
            best = min(best, self._time(step)[0])
        return best, loads

    def _time(self, step: Step) -> tuple[float, Sequence[Sequence[int]]]:
        start = self.clock()
        loads = self.runner.run(step, loads=True).loads
        return self.clock() - start, loads

    def _prompts(self, tokens: int) -> Step:
        """Prompts as long as may be, of random tokens: they visit more experts than a text does."""
        slices, block, count = [], 0, 0
        while count < tokens and block < self.blocks:
            room = min(self.longest, (self.blocks - block) * self.size)
            length = min(tokens - count, room)
            blocks = tuple(range(block, block + -(-length // self.size)))
            slices.append(Slice((f"timed {block}", 0), 0, self._tokens(length), blocks, True))
            block, count = block + len(blocks), count + length
        return Step(0, tuple(slices))

    def _decodes(self, count: int, depth: int) -> Step:
        """Sequences that share what the prompts left, each with a block of its own for the next token."""
        shared = depth // self.size
        before = tuple(range(shared))
        return Step(
            0,
            tuple(
                Slice((f"timed {i}", 0), depth, self._tokens(1), (*before, shared + i), True) for i in range(count)
            ),
        )

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self.dice.randrange(self.runner.config.vocab_size) for _ in range(count))


def _rising(points: Sequence[Point]) -> tuple[Point, ...]:
    """The nearest times that never fall: neighbours that do are replaced by their mean (isotonic regression)."""
    groups: list[list[Point]] = []
    for point in points:
        groups.append([point])
        while len(groups) > 1 and _mean(groups[-2]) >= _mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    return tuple(Point(p.tokens, _mean(group), p.distinct) for group in groups for p in group)


def _mean(group: Sequence[Point]) -> float:
    return sum(point.seconds for point in group) / len(group)
