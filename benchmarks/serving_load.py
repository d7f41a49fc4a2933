"""What is sent to a server and when: lengths, prompts and times of arrival, all from a seed.

No two prompts begin alike, so that a prefix cache can help nobody unless it is meant to.
"""

from __future__ import annotations

import json as json_
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

SHAREGPT = {"prompt": "lognormal:161:1", "new": "lognormal:338:1"}
"""Means of the ShareGPT set as PagedAttention's paper gives them (arXiv 2309.06180, figure 11). Its lengths have a
long tail, for which a log-normal with sigma 1 stands here."""
SHORTEST, LONGEST = 4, 1024
"""Bounds of log-normal lengths; vLLM's own benchmark drops conversations outside of them."""
SPECIAL = 100
"""Token ids under this, and as many at the vocabulary's end, are left out of random prompts: some are special."""
CHARACTERS = 4  # of English text in a token, about


@dataclass(frozen=True)
class Load:
    """Settings of `coterie bench serve`."""

    url: str
    """The server's address, such as http://127.0.0.1:8000."""
    model: str = ""
    """The model's name there; empty: the first that /v1/models lists."""
    label: str = ""
    """Whose rows these are; empty: the model's name."""
    prompt: str = "256:77"
    """Tokens of the prompts: N, MEAN:SD (normal), lognormal:MEAN:SIGMA, or sharegpt."""
    new: str = "64:19"
    """Tokens of the answers, likewise."""
    concurrency: tuple[int, ...] = (1, 8, 32)
    """Closed loop: one run for each number of clients, of which each sends when its last request was answered."""
    rate: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Open loop: one run for each number of requests a second, sent whether or not others were answered."""
    burst: float = 1.0
    """Open loop: squared coefficient of variation of the times between requests. 1: Poisson; over 1: bursts."""
    num: int = 40
    """Requests of one run."""
    warmup: int = 4
    """Requests before the first run, which are not counted."""
    vocab: int = 50257
    """Prompts are random token ids below this."""
    text: Path | None = None
    """Prompts are pieces of this text file instead, no two alike; lengths are then approximate."""
    chat: bool = False
    """Use /v1/chat/completions. Needs --text."""
    ignore_eos: bool = True
    """Ask for answers of exactly the length drawn. Without it, a shorter answer is counted as it is."""
    extra: str = "{}"
    """A JSON object that is merged into the body of every request."""
    slo: str = "ttft=1000,itl=100"
    """Bounds of goodput in ms: of ttft, itl (each gap of a request), tpot (their mean) and e2e."""
    timeout: float = 300.0
    """Seconds for one request, after which it has failed."""
    wait: float = 120.0
    """Seconds to wait for the server's first answer."""
    seed: int = 100
    """Of lengths, prompts and times."""
    json: Path | None = None
    """Write the tidy rows here too."""
    png: Path | None = None
    """Draw latency over throughput here."""
    beside: tuple[Path, ...] = ()
    """Earlier --json files, to draw in the same plot."""

    def check(self) -> None:
        """Raises ValueError for a setting that means nothing."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--url {self.url!r} is not an address such as http://127.0.0.1:8000")
        for name in ("prompt", "new"):
            Lengths(getattr(self, name), "prompt" if name == "prompt" else "new")
        for name, least in (("num", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)} must be {least} or more")
        for name in ("timeout", "wait", "burst"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name} {getattr(self, name)} must be a number over 0")
        if self.vocab <= 2 * SPECIAL:
            raise ValueError(f"--vocab {self.vocab} must be over {2 * SPECIAL}")
        if any(clients < 1 for clients in self.concurrency) or any(not 0 < rate < math.inf for rate in self.rate):
            raise ValueError("--concurrency takes whole numbers from 1 on, and --rate numbers over 0")
        if self.chat and self.text is None:
            raise ValueError("--chat sends text: give a file with --text")
        self.more()

    def more(self) -> dict[str, Any]:
        """`extra`, read."""
        try:
            found = json_.loads(self.extra)
        except json_.JSONDecodeError as error:
            raise ValueError(f"--extra is not JSON: {error}") from None
        if not isinstance(found, dict):
            raise ValueError(f"--extra {self.extra[:60]!r} is not a JSON object")
        return found


class Lengths:
    """Draws lengths in tokens, as a text such as `256:77` says. ValueError where it says nothing."""

    def __init__(self, text: str, what: Literal["prompt", "new"]) -> None:
        kind, _, rest = SHAREGPT[what].partition(":") if text == "sharegpt" else text.partition(":")
        self._log = kind == "lognormal"
        mean, _, spread = rest.partition(":") if self._log else text.partition(":")
        try:
            self.mean, self.spread = float(mean), float(spread or self._log)
            if not (1 <= self.mean < math.inf and 0 <= self.spread < math.inf):
                raise ValueError
        except ValueError:
            raise ValueError(
                f"--{what} {text!r} is no length: give N, MEAN:SD, lognormal:MEAN:SIGMA or sharegpt, in tokens"
            ) from None

    def draw(self, r: random.Random) -> int:
        """One length. A normal one is cut to 2 and to 3 times its mean."""
        if self._log:
            mu = math.log(self.mean) - self.spread**2 / 2  # so that the mean, before the bounds, is as asked
            return max(SHORTEST, min(LONGEST, round(r.lognormvariate(mu, self.spread))))
        if not self.spread:
            return round(self.mean)
        return max(2, min(round(3 * self.mean), round(r.gauss(self.mean, self.spread))))


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: a prompt of about so many tokens, and how many are wanted."""

    prompt: str | list[int]
    prompt_tokens: int
    new: int


class Workload:
    """Requests for run after run. Pieces of a text are given out once over all runs."""

    def __init__(self, load: Load) -> None:
        self._prompt, self._new = Lengths(load.prompt, "prompt"), Lengths(load.new, "new")
        self._vocab, self._source = load.vocab, load.text
        self._text = "" if load.text is None else load.text.read_text(encoding="utf-8", errors="replace")
        self._at = 0

    def draw(self, seed: int, count: int, new: int = 0) -> list[Ask]:
        """`count` requests. new: instead of drawn answer lengths.

        Raises:
            ValueError: the text is used up.
        """
        r, asks = random.Random(seed), []
        for _ in range(count):
            tokens, wanted = self._prompt.draw(r), self._new.draw(r)
            asks.append(Ask(self._make(tokens, r), tokens, new or wanted))
        return asks

    def _make(self, tokens: int, r: random.Random) -> str | list[int]:
        if self._source is None:
            return [r.randrange(SPECIAL, self._vocab - SPECIAL) for _ in range(tokens)]
        start, self._at = self._at, self._at + CHARACTERS * tokens
        if self._at > len(self._text):
            raise ValueError(
                f"{self._source} has too little text for all prompts: give a longer one or a smaller --num"
            )
        return self._text[start : self._at]


def arrivals(rate: float, count: int, seed: int, burst: float = 1.0) -> list[float]:
    """Seconds at which to send, from 0 on: `rate` a second on average.

    burst: squared coefficient of variation of the times between; 1 is a Poisson process, others are gamma.
    """
    r, at, times = random.Random(seed), 0.0, []
    for _ in range(count):
        times.append(at)
        at += r.expovariate(rate) if burst == 1 else r.gammavariate(1 / burst, burst / rate)
    return times


def runs(load: Load) -> Iterator[tuple[str, int, float]]:
    """Every run's name, its clients and its rate: one of both is 0."""
    for clients in load.concurrency:
        yield f"closed c={clients}", clients, 0.0
    name = "poisson" if load.burst == 1 else f"gamma {load.burst:g}"
    for rate in load.rate:
        yield f"{name} r={rate:g}", 0, rate


def bodies(load: Load, model: str, asks: Sequence[Ask], token_ids: bool) -> list[bytes]:
    """The JSON to send, made before the clock runs. token_ids: ask for the ids of each chunk (vLLM's extension)."""
    made = []
    for ask in asks:
        body: dict[str, Any] = {"model": model, "max_tokens": ask.new, "temperature": 0.0, "stream": True}
        body["stream_options"] = {"include_usage": True}
        if load.chat:
            body["messages"] = [{"role": "user", "content": ask.prompt}]
        else:
            body["prompt"] = ask.prompt
        body |= {"ignore_eos": True} if load.ignore_eos else {}
        body |= {"return_token_ids": True} if token_ids else {}
        made.append(json_.dumps(body | load.more()).encode())
    return made
