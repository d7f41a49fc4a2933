"""Which replica computes a request: the one with the fewest tokens before it, or one that has its beginning cached.
No sockets, no clocks."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

_SHORTEST = 64  # characters of the shortest beginning that is remembered; each next one is twice as long
_BEGINNINGS = 11  # the longest has 64 Ki characters
_CHARACTERS = 4  # of a token, about
_UNTOLD = {"/v1/completions": 16}  # tokens of an answer without max_tokens
_CHAT = 256
_MOST_TOKENS = 1 << 30  # a client's number, before it is checked


@dataclass(frozen=True)
class Ask:
    """What routing knows of a request.

    Attributes:
        tokens: of its prompts and of the longest answers that it may get; an estimate.
        beginnings: digests of the prompt's first 64, 128, 256, ... characters, shortest first.
    """

    tokens: int = 1
    beginnings: tuple[bytes, ...] = ()


def asked(path: str, body: dict[str, Any], salt: str) -> Ask:
    """What a body asks for. Nothing in it is checked: what makes no sense counts little, and a replica refuses it.

    Args:
        path: of the route.
        body: JSON.
        salt: of the prefix cache: two that differ share no beginnings.
    """
    prompt = body.get("prompt", [body.get("tools"), body.get("messages")])
    batch = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], list | str) and "prompt" in body
    prompts = prompt if isinstance(prompt, list) and batch else [prompt]
    choices = _number(body.get("best_of"), body.get("n"), otherwise=1)
    answer = _number(body.get("max_tokens"), body.get("max_completion_tokens"), otherwise=_UNTOLD.get(path, _CHAT))
    tokens = sum(map(_length, prompts)) + len(prompts) * choices * answer
    return Ask(min(tokens, _MOST_TOKENS), tuple(_digests(prompts[0], salt)))


def _number(*values: Any, otherwise: int) -> int:
    """The first that is a number over 0."""
    told = (min(value, _MOST_TOKENS) for value in values if type(value) is int and value > 0)
    return next(told, otherwise)


def _length(prompt: Any) -> int:
    """Tokens, about."""
    if isinstance(prompt, list) and all(type(one) is int for one in prompt):
        return len(prompt)
    return len(_text(prompt)) // _CHARACTERS + 1


def _text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt)


def _digests(prompt: Any, salt: str) -> Iterator[bytes]:
    longest = _SHORTEST << (_BEGINNINGS - 1)
    raw = _text(prompt[:longest] if isinstance(prompt, str) else prompt)[:longest].encode(errors="replace")
    digest, at, end = hashlib.sha256(salt.encode(errors="replace") + b"\0"), 0, _SHORTEST
    while end <= len(raw) and end <= longest:
        digest.update(raw[at:end])
        yield digest.digest()[:16]
        at, end = end, 2 * end


class Router:
    """Where each request goes.

    A replica that was given a prompt's beginning has it cached, so requests with the longest known beginning follow
    each other there, unless it has over 5/4 of the tokens of the least loaded one and twice the request's own
    (consistent hashing with bounded loads, arXiv 1608.01350, takes the same way out). All others go to the least
    loaded, in turn where several are.

    Attributes:
        outstanding: tokens of the requests that each replica has been given and has not ended.
    """

    def __init__(self, replicas: int, remember: int = 1 << 16) -> None:
        """remember: beginnings; those that nobody asked for the longest are forgotten first."""
        self.outstanding = [0] * replicas
        self._favourites: OrderedDict[bytes, int] = OrderedDict()
        self._remember, self._turn = remember, 0

    def pick(self, ask: Ask, among: Collection[int]) -> int | None:
        """The replica for a request, which has its tokens until `end`; None: there is none among these."""
        if not among:
            return None
        count = len(self.outstanding)
        least = min(among, key=lambda one: (self.outstanding[one], (one - self._turn) % count))
        chosen = self._favourite(ask, among)
        if chosen is None or 4 * self.outstanding[chosen] > 5 * self.outstanding[least] + 8 * ask.tokens:
            chosen = least
        for beginning in ask.beginnings:
            self._favourites[beginning] = chosen
            self._favourites.move_to_end(beginning)
        while len(self._favourites) > self._remember:
            self._favourites.popitem(last=False)
        self._turn = (chosen + 1) % count
        self.outstanding[chosen] += ask.tokens
        return chosen

    def _favourite(self, ask: Ask, among: Collection[int]) -> int | None:
        known = (self._favourites.get(beginning) for beginning in reversed(ask.beginnings))
        return next((one for one in known if one is not None and one in among), None)

    def end(self, replica: int, ask: Ask) -> None:
        """The replica has no more to do for it."""
        self.outstanding[replica] -= ask.tokens

    def forget(self, replica: int) -> None:
        """The replica has ended, and its cache with it."""
        self._favourites = OrderedDict(item for item in self._favourites.items() if item[1] != replica)
