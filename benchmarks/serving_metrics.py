"""What clients of a server saw, in numbers: latencies, throughput and how many requests met a bound.

Everything is counted over requests as they came: throughput is what was completed over the time that it took, and
never clients over latency; a request that failed counts against goodput.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

PERCENTS = (50, 90, 95, 99)
RATES = (2, 4, 6)
"""Tokens a second that a reader wants: DeepSpeed-FastGen's bounds (arXiv 2401.08671, section 4.4)."""
PROMPT_RATE = 512
"""Prompt tokens a second that a reader expects until the first token: theirs too."""
SPAN = 16
"""Of the exponential moving average of the gaps between tokens: its weight is 2 / (SPAN + 1)."""
_BOUNDS = ("ttft", "itl", "tpot", "e2e")


@dataclass(frozen=True, slots=True)
class Trace:
    """One request as its client saw it. Times in seconds on one clock."""

    prompt_tokens: int
    wanted: int
    """Tokens asked for."""
    due: float
    """When it should have been sent: latencies start here, so that a late client flatters no server."""
    sent: float
    chunks: tuple[tuple[float, int], ...] = ()
    """(when it came, new tokens) of each chunk with text or tokens."""
    tokens: int = 0
    """Completed, as the server counts."""
    error: str = ""
    """Why it failed, in a few words that are the same for all that failed so."""
    detail: str = ""

    @property
    def ok(self) -> bool:
        return not self.error

    @property
    def ttft(self) -> float:
        return self.chunks[0][0] - self.due

    @property
    def e2e(self) -> float:
        return self.chunks[-1][0] - self.due

    @property
    def tpot(self) -> float:
        """Seconds for each token after the first."""
        return (self.e2e - self.ttft) / max(1, self.tokens - 1)

    @property
    def gaps(self) -> list[tuple[float, int]]:
        """(seconds since the chunk before, tokens) of each chunk but the first."""
        return [(now - before, count) for (before, _), (now, count) in pairwise(self.chunks)]


def percentile(values: Sequence[float], percent: float) -> float:
    """Between the two nearest ranks, in proportion; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def moving_averages(gaps: Sequence[tuple[float, int]]) -> list[float]:
    """The exponential moving average after each token. A chunk of m tokens counts as m gaps of an m-th each."""
    averages: list[float] = []
    weight = 2 / (SPAN + 1)
    for seconds, count in gaps:
        for _ in range(count):
            one = seconds / count
            averages.append(one if not averages else weight * one + (1 - weight) * averages[-1])
    return averages


def reads_well(trace: Trace, rate: float) -> bool:
    """DeepSpeed-FastGen's bound: first token within prompt / 512 s, and every moving average under 1 / rate s."""
    if not trace.ok or trace.ttft > trace.prompt_tokens / PROMPT_RATE:
        return False
    return all(average < 1 / rate for average in moving_averages(trace.gaps))


def parse_slo(text: str) -> dict[str, float]:
    """Seconds by name, from `ttft=1000,itl=100` in ms. ValueError where it is something else."""
    bounds: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            bounds[name.strip()] = float(value) / 1e3
        except ValueError:
            raise ValueError(f"--slo {part!r} is no bound: give name=milliseconds") from None
        if name.strip() not in _BOUNDS or not bounds[name.strip()] > 0:
            raise ValueError(f"--slo {part!r} is no bound: names are {', '.join(_BOUNDS)}, values over 0")
    return bounds


def meets(trace: Trace, bounds: Mapping[str, float]) -> bool:
    """Whether one request completed within all bounds; `itl` bounds every one of its gaps."""
    if not trace.ok:
        return False
    longest = max((seconds for seconds, _ in trace.gaps), default=0.0)
    seen = {"ttft": trace.ttft, "itl": longest, "tpot": trace.tpot, "e2e": trace.e2e}
    return all(seen[name] <= bound for name, bound in bounds.items())


def measure(traces: Sequence[Trace], bounds: Mapping[str, float]) -> dict[str, tuple[float, str]]:
    """(value, unit) by metric, of one run. Percentiles are over completed requests, shares over all sent."""
    done = [trace for trace in traces if trace.ok]
    start = min(trace.due for trace in traces)
    wall = max([trace.chunks[-1][0] for trace in traces if trace.chunks], default=start) - start
    found = {"sent": (len(traces), "requests"), "ok": (len(done), "requests"), "wall": (wall, "s")}

    def per_second(amount: float) -> float:
        return amount / wall if wall > 0 else 0.0

    found["req_s"] = per_second(len(done)), "1/s"
    found["out_tok_s"] = per_second(sum(trace.tokens for trace in done)), "tok/s"
    found["total_tok_s"] = per_second(sum(trace.tokens + trace.prompt_tokens for trace in done)), "tok/s"
    series = {
        "ttft": [trace.ttft for trace in done],
        "itl": [seconds for trace in done for seconds, _ in trace.gaps],
        "tpot": [trace.tpot for trace in done],
        "e2e": [trace.e2e for trace in done],
    }
    for name, values in series.items():
        for percent in PERCENTS if values else ():
            found[f"{name}_p{percent}"] = percentile(values, percent) * 1e3, "ms"
    found["late_p99"] = percentile([trace.sent - trace.due for trace in traces], 99) * 1e3, "ms"
    found["chunks_of_several"] = sum(count > 1 for trace in done for _, count in trace.gaps), "chunks"
    checks = {f"effective_{rate}": [reads_well(trace, rate) for trace in traces] for rate in RATES}
    checks["goodput"] = [meets(trace, bounds) for trace in traces]
    for name, passed in checks.items():
        found[name] = sum(passed) / len(traces), "of sent"
        found[f"{name}_req_s"] = per_second(sum(passed)), "1/s"
    for error, count in Counter(trace.error for trace in traces if not trace.ok).items():
        found[f"failed: {error}"] = count, "requests"
    return found
