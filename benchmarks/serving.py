"""`coterie bench serve`: what a server that speaks OpenAI's completions does under load, as its clients see it.

Closed loop: so many clients, each of which sends when it was answered. Open loop: requests come when they come,
which is what shows a queue that grows. Both over the same streaming client, with answers of exact lengths.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import time
from collections.abc import Callable, Sequence

from .rows import Row, write
from .rows import read as read_rows
from .serving_client import Client, Exchange, read, trace
from .serving_load import Ask, Load, Workload, arrivals, bodies, runs
from .serving_metrics import Trace, measure, parse_slo

BENCH = "serve"
KEY = "OPENAI_API_KEY"
_STOP = {400, 401, 403, 404, 405, 413, 415, 422}
"""Answers that no waiting will change."""
_WARMUP_TOKENS = 8


def main(load: Load, show: Callable[[str], object] = print) -> list[Row]:
    """Runs the whole sweep; returns the rows, and writes and draws them where `load` says.

    Raises:
        ValueError: a setting means nothing, or the server does not answer, or refuses what is asked.
    """
    load.check()
    bounds = parse_slo(load.slo)
    others = [row for path in load.beside for row in read_rows(path)]  # what cannot be read is told before the load
    rows: list[Row] = []

    def keep(name: str, traces: Sequence[Trace], cpu: float, label: str) -> None:
        found = measure(traces, bounds)
        found["client_cpu"] = (cpu / found["wall"][0] if found["wall"][0] > 0 else math.nan), "cores"
        rows.extend(Row(BENCH, name, label, metric, value, unit) for metric, (value, unit) in found.items())
        show(_line(name, label, found))
        for error in dict.fromkeys(one.error for one in traces if one.error):
            first = next(one.detail for one in traces if one.error == error)
            show(f"  {int(found[f'failed: {error}'][0])} failed: {error}: {first}")
        if load.json is not None:
            write(rows, load.json)

    asyncio.run(_sweep(load, keep, show))
    if load.png is not None:
        from .serving_plot import draw

        draw([*others, *rows], load.png)
    return rows


def _line(name: str, label: str, found: dict[str, tuple[float, str]]) -> str:
    def three(metric: str) -> str:
        seen = [found.get(f"{metric}_p{percent}", (math.nan, ""))[0] for percent in (50, 95, 99)]
        return f"{metric} {seen[0]:.0f}/{seen[1]:.0f}/{seen[2]:.0f}"

    met = " ".join(f"{found[f'effective_{rate}'][0]:.2f}" for rate in (2, 4, 6))
    speed = f"{found['req_s'][0]:.2f} req/s {found['out_tok_s'][0]:.1f} tok/s"
    times = ", ".join(three(metric) for metric in ("ttft", "itl", "tpot", "e2e"))
    done = f"{found['ok'][0]:.0f}/{found['sent'][0]:.0f}"
    return f"{label} {name}: {done} ok, {speed}; P50/95/99 ms: {times}; effective 2/4/6: {met}"


async def _sweep(load: Load, keep: Callable[..., None], show: Callable[[str], object]) -> None:
    client, work = Client(load.url, os.environ.get(KEY, ""), load.timeout), Workload(load)
    start = time.perf_counter()
    sender = await _reach(client, load, work)
    show(f"{load.url}: {sender.model} answered after {time.perf_counter() - start:.1f} s")
    warm = work.draw(load.seed - 1, load.warmup, _WARMUP_TOKENS)
    await asyncio.gather(*(sender.send(body) for body in bodies(load, sender.model, warm, sender.token_ids)))
    for number, (name, clients, rate) in enumerate(runs(load), 1):
        seed = load.seed + 10 * number
        asks = work.draw(seed, load.num)
        made = bodies(load, sender.model, asks, sender.token_ids)
        busy = time.process_time()
        if clients:
            due, exchanges = await _closed(sender, made, clients)
        else:
            due, exchanges = await _open(sender, made, arrivals(rate, load.num, seed + 1, load.burst))
        busy = time.process_time() - busy
        traces = [sender.read(ask, at, got) for ask, at, got in zip(asks, due, exchanges, strict=True)]
        keep(name, traces, busy, load.label or sender.model)


class _Sender:
    """Knows the path, the model's name and what the server takes."""

    def __init__(self, client: Client, load: Load, model: str) -> None:
        self.client, self.model, self.token_ids = client, model, True
        self._path = "/v1/chat/completions" if load.chat else "/v1/completions"
        self._exact = load.ignore_eos

    async def send(self, body: bytes) -> Exchange:
        return await self.client.exchange("POST", self._path, body)

    def read(self, ask: Ask, due: float, exchange: Exchange) -> Trace:
        return trace(exchange, prompt_tokens=ask.prompt_tokens, wanted=ask.new, due=due, exact=self._exact)


async def _reach(client: Client, load: Load, work: Workload) -> _Sender:
    """Waits until the server answers, and learns the model's name and whether it names token ids."""
    end, ask = time.perf_counter() + load.wait, work.draw(load.seed, 1, 2)[0]
    sender = _Sender(client, load, load.model) if load.model else None
    while True:
        if sender is None:
            listed = read((await client.exchange("GET", "/v1/models")).pieces)
            if listed is not None and listed.status == 200:
                sender = _Sender(client, load, _first_model(listed.text, load.url))
            elif listed is not None and listed.status in _STOP:
                raise ValueError(f"{load.url} refused to list its models with {listed.status}: {listed.text[:300]}")
        if sender is not None:
            exchange = await sender.send(bodies(load, sender.model, [ask], sender.token_ids)[0])
            seen = sender.read(ask, exchange.sent, exchange)
            if seen.ok or seen.error == "wrong length":  # which every run will name
                return sender
            if seen.error == "HTTP 400" and sender.token_ids:
                sender.token_ids = False  # a strict server refuses what it does not know
                continue
            if seen.error.startswith("HTTP") and int(seen.error[5:]) in _STOP:
                raise ValueError(f"{load.url} refused the first request with {seen.error}: {seen.detail}")
        if time.perf_counter() > end:
            raise ValueError(f"{load.url} gave no answer within {load.wait:g} s")
        await asyncio.sleep(0.1)


def _first_model(text: str, url: str) -> str:
    try:
        return str(json.loads(text)["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"{url}/v1/models lists no model: give its name with --model") from None


async def _closed(sender: _Sender, made: list[bytes], clients: int) -> tuple[list[float], list[Exchange]]:
    """Each client takes the next request when its last one has ended, well or not."""
    exchanges: list[Exchange] = [Exchange() for _ in made]
    left = iter(range(len(made)))

    async def one() -> None:
        for number in left:
            exchanges[number] = await sender.send(made[number])

    await asyncio.gather(*(one() for _ in range(min(clients, len(made)))))
    return [exchange.sent for exchange in exchanges], exchanges


async def _open(sender: _Sender, made: list[bytes], times: list[float]) -> tuple[list[float], list[Exchange]]:
    """Every request at its time, however many are still on their way."""
    start, tasks = time.perf_counter() + 0.05, []
    for body, at in zip(made, times, strict=True):
        await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
        tasks.append(asyncio.create_task(sender.send(body)))
    return [start + at for at in times], list(await asyncio.gather(*tasks))
