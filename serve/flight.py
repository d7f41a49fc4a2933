"""From the engine's thread to the event loop, and back: a request's deltas, and its end when its client is gone."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..infer.outputs import Delta, Sink
from .errors import ApiError
from .security import Receive

_LATE = 5.0  # seconds after a deadline by which the engine must have said so


class ClientGone(Exception):
    """Nobody is there to answer."""


class Piece(NamedTuple):
    """One delta: of which prompt of the request, and when it came (time.monotonic)."""

    prompt: int
    delta: Delta
    now: float


class Hub:
    """Brings deltas from the engine's thread to one event loop: one wake-up for all that a step gave."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._pieces: deque[tuple[Flight, Piece]] = deque()
        self._awake = False

    def post(self, flight: Flight, piece: Piece) -> None:
        """From any thread."""
        self._pieces.append((flight, piece))
        if not self._awake:
            self._awake = True
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
                self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._awake = False  # first: what is posted from here on calls again
        while self._pieces:
            flight, piece = self._pieces.popleft()
            flight.take(piece)


@dataclass(frozen=True)
class Prompt:
    """What a request asks the engine to go on with."""

    tokens: Sequence[int]
    text: str | None = None
    """As it was sent; None: it was sent as tokens."""


class Flight:
    """One request of a client in the engine: all of its prompts and samples. On the event loop alone.

    As a context it aborts, at its end, whatever has not ended; iterated it gives lists of pieces.

    Attributes:
        id: of the request, as the client sees it.
        left: sequences that have not ended.
    """

    def __init__(self, hub: Hub, engine: Any, metrics: Any, id: str, times: tuple[float, float]) -> None:
        """times: of the request's arrival, and when it has failed; by time.monotonic."""
        self.id, self.left = id, 0
        self._hub, self._engine, self._metrics = hub, engine, metrics
        self._arrival, self._deadline = times
        self._under_way: dict[str, int] = {}  # the engine's ids and how many sequences of each have not ended
        self._pieces: list[Piece] = []
        self._wake = asyncio.Event()
        self._error: Exception | None = None
        self._watch: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def submit(self, number: int, prompt: Prompt, submit: Callable[[Sink, str], str], sequences: int) -> None:
        """Hands one prompt to the engine.

        Args:
            number: of the prompt in the request.
            prompt: its tokens.
            submit: calls the engine's `submit` with a sink and an id.
            sequences: how many will end.

        Raises:
            RequestError, QueueFull, EngineDead: the engine does not take it.
        """
        id = f"{self.id}-{number}"

        def sink(delta: Delta) -> None:
            self._hub.post(self, Piece(number, delta, time.monotonic()))

        self._under_way[id] = sequences  # before: the engine may answer at once
        self.left += sequences
        self._metrics.begin(id, len(prompt.tokens), self._arrival)

        def run() -> None:
            submit(sink, id)
            if id not in self._under_way:  # given up meanwhile
                self._engine.abort(id)

        try:
            # The engine checks every token and takes a lock: a step must not hold up the event loop.
            await asyncio.get_running_loop().run_in_executor(None, run)
        except BaseException:
            self.left -= self._under_way.pop(id, 0)
            self._metrics.forget(id)
            raise

    def watch(self, receive: Receive) -> None:
        """Looks out for the client's disconnecting, and for a deadline that the engine misses."""
        loop = asyncio.get_running_loop()
        self._watch = loop.create_task(self._gone(receive))
        late = max(0.0, self._deadline + _LATE - time.monotonic())
        self._timer = loop.call_later(late, self._fail, ApiError(504, "no answer in time", code="deadline"))

    async def _gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._fail(ClientGone())

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        self._wake.set()

    def take(self, piece: Piece) -> None:
        """One delta of it."""
        id = piece.delta.key[0]
        if id not in self._under_way:
            return
        self._metrics.delta(id, piece.delta, piece.now)
        if piece.delta.finish is not None:
            self.left -= 1
            self._under_way[id] -= 1
            if not self._under_way[id]:
                del self._under_way[id]
                self._metrics.end(id, piece.delta.finish)
        self._pieces.append(piece)
        self._wake.set()

    async def __aiter__(self) -> AsyncIterator[list[Piece]]:
        """What has come since, until all sequences have ended.

        Raises:
            ClientGone: it is.
            ApiError: a sequence failed, or came to no end in time.
        """
        more = True
        while more:
            await self._wake.wait()
            self._wake.clear()
            if self._error is not None:
                raise self._error
            pieces, self._pieces = self._pieces, []
            more = self.left > 0
            bad = next((p.delta for p in pieces if p.delta.finish in ("error", "deadline", "abort")), None)
            good = [p for p in pieces if p.delta is not bad]
            if good:
                yield good
            if bad is not None:
                raise _failure(bad, self._engine.failure is not None)

    async def __aenter__(self) -> Flight:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.abort()
        if self._watch is not None:
            self._watch.cancel()
        if self._timer is not None:
            self._timer.cancel()

    def abort(self) -> None:
        """Ends what has not ended; its blocks are free within a step."""
        for id in list(self._under_way):
            del self._under_way[id]
            self._engine.abort(id)
            self._metrics.end(id, "abort")


def _failure(delta: Delta, dead: bool) -> ApiError:
    if delta.finish == "deadline":
        return ApiError(504, "the request took longer than it may", code="deadline")
    if delta.finish == "abort":
        return ApiError(503, "the server is stopping", code="unavailable", retry_after=1)
    if dead:
        return ApiError(503, "the engine has failed: ask again", code="unavailable", retry_after=1)
    return ApiError(500, delta.error or "this request failed; other requests go on", code="internal_error")
