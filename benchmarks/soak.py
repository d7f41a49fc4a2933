"""`coterie bench soak`: a server under mixed load for a long time, with clients that cancel, break off, send nonsense
and come in floods; then a kill, and a clean restart.

A share of the requests has answers that were computed beforehand in this process, each alone: a wrong one fails the
soak, and so does a block that is not free when all is quiet, an answer of status 500, or a connection that the server
breaks. Memory and latency are measured each minute and shown with their limits.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .rows import Row, show, write
from .soak_client import Reply, Rudeness, ask, samples
from .soak_load import Case, bad, free, known, make_model
from .soak_server import Server

BENCH = "soak"
_WORKERS = 8
_FLOOD = 96  # requests at once; the server's queue takes 32
_GROWTH = 0.05  # of the memory at the end of the first third
_SLOWER = 2.0  # p99 of the last third over that of the first


@dataclass
class Minute:
    """What was seen between two quiet points."""

    seconds: float
    served: int
    p50: float
    p99: float
    memory: int
    leaked: float


@dataclass
class Soak:
    """The load and what came of it.

    Attributes:
        seen: replies by what they were.
        wrong: the first wrong answers, in words.
        minutes: closed ones, oldest first.
        told: what /metrics said at the last quiet point.
    """

    port: int
    cases: Sequence[Case]
    luck: random.Random
    seen: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    minutes: list[Minute] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    told: dict[str, float] = field(default_factory=dict)

    async def run(self, server: Server, seconds: float, minute_s: float) -> None:
        """Loads the server; at the end of each minute all clients pause, and blocks are counted."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            started = time.monotonic()
            until = min(end, started + minute_s)
            self.waits = []
            flood = asyncio.create_task(self._floods(until, minute_s / 3))
            await asyncio.gather(flood, *(self._work(until) for _ in range(_WORKERS)))
            leaked = await self._leaked()
            served, waits = self.seen.total(), sorted(self.waits) or [0.0]
            middle, high = waits[len(waits) // 2], waits[min(len(waits) - 1, int(len(waits) * 0.99))]
            memory, taken = server.memory, time.monotonic() - started
            self.minutes.append(Minute(taken, served, middle, high, memory, leaked))
            print(
                f"{len(self.minutes):3d}: {served} served, p50 {middle * 1e3:.0f} ms, p99 {high * 1e3:.0f} ms, "
                f"{memory / 2**20:.0f} MiB, {leaked:.0f} blocks leaked, {self.seen['wrong']} wrong",
                flush=True,
            )

    async def _work(self, until: float) -> None:
        while time.monotonic() < until:
            draw = self.luck.random()
            if draw < 0.55:
                await self._check(self.luck.choice(self.cases))
            elif draw < 0.70:
                await self._check(free(self.luck))
            elif draw < 0.90:
                await self._break_off(self.luck.choice(self.cases))
            else:
                await self._refused(bad(self.luck))

    async def _floods(self, until: float, every_s: float) -> None:
        while (left := until - time.monotonic()) > 0:
            await asyncio.sleep(min(left, every_s * self.luck.uniform(0.5, 1.5)))
            if time.monotonic() < until:
                await asyncio.gather(*(self._check(self.luck.choice(self.cases), flood=True) for _ in range(_FLOOD)))

    async def _check(self, case: Case, flood: bool = False) -> None:
        """A request whose answer is known, or known in its form."""
        reply = await ask(self.port, "POST", case.path, case.body)
        if reply.status in (429, 503) and reply.headers.get("retry-after"):
            self.seen["refused for want of room"] += 1
        elif reply.status == 200 and reply.whole:
            self._judge(case, reply)
            if case.kind == "plain" and not flood:
                self.waits.append(reply.seconds)
        else:
            self._failed(case, reply)

    def _judge(self, case: Case, reply: Reply) -> None:
        try:
            problem = case.check(reply)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            problem = f"{type(error).__name__}: {error}: {reply.body[-300:]!r}"
        self.seen["wrong" if problem else "right"] += 1
        if problem and len(self.wrong) < 10:
            self.wrong.append(f"{case.kind}: {problem}")

    def _failed(self, case: Case, reply: Reply) -> None:
        self.seen["failed"] += 1
        if len(self.wrong) < 10:
            self.wrong.append(f"{case.kind}: status {reply.status}, {reply.body[:300]!r}")

    async def _break_off(self, case: Case) -> None:
        await ask(self.port, "POST", case.path, case.body, rude=Rudeness.draw(self.luck))
        self.seen["broken off"] += 1

    async def _refused(self, case: Case) -> None:
        reply = await ask(self.port, "POST", case.path, case.body)
        if reply.whole and (400 <= reply.status < 500 or (reply.status == 503 and reply.headers.get("retry-after"))):
            self.seen["bad and refused"] += 1
        else:
            self._failed(case, reply)

    async def _leaked(self) -> float:
        """Blocks in use though nobody asks for anything; sequences that are still told of count as one each."""
        left = 0.0
        for _ in range(100):
            self.told = found = samples((await ask(self.port, "GET", "/metrics")).body.decode())
            used = found["vllm:kv_cache_usage_perc"] * Server.BLOCKS
            left = round(used) + found["vllm:num_requests_running"] + found["vllm:num_requests_waiting"]
            if not left:
                break
            await asyncio.sleep(0.05)
        return left

    async def killed(self, server: Server) -> tuple[int, int, float]:
        """Kills the server amid answers and starts it again: (answers lost, of how many under way, seconds to ready).

        What is asked after that is answered as before.
        """
        cases = [case for case in self.cases if case.kind == "long"]
        under_way = [asyncio.create_task(ask(self.port, "POST", case.path, case.body)) for case in cases[:8]]
        await asyncio.sleep(0.02)
        server.kill()
        replies = await asyncio.gather(*under_way)
        seconds = await server.start()
        self.port = server.port
        for case in self.cases:
            await self._check(case)
        return sum(not reply.whole for reply in replies), len(replies), seconds


def main(json: str | Path | None = None, quick: bool = False, minutes: float = 30.0, seed: int = 0) -> list[Row]:
    """Runs the soak, shows the table and writes it to `json`.

    Args:
        quick: 20 seconds, with quiet points every 6.
        minutes: how long the load lasts.
        seed: of the order of requests.

    Raises:
        RuntimeError: an answer was wrong, a request failed, or a block leaked; after the rows were written.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "soak"
        make_model(folder)
        cases = known(folder, 3 if quick else 12)
        with Server(folder, Path(name) / "server.log") as server:
            rows, wrong = asyncio.run(
                _soak(server, cases, 20.0 if quick else minutes * 60, 6.0 if quick else 60.0, seed)
            )
    show(rows)
    if json is not None:
        write(rows, json)
    broken = [f"{row.metric} {row.value:g}" for row in rows if row.limit == 0 and row.value]
    if broken:
        raise RuntimeError("\n".join([f"the soak failed: {', '.join(broken)}", *wrong]))
    return rows


async def _soak(
    server: Server, cases: Sequence[Case], seconds: float, minute_s: float, seed: int
) -> tuple[list[Row], list[str]]:
    started = await server.start()
    soak = Soak(server.port, cases, random.Random(seed))
    for case in cases:  # alone first: what is wrong here is wrong without any load
        await soak._check(case)
    await soak.run(server, seconds, minute_s)
    ended = server.alive
    lost, under_way, again = await soak.killed(server)
    rows = _rows(soak, f"{seconds / 60:.3g} minutes")
    row = _row(f"{seconds / 60:.3g} minutes")
    rows += [
        row("server ended by itself", float(not ended), "", 0.0),
        row("start until ready", started, "s"),
        row("answers lost by kill -9", lost, "requests", under_way),
        row("restart until ready", again, "s"),
    ]
    return rows, soak.wrong


def _row(case: str):
    def row(metric: str, value: float, unit: str, limit: float | None = None) -> Row:
        return Row(BENCH, case, "coterie", metric, value, unit, limit=limit)

    return row


def _rows(soak: Soak, case: str) -> list[Row]:
    row, minutes, seen = _row(case), soak.minutes, soak.seen
    third = max(1, len(minutes) // 3)
    first, last = minutes[:third], minutes[-third:]
    memory = [minute.memory / 2**20 for minute in minutes]
    half = memory[len(memory) // 3 :]
    slope = statistics.linear_regression(range(len(half)), half).slope if len(half) > 1 else 0.0
    per_minute = slope * 60 / statistics.mean(minute.seconds for minute in minutes)
    p99 = [statistics.median(minute.p99 for minute in part) * 1e3 for part in (first, last)]
    return [
        row("requests", seen.total(), "requests"),
        row("right answers", seen["right"], "requests"),
        row("wrong answers", seen["wrong"], "requests", 0.0),
        row("failed requests", seen["failed"], "requests", 0.0),
        row("clients that broke off", seen["broken off"], "requests"),
        row("bad requests refused", seen["bad and refused"], "requests"),
        row("refused for want of room", seen["refused for want of room"], "requests"),
        row("preemptions", soak.told["vllm:num_preemptions_total"], "sequences"),
        row("prompt tokens found in the prefix cache", soak.told["vllm:prefix_cache_hits_total"], "tokens"),
        row("most blocks leaked at a quiet point", max(minute.leaked for minute in minutes), "blocks", 0.0),
        row("memory after the first third", memory[third - 1], "MiB"),
        row("memory at the end", memory[-1], "MiB", memory[third - 1] * (1 + _GROWTH)),
        row("memory's slope after the first third", per_minute, "MiB/minute"),
        row("p50 of a plain request, last third", statistics.median(m.p50 for m in last) * 1e3, "ms"),
        row("p99 of a plain request, first third", p99[0], "ms"),
        row("p99 of a plain request, last third", p99[1], "ms", p99[0] * _SLOWER),
    ]
