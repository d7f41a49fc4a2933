"""`coterie bench policies`: one engine under four ways to fill its steps, with DeepSpeed-FastGen's workloads.

Closed loops of clients in this process, as in arXiv 2401.08671, section 4, with lengths scaled to the machine:
prompts and answers are normal with a deviation of 0.3 of their mean, and each client sends as soon as it was
answered. What counts is throughput at which readers are content: requests whose first token came within prompt / 512
seconds and of which every moving average of the gaps stayed under 1/2, 1/4 or 1/6 s.

Every case runs under each policy in turn, the order rotated from case to case, with the same requests.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..infer.config import EngineConfig
from ..infer.engine import Engine
from ..infer.outputs import Delta
from ..infer.request import SamplingParams
from ..infer.step import Policy
from ..models.gpt import GPT
from .decode_model import config as model_config
from .rows import Row, show, write
from .serving_metrics import RATES, Trace, percentile, reads_well

BENCH = "policies"
POLICIES: tuple[Policy, ...] = ("splitfuse", "static", "prefill_first", "no_chunk")
_SHOWN = ("throughput", *(f"effective_{rate}" for rate in RATES), "itl_p95", "budget")


@dataclass(frozen=True)
class Case:
    """One closed loop."""

    prompt: int
    """Mean tokens."""
    new: int
    clients: int
    requests: int

    @property
    def name(self) -> str:
        return f"prompt {self.prompt} new {self.new} clients {self.clients}"

    def lengths(self, seed: int, longest: int) -> list[tuple[int, int]]:
        """(prompt, new) tokens of each request."""
        dice = random.Random(f"{seed} {self.name}")

        def one(mean: int, most: int) -> int:
            return min(max(1, round(dice.gauss(mean, 0.3 * mean))), most)

        pairs = [(one(self.prompt, longest // 2), one(self.new, longest // 2)) for _ in range(self.requests)]
        # An answer of one token has no gap to be judged by.
        return [(prompt, max(2, new)) for prompt, new in pairs]


CASES = tuple(
    Case(prompt, new, clients, 2 * clients + 16)
    for prompt, new in ((300, 15), (300, 30), (650, 15), (650, 30))
    for clients in (2, 4, 8, 16, 32)
)
QUICK = (Case(20, 5, 2, 5), Case(20, 5, 4, 6))


@dataclass
class Client:
    """Takes the deltas of one request."""

    prompt: int
    wanted: int
    sent: float
    chunks: list[tuple[float, int]] = field(default_factory=list)
    finish: str | None = None

    def __call__(self, delta: Delta) -> None:
        if delta.tokens:
            self.chunks.append((time.perf_counter(), len(delta.tokens)))
        self.finish = delta.finish

    @property
    def trace(self) -> Trace:
        count = sum(new for _, new in self.chunks)
        error = "" if self.finish == "length" and count == self.wanted else "not answered"
        return Trace(self.prompt, self.wanted, self.sent, self.sent, tuple(self.chunks), count, error)


def run(engine: Engine, case: Case, *, seed: int = 0, limit_s: float = math.inf) -> tuple[list[Trace], float]:
    """The requests that were answered before time was up, and the seconds that they took."""
    dice = random.Random(f"prompts {seed} {case.name}")
    waiting = case.lengths(seed, engine.max_model_len)[::-1]
    live: list[Client] = []
    ended: list[Client] = []
    started = time.perf_counter()
    while (waiting or live) and time.perf_counter() - started < limit_s:
        while waiting and len(live) < case.clients:
            prompt, new = waiting.pop()
            tokens = [dice.randrange(engine.vocabulary) for _ in range(prompt)]
            client = Client(prompt, new, time.perf_counter())
            params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
            engine.submit(tokens, params, client)
            live.append(client)
        engine.step()
        ended += [client for client in live if client.finish is not None]
        live = [client for client in live if client.finish is None]
    seconds = time.perf_counter() - started
    for key in list(engine.core.live):
        engine.abort(key[0])
    while not engine.idle:
        engine.step()
    return [client.trace for client in ended], seconds


def numbers(traces: Sequence[Trace], seconds: float) -> dict[str, tuple[float, str]]:
    """(value, unit) by metric. Throughput is requests that were answered over wall time."""
    done = [trace for trace in traces if trace.ok]
    gaps = [seconds / count for trace in done for seconds, count in trace.gaps for _ in range(count)]
    told: dict[str, tuple[float, str]] = {
        "answered": (float(len(done)), "requests"),
        "throughput": (len(done) / seconds, "req/s"),
    }
    for rate in RATES:
        told[f"effective_{rate}"] = (sum(reads_well(trace, rate) for trace in done) / seconds, "req/s")
    for percent in (50, 95, 99):
        told[f"itl_p{percent}"] = (1e3 * percentile(gaps, percent), "ms")
    for percent in (50, 95):
        told[f"ttft_p{percent}"] = (1e3 * percentile([trace.ttft for trace in done], percent), "ms")
    return told


def engines(model: GPT, *, longest: int, target_ms: float, limit_ms: float) -> dict[Policy, Engine]:
    """One for each policy, on the same weights."""
    settings = {"max_model_len": longest, "max_sequences": 64, "itl_target_ms": target_ms, "itl_limit_ms": limit_ms}
    return {policy: Engine(model, None, EngineConfig(policy=policy, **settings)) for policy in POLICIES}  # type: ignore[arg-type]


def main(
    json: str | Path | None = None,
    quick: bool = False,
    *,
    target_ms: float = EngineConfig.itl_target_ms,
    limit_ms: float = EngineConfig.itl_limit_ms,
    limit_s: float = 90.0,
    threads: int | None = None,
) -> list[Row]:
    """Runs all cases, shows the table, and writes the rows to `json` after each case.

    Args:
        quick: a tiny model and two small cases.
        target_ms, limit_ms: between tokens, for the measured budget: `EngineConfig`'s itl_target_ms and itl_limit_ms.
        limit_s: seconds for one case under one policy, after which what was answered counts.
        threads: for torch.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GPT(model_config(quick), device=device, dtype=torch.bfloat16)
    model.init_weights(0)
    cases = QUICK if quick else CASES
    contenders = engines(model, longest=128 if quick else 2048, target_ms=target_ms, limit_ms=limit_ms)
    warm = QUICK[0] if quick else Case(300, 15, 8, 12)
    for engine in contenders.values():
        run(engine, warm, seed=1, limit_s=limit_s)
    rows: list[Row] = []
    for i, case in enumerate(cases):
        first = i % len(POLICIES)
        for policy in POLICIES[first:] + POLICIES[:first]:
            rows += measured(contenders[policy], policy, case, limit_s)
        if json is not None:
            write(rows, json)
    rows += summary(rows)
    if json is not None:
        write(rows, json)
    show([row for row in rows if row.metric in _SHOWN or row.case == "all"])
    return rows


def measured(engine: Engine, policy: Policy, case: Case, limit_s: float) -> list[Row]:
    """The rows of one case under one policy."""
    traces, seconds = run(engine, case, limit_s=limit_s)
    told = numbers(traces, seconds)
    if policy == "splitfuse":  # it follows the steps that were served
        told["budget"] = (float(engine.report()["budget"]), "tokens")
    return [Row(BENCH, case.name, policy, metric, value, unit) for metric, (value, unit) in told.items()]


def summary(rows: Sequence[Row]) -> list[Row]:
    """The measured budget over each other policy: the median and the best of all cases. Cases in which the other
    content nobody have no ratio; how many they are is told."""
    found = {(row.case, row.impl, row.metric): row.value for row in rows}
    cases = list(dict.fromkeys(row.case for row in rows))
    out = []
    for other in POLICIES[1:]:
        for metric in (*(f"effective_{rate}" for rate in RATES), "itl_p95", "itl_p99"):
            pairs = [(found[case, "splitfuse", metric], found[case, other, metric]) for case in cases]
            pairs = [(ours, theirs) for ours, theirs in pairs if not math.isnan(ours + theirs)]
            ratios = [
                theirs / ours if metric.startswith("itl") else ours / theirs for ours, theirs in pairs if theirs
            ]
            lone = sum(ours > 0 for ours, theirs in pairs if not theirs)
            if ratios:
                told = {"median": statistics.median(ratios), "best": max(ratios), "worst": min(ratios)}
                out += [Row(BENCH, "all", f"over {other}", f"{metric} {k}", v, "times") for k, v in told.items()]
            if lone:
                out.append(Row(BENCH, "all", f"over {other}", f"{metric} only here", float(lone), "cases"))
    return out
