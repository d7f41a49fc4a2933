"""How many tokens a step may have, from how long steps take here: measured when the engine starts.

DeepSpeed-FastGen fixes 768 tokens. What a step costs differs by model and machine, and for a mixture of experts it
does not grow evenly: each token more also visits experts that none did before, until all are read. So steps of many
sizes are timed on the real runner, with keys and values in blocks that nobody uses yet, and a step gets the most
prompt tokens that leave every decode its next token in time.
"""

from __future__ import annotations

import random
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .step import Budget, Slice, Step

LEAST = 16
"""Prompt tokens in any step, so that prompts get on however slow the machine is."""
PATIENCE = 0.5
"""Seconds that a step may take when nothing decodes: a request that comes meanwhile waits for its end."""
_REPEATS = 3
_DECODES = 32
_CONTEXT = 1024


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


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a step: piecewise linear in its tokens, and linear in decoding sequences and in their context.

    Attributes:
        points: by tokens; their seconds never fall. The experts that so many tokens visit are in their times.
        per_decode: seconds for a sequence's logits beyond one.
        per_key: seconds for a token of context.
        most: tokens of a step, at most.
    """

    points: tuple[Point, ...]
    per_decode: float
    per_key: float
    most: int

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
            seconds: about how long; a step once begun is not cut short, and one of a token is always timed.
            most: tokens of a step, at most.
        """
        return _Measurer(runner, seconds, clock).measure(most)

    def predict(self, tokens: int, decodes: int = 0, context: int = 0) -> float:
        """Seconds of a step of so many tokens, of which `decodes` go on from texts of `context` tokens together."""
        return self._of_tokens(tokens) + self._rest(decodes, context)

    def _rest(self, decodes: int, context: int) -> float:
        return self.per_decode * max(0, decodes - 1) + self.per_key * context

    def _of_tokens(self, tokens: int) -> float:
        points = self.points
        last = bisect_right(points, tokens, key=lambda p: p.tokens)
        if last == 0:
            return points[0].seconds * tokens / points[0].tokens
        if last == len(points):  # further on every token costs as much as the dearest so far
            return points[-1].seconds + (tokens - points[-1].tokens) * self._dearest()
        low, high = points[last - 1], points[last]
        share = (tokens - low.tokens) / (high.tokens - low.tokens)
        return low.seconds + share * (high.seconds - low.seconds)

    def _dearest(self) -> float:
        last = self.points[-1]
        if len(self.points) == 1:
            return last.seconds / last.tokens
        before = self.points[-2]
        return max(last.seconds / last.tokens, (last.seconds - before.seconds) / (last.tokens - before.tokens))

    def budget(self, target_s: float) -> Budget:
        """Tokens of a step that takes `target_s` at most: LEAST more than decodes at least, and `most` at most."""
        seconds = [self._of_tokens(tokens) for tokens in range(1, self.most + 1)]
        alone = max(LEAST, bisect_right(seconds, max(target_s, PATIENCE)))

        def tokens(decodes: int, context: int) -> int:
            if not decodes:
                return alone
            fits = bisect_right(seconds, target_s - self._rest(decodes, context))
            return min(self.most, max(fits, decodes + LEAST))

        return tokens

    def table(self) -> list[tuple[int, float, float]]:
        """(tokens, milliseconds, distinct experts) of each size that was timed."""
        return [(p.tokens, 1e3 * p.seconds, p.distinct) for p in self.points]

    def told(self, target_s: float) -> str:
        """One line for the log."""
        budget = self.budget(target_s)
        sizes = ", ".join(f"{p.tokens} tokens {_ms(p.seconds)}{_visited(p)}" for p in self.points[:: self._every])
        return (
            f"steps of {budget(1, 0)} tokens beside a decode, for {_ms(target_s)} between tokens "
            f"({budget(0, 0)} without): {sizes}"
        )

    @property
    def _every(self) -> int:
        return max(1, len(self.points) // 5)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _visited(point: Point) -> str:
    return f" ({point.distinct:.0f} experts)" if point.distinct else ""


class _Measurer:
    def __init__(self, runner: Timed, seconds: float, clock: Callable[[], float]) -> None:
        self.runner, self.seconds, self.clock = runner, seconds, clock
        self.started = clock()
        self.size, self.blocks = runner.pool.size, runner.pool.blocks
        self.longest = min(runner.config.max_positions, self.blocks * self.size)
        self.dice = random.Random(0)

    def measure(self, most: int) -> StepTimes:
        self._time(self._prompts(min(4, self.longest)))  # the first pass of all also makes memory and kernels ready
        points = [self._point(1)]
        size = 2
        while size <= min(most, self.blocks * self.size) and self._left() > 3 * points[-1].seconds:
            points.append(self._point(size))
            size *= 2
        deepest = min(_CONTEXT, self.longest - 1, points[-1].tokens) // self.size * self.size
        rising = _rising(points)
        times = StepTimes(rising, 0.0, 0.0, most)
        count = min(_DECODES, self.blocks - deepest // self.size)
        if count < 2 or self._left() < 0:
            return times
        near, far = (self._least(self._decodes(count, depth))[0] for depth in (0, deepest))
        per_decode = max(0.0, near - times.predict(count)) / (count - 1)
        per_key = max(0.0, far - near) / (count * deepest) if deepest else 0.0
        return StepTimes(rising, per_decode, per_key, most)

    def _left(self) -> float:
        return self.seconds - (self.clock() - self.started)

    def _point(self, tokens: int) -> Point:
        seconds, loads = self._least(self._prompts(tokens))
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
            groups[-2] += groups.pop()
    return tuple(Point(p.tokens, _mean(group), p.distinct) for group in groups for p in group)


def _mean(group: Sequence[Point]) -> float:
    return sum(point.seconds for point in group) / len(group)
