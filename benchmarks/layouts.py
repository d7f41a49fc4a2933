"""`coterie bench layouts`: the same training step under several layouts: its time, what it sends, where it waits.

Every contender starts from the same weights and reads the same batch; their losses must agree before anything is
timed. A step is forward, backward and AdamW. On a machine with fewer cores than ranks the ranks share the cores.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..models.config import ModelConfig
from ..models.gpt import GPT
from ..models.parallelize import parallelize
from ..moe.config import MoEConfig
from ..moe.exchanging import Exchanging
from ..parallel.census import Census
from ..parallel.launch import keep_freed_memory
from ..parallel.mesh import build_mesh
from ..train.config import OptimConfig
from ..train.optim import build_optimizer
from .pool import Pool
from .rows import Row, show, write
from .timing import median_and_spread

BENCH = "layouts"


class Contender(NamedTuple):
    """One layout."""

    name: str
    world: int
    degrees: dict[str, int]
    threads: int = 1
    chunks: int = 1


class Case(NamedTuple):
    """One model and batch; the first contender is what the others are compared with."""

    name: str
    config: ModelConfig
    batch: int
    sequence: int
    contenders: tuple[Contender, ...]


_SMALL = ModelConfig(
    vocab_size=4096,
    max_positions=256,
    layers=4,
    dim=512,
    heads=8,
    hidden=1024,
    experts=(0, 8, 0, 8),
    moe=MoEConfig(top_k=2, hidden=1024, residual=True),
)
# DeepSpeed-MoE's pyramid on 128 ranks in miniature: 2, 4 and 8 experts for 32, 64 and 128.
_PYRAMID = replace(_SMALL, layers=3, dim=256, hidden=512, experts=(2, 4, 8), moe=MoEConfig(top_k=1, hidden=512))
CASES = (
    Case(
        "2 ranks against 1",
        _SMALL,
        8,
        256,
        (
            Contender("1 rank of 2 threads", 1, {}, threads=2),
            Contender("ep 2", 2, {"ep": 2}),
            Contender("ep 2, 2 chunks", 2, {"ep": 2}, chunks=2),
            Contender("ep 2, 2 copies", 2, {"ep": 2, "dp_replicate": 2}),
            Contender("dp 2", 2, {}),
            Contender("tp 2", 2, {"tp": 2, "ep": 2}),
            Contender("etp 2", 2, {"etp": 2}),
        ),
    ),
    Case(
        "pyramid of 2, 4 and 8 experts on 8 ranks",
        _PYRAMID,
        16,
        128,
        (
            Contender("ep 2 / 4 / 8", 8, {"ep": 8}),
            Contender("ep 2 in every layer", 8, {"ep": 2}),
            Contender("dp 8", 8, {}),
        ),
    ),
)
_STEPS: dict[str, Callable[[], float]] = {}


def main(json: str | Path | None = None, quick: bool = False) -> list[Row]:
    """Measures all cases, shows the table, and writes the rows to `json`.

    Args:
        quick: the first two contenders of each case, few repeats, a small batch.
    """
    rows: list[Row] = []
    for case in CASES:
        if quick:
            case = case._replace(contenders=case.contenders[:2], batch=8, sequence=32)
        rows += _measure(case, 3 if quick else 15)
        if json is not None:
            write(rows, json)
    show(rows)
    return rows


def _measure(case: Case, repeats: int) -> list[Row]:
    pools = {(c.world, c.threads): Pool(c.world, c.threads) for c in case.contenders}
    runs = {c.name: (c, pools[c.world, c.threads]) for c in case.contenders}
    try:
        losses = [pool.run(_build, tuple(c), case.config, case.batch, case.sequence) for c, pool in runs.values()]
        if max(abs(sum(loss) / sum(losses[0]) - 1) for loss in losses) > 1e-4:
            raise ValueError(f"bench layouts: the losses of {case.name} differ: {[sum(loss) for loss in losses]}")
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for repeat in range(repeats + 2):
            for name, (_, pool) in list(runs.items())[:: -1 if repeat % 2 else 1]:
                seconds[name].append(max(pool.run(_step, name)))
        parts = {name: pool.run(_parts, name) for name, (_, pool) in runs.items()}
    finally:
        for pool in pools.values():
            pool.close()
    limit = statistics.median(seconds[case.contenders[0].name][2:]) * 1e3
    rows = []
    for name, taken in seconds.items():
        row = partial(Row, BENCH, case.name, name)
        value, spread = (x * 1e3 for x in median_and_spread(taken[2:]))
        rows.append(row("step", value, "ms", spread, limit, limit / value))
        rows.append(row("speed", case.batch * case.sequence / value * 1e3, "tokens/s"))
        # The rank that waits least is the one that the others wait for.
        slowest = min(parts[name], key=lambda found: found["wait"])
        rows += [row(part, slowest[part] * 1e3, "ms") for part in ("compute", "exchange", "wait")]
        sent = [key for key in slowest if key.endswith(("calls", "bytes")) and slowest[key]]
        for key in sent:
            most = max(found[key] for found in parts[name])
            rows.append(row(key, most / 2**20 if "bytes" in key else most, "MiB" if "bytes" in key else "per rank"))
    return rows


def _build(rank: int, world: int, contender: tuple, config: ModelConfig, batch: int, sequence: int) -> float:
    """Keeps a step under the contender's name; returns this rank's part of the loss."""
    contender = Contender(*contender)
    keep_freed_memory()
    mesh = build_mesh("cpu", **contender.degrees)
    model = parallelize(GPT(config, device="meta"), mesh, exchanging=Exchanging(chunks=contender.chunks))
    model.init_weights(0)
    optimizer = build_optimizer(model, OptimConfig())
    text_BS = torch.randint(config.vocab_size, (batch, sequence + 1), generator=torch.Generator().manual_seed(0))
    share = batch // mesh.layout.data_ranks
    own_BS = text_BS[rank // mesh.layout.tp * share :][:share]

    def forward() -> torch.Tensor:
        out = model(own_BS[:, :-1], targets_BS=own_BS[:, 1:])
        return (out.lm + config.moe.gate.aux_weight * out.aux) / (batch * sequence)

    def step() -> float:
        dist.barrier()
        start = time.perf_counter()
        optimizer.zero_grad()
        forward().backward()
        optimizer.step()
        return time.perf_counter() - start

    with torch.no_grad():
        loss = forward().item()
    _STEPS[contender.name] = step
    return loss


def _step(rank: int, world: int, name: str) -> float:
    return _STEPS[name]()


def _parts(rank: int, world: int, name: str) -> dict[str, float]:
    """Seconds of a step without overlap, medians of five, and what this rank sent in one."""
    found, census = [], Census(timed=True)
    for _ in range(5):
        with (census := Census(timed=True)):
            total = _STEPS[name]()
        found.append((total - census.wait - census.exchange, census.exchange, census.wait))
    seconds = map(statistics.median, zip(*found, strict=True))
    sent = {f"{kind} {k}": float(v) for kind, moved in census.moved.items() for k, v in moved._asdict().items()}
    return dict(zip(("compute", "exchange", "wait"), seconds, strict=True)) | sent


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time a training step under several layouts side by side.")
    parser.add_argument("--json", type=Path, help="write the tidy rows here")
    parser.add_argument("--quick", action="store_true", help="two contenders, few repeats")
    arguments = parser.parse_args()
    main(arguments.json, arguments.quick)
