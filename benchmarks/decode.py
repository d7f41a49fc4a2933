"""`coterie bench decode`: how fast the engine generates in process, and how near that is to what memory allows.

Decoding a token reads every weight that it needs once, so the limit is bytes over the measured rate of memory: dense
weights, the experts really visited, keys and values. Decode speed is B * (n - 1) / (t_n - t_1), where t_n is the time
of n new tokens for each of B prompts, so that prompts do not count.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .decode_model import config, make
from .decode_worker import Measured, Worker
from .device import Memory
from .rows import Row, show, write
from .timing import median_and_spread

BENCH = "decode"
BATCHES = (1, 2, 4, 8, 16, 32, 64)
_BESIDE = (
    ("memory_rate", "machine", "GB/s"),
    ("distinct_experts", "coterie", "a layer"),
    ("distinct_tokens", "coterie", "of all"),  # near 0, the text repeats itself
)
PARITY = (4, 64)
"""Prompts, and new tokens of each, on which engines must agree in fp32."""


@dataclass(frozen=True)
class Sizes:
    """Tokens of the prompts, of the answers and of the long prompt."""

    prompt: int = 64
    new: int = 128
    prefill: int = 1024


def main(
    model: str | Path | None = None,
    *,
    json: str | Path | None = None,
    quick: bool = False,
    dtype: str = "bfloat16",
    batches: Sequence[int] = BATCHES,
    repeats: int = 3,
    device: str | None = None,
    peer: bool = True,
) -> list[Row]:
    """Checks that the engines agree, then measures them in turns; shows the rows and writes them to `json`.

    Raises:
        ValueError: our greedy tokens differ from transformers' in fp32.
    """
    check(batches, repeats)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    sizes = Sizes(prompt=8, new=12, prefill=40) if quick else Sizes()
    with tempfile.TemporaryDirectory() as scratch:
        if model is None:
            make(Path(scratch) / "random-mixtral", config(quick))
            model = Path(scratch) / "random-mixtral"
        vocab = _vocabulary(model)
        rows, agree = _parity(model, vocab, device, sizes, peer)
        impls = ("coterie", "transformers") if agree else ("coterie",)
        with ExitStack() as stack:
            workers = []
            for impl in impls:
                workers.append(Worker(impl, model, dtype, device))
                stack.callback(workers[-1].close)
            case = f"{Path(model).name} {dtype} on {device}"
            bench = Bench(workers, Memory(device), vocab, case, sizes, 2 if quick else repeats)
            rows = bench.run((1, 4) if quick else batches, rows, lambda found: json and write(found, json))
    show(rows)
    return rows


def check(batches: Sequence[int], repeats: int) -> None:
    """Raises ValueError for numbers that mean nothing."""
    if min(batches, default=0) < 1 or repeats < 1:
        raise ValueError("--batches and --repeats take whole numbers from 1 on")


def _vocabulary(model: str | Path) -> int:
    from ..models.hub import resolve
    from ..models.weights import read_config

    return read_config(resolve(model)).vocab_size


def prompts(seed: int, batch: int, tokens: int, vocab: int) -> list[list[int]]:
    """Random ones that share no beginning; ids near both ends of the vocabulary may be special and are left out."""
    r, margin = random.Random(seed), min(100, vocab // 8)
    return [[r.randrange(margin, vocab - margin) for _ in range(tokens)] for _ in range(batch)]


def _parity(model: str | Path, vocab: int, device: str, sizes: Sizes, peer: bool) -> tuple[list[Row], bool]:
    """One row, and whether there is a peer that gives our tokens."""
    if not peer:
        return [], False
    count, new = PARITY
    made: dict[str, list[list[int]]] = {}
    for impl in ("transformers", "coterie"):
        try:
            worker = Worker(impl, model, "float32", device)
        except RuntimeError as error:
            if impl == "coterie":
                raise
            print(f"without transformers: {error}")
            return [], False
        try:
            asked = prompts(424242, count, sizes.prompt, vocab)
            made[impl] = [worker.ask([prompt], new)["tokens"][0] for prompt in asked]
        finally:
            worker.close()
    pairs = zip(made["coterie"], made["transformers"], strict=True)
    agreed = [next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), new) for x, y in pairs]
    if min(agreed) < new:
        raise ValueError(f"greedy tokens in fp32 differ from transformers' after {agreed} of {new} tokens")
    return [Row(BENCH, "parity in fp32", "coterie", "tokens like transformers'", sum(agreed), "tokens")], True


class Bench:
    """All numbers of one model: engines take turns within each repeat, and memory is read beside them."""

    def __init__(
        self, workers: Sequence[Measured], machine: Memory, vocab: int, case: str, sizes: Sizes, repeats: int
    ) -> None:
        self._workers, self._machine, self._vocab = workers, machine, vocab
        self._case, self._sizes, self._repeats, self._seed = case, sizes, repeats, 1000

    def run(self, batches: Sequence[int], rows: list[Row], keep: Callable[[list[Row]], object]) -> list[Row]:
        """Rows of everything, kept after each part: a run that is cut short has what it measured."""
        rows = rows + self._prefill()
        keep(rows)
        for batch in batches:
            rows += self._decode(batch)
            keep(rows)
        for worker in self._workers:
            rows.append(Row(BENCH, self._case, worker.impl, "startup", worker.startup, "s"))
            rows.append(Row(BENCH, self._case, worker.impl, "peak_memory", worker.peak / 2**30, "GiB"))
        keep(rows)
        return rows

    def _turns(self, repeat: int) -> Sequence[Measured]:
        return self._workers if repeat % 2 == 0 else self._workers[::-1]

    def _next(self, batch: int, tokens: int) -> list[list[int]]:
        self._seed += 1
        return prompts(self._seed, batch, tokens, self._vocab)

    def _prefill(self) -> list[Row]:
        length = self._sizes.prefill
        speeds: dict[str, list[float]] = {worker.impl: [] for worker in self._workers}
        for repeat in range(-1, self._repeats):
            prompt = self._next(1, length)
            for worker in self._turns(repeat):
                seconds = worker.ask(prompt, 1)["seconds"]
                if repeat >= 0:  # the first is to warm up
                    speeds[worker.impl].append(length / seconds)
        case = f"{self._case}, prefill {length}"
        found = {impl: median_and_spread(values) for impl, values in speeds.items()}
        return [Row(BENCH, case, impl, "prefill", value, "tok/s", spread) for impl, (value, spread) in found.items()]

    def _decode(self, batch: int) -> list[Row]:
        sizes, new = self._sizes, self._sizes.new
        speeds: dict[str, list[float]] = {worker.impl: [] for worker in self._workers}
        limits: list[float] = []
        seen: dict[str, list[float]] = {name: [] for name, _, _ in _BESIDE}
        for worker in self._workers:
            worker.ask(self._next(batch, sizes.prompt), 4)
        for repeat in range(self._repeats):
            one, many = self._next(batch, sizes.prompt), self._next(batch, sizes.prompt)
            rate = self._machine.rate()
            for worker in self._turns(repeat):
                first, all_ = worker.ask(one, 1), worker.ask(many, new)
                seconds = all_["seconds"] - first["seconds"]
                speeds[worker.impl].append(batch * (new - 1) / seconds)
                if worker is self._workers[0]:  # ours
                    least = read_bytes(first, all_, batch, sizes) / rate
                    limits.append(batch * (new - 1) / least)
                    seen["memory_rate"].append(rate / 1e9)
                    seen["distinct_experts"].append(all_["distinct"])
                    words = {token for tokens in all_["tokens"] for token in tokens}
                    seen["distinct_tokens"].append(len(words) / (batch * new))
        return self._decode_rows(f"{self._case}, batch {batch}", speeds, limits, seen)

    def _decode_rows(
        self, case: str, speeds: dict[str, list[float]], limits: list[float], seen: dict[str, list[float]]
    ) -> list[Row]:
        rows, limit = [], statistics.median(limits)
        for impl, values in speeds.items():
            value, spread = median_and_spread(values)
            # Repeat by repeat: memory that was slow for the read was slow for the engine too.
            fraction = statistics.median(speed / most for speed, most in zip(values, limits, strict=True))
            rows.append(Row(BENCH, case, impl, "decode", value, "tok/s", spread, limit, fraction))
        for name, impl, unit in _BESIDE:
            value, spread = median_and_spread(seen[name])
            rows.append(Row(BENCH, case, impl, name, value, unit, spread))
        return rows


def read_bytes(first: dict[str, Any], all_: dict[str, Any], batch: int, sizes: Sizes) -> float:
    """Bytes that decoding had to read: weights by the steps of the long run less those of the short one, and all
    keys and values before and at each token."""
    contexts = sum(sizes.prompt + done for done in range(1, sizes.new))
    return all_["bytes"] - first["bytes"] + batch * contexts * all_["kv_token"]
