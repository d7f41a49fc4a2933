"""A request under way, as its client sees it: events of the scheduler become deltas of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from .outputs import Delta, Sink
from .request import Key, Request
from .runner import Told
from .sample_state import SampleState
from .step import Event
from .stops import StoppingText


@dataclass(slots=True, eq=False)
class Live:
    """One sequence that has not ended.

    Attributes:
        text: None: the model has no tokenizer.
        stops: token ids that end it, and what the client called each: a stop string that is one special token, or
            the id itself.
        emit: where its deltas go.
    """

    request: Request
    state: SampleState
    text: StoppingText | None
    stops: dict[int, str | int]
    emit: Sink
    told: int = 0
    """Tokens in deltas so far."""

    @property
    def key(self) -> Key:
        return self.request.key

    def advance(self, event: Event, told: Told | None = None) -> Delta:
        """What an event, whose tokens `state` has taken, means to the client. A stop string may end the sequence
        where the event did not; tokens after it are not told."""
        text, count, finish = "", len(event.tokens), event.finish
        stop: str | int | None = None if event.stop_token is None else self.stops.get(event.stop_token)
        spoken = event.tokens if event.stop_token is None else event.tokens[:-1]
        if self.text is not None:
            for i, token in enumerate(spoken):
                text += self.text.push(token)
                if self.text.stopped is not None:
                    count, finish, stop = i + 1, "stop", self.text.stopped
                    break
            if finish is not None:
                text += self.text.finish()
        prompt = self.state.prompt if count and not self.told else None
        self.told += count
        logprobs, routes = (told.logprobs[:count], told.routes[:count]) if told is not None else ((), ())
        return Delta(
            self.key,
            text,
            event.tokens[:count],
            logprobs,
            routes,
            finish,
            stop,
            event.error,
            self.told,
            self.request.cached,
            max(0.0, (self.request.started or self.request.arrival) - self.request.arrival),
            () if prompt is None else tuple(prompt.told),
        )

    def fail(self, why: str) -> Delta:
        """The last delta of a sequence that cannot go on."""
        return Delta(self.key, finish="error", error=why, generated=self.told, cached=self.request.cached)


@dataclass(eq=False)
class BestOf:
    """Holds back `best_of` sequences until all have ended, and gives the `n` with the best mean log probability, best
    first, each as one delta.

    Attributes:
        logprobs: whether the client asked for them; they are drawn in any case.
    """

    n: int
    draws: int
    sink: Sink
    logprobs: bool
    _parts: dict[int, list[Delta]] = field(default_factory=dict)
    _ended: list[Delta] = field(default_factory=list)

    def __call__(self, delta: Delta) -> None:
        """Takes the deltas of all, in the place of the client's sink."""
        self._parts.setdefault(delta.key[1], []).append(delta)
        if delta.finish is None:
            return
        self._ended.append(_joined(self._parts.pop(delta.key[1])))
        if len(self._ended) == self.draws:
            self._ended.sort(key=_worth, reverse=True)
            for index, one in enumerate(self._ended[: self.n]):
                logprobs = one.logprobs if self.logprobs else ()
                self.sink(replace(one, key=(one.key[0], index), logprobs=logprobs))


def _joined(parts: Sequence[Delta]) -> Delta:
    return replace(
        parts[-1],
        prompt_logprobs=parts[0].prompt_logprobs,
        text="".join(part.text for part in parts),
        tokens=tuple(token for part in parts for token in part.tokens),
        logprobs=tuple(one for part in parts for one in part.logprobs),
        routes=tuple(one for part in parts for one in part.routes),
    )


def _worth(delta: Delta) -> float:
    if delta.finish == "error" or not delta.logprobs:
        return -math.inf
    return sum(one.logprob for one in delta.logprobs) / len(delta.logprobs)
