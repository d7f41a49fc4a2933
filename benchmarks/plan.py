"""`coterie bench plan`: what the planner predicts beside what training steps on this machine's ranks need.

This machine is measured first: products and copies of one core, and links between two ranks. How much of the product
rate a training step reaches is taken from a dense model on two ranks, whose steps take turns with those of each case:
a busy machine slows both. Peaks are those of torch's allocator, bytes those of a census of all collectives, and
both repeat. Seconds are medians. Ranks beyond the cores share them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from ..kernels import cpu_gemm
from ..models.config import ModelConfig
from ..models.gpt import GPT
from ..models.parallelize import parallelize
from ..moe.config import MoEConfig
from ..parallel.all_to_all import Network
from ..parallel.census import Census
from ..parallel.cost import Rate
from ..parallel.exchange_probe import measure_rates
from ..parallel.launch import Ranks, keep_freed_memory
from ..parallel.mesh import build_mesh
from ..train.clock import peak_flops
from ..train.config import ParallelConfig, TrainConfig, exchanging, layout
from ..train.data import Batch
from ..train.loop import Trainer
from ..train.machines import MACHINES, Machine
from ..train.objective import LanguageModelling
from ..train.plan import Row as Planned
from ..train.plan import row_of
from .pool import Pool
from .rows import Row, show, write
from .timing import median_and_spread

BENCH = "plan"
_DENSE = ModelConfig(vocab_size=2048, max_positions=128, layers=4, dim=256, heads=4, hidden=768)
_MOE = replace(_DENSE, experts=(0, 8, 0, 8), moe=MoEConfig(top_k=2, hidden=384))
_PR_MOE = replace(_DENSE, experts=(0, 4, 0, 8), moe=MoEConfig(top_k=1, hidden=384, residual=True))


class Case(NamedTuple):
    """One run; the global batch is the same for all."""

    name: str
    world: int
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    micro_batch: int = 0

    @property
    def config(self) -> TrainConfig:
        return TrainConfig(
            seq_len=128, batch_size=16, micro_batch=self.micro_batch, model=self.model, parallel=self.parallel
        )


# One thread a rank: threads that wait for each other suffer most on a busy machine.
REFERENCE = Case("dense, FSDP 2", 2, _DENSE)
CASES = (
    Case("dense, 1 rank", 1, _DENSE),
    Case("MoE, 1 rank", 1, _MOE),
    Case("MoE in bf16, 1 rank", 1, _MOE, ParallelConfig(dtype="bfloat16")),
    Case("residual, 1 rank", 1, _PR_MOE),
    Case("MoE with full recompute, 1 rank", 1, _MOE, ParallelConfig(recompute="full")),
    REFERENCE,
    Case("MoE, FSDP 2", 2, _MOE),
    Case("MoE, FSDP 2, 2 micro-batches", 2, _MOE, ParallelConfig(), 4),
    Case("MoE, EP 2", 2, _MOE, ParallelConfig(ep=2)),
    Case("MoE in bf16, EP 2", 2, _MOE, ParallelConfig(ep=2, dtype="bfloat16")),
    Case("residual, EP 2", 2, _PR_MOE, ParallelConfig(ep=2)),
    Case("MoE with selective recompute, EP 2", 2, _MOE, ParallelConfig(ep=2, recompute="selective")),
    Case("MoE, TP 2, EP 2", 2, _MOE, ParallelConfig(tp=2, ep=2)),
    Case("MoE, ETP 2", 2, _MOE, ParallelConfig(etp=2)),
    Case("MoE, EP 4", 4, _MOE, ParallelConfig(ep=4)),
    Case("MoE, TP 2, EP 4", 4, _MOE, ParallelConfig(tp=2, ep=4)),
    Case("pyramid with residual, EP 8", 8, _PR_MOE, ParallelConfig(ep=8)),
    Case("MoE, HSDP 2 x 4, EP 4", 8, _MOE, ParallelConfig(dp_replicate=2, ep=4)),
)


def main(json: str | Path | None = None, quick: bool = False) -> list[Row]:
    """Measures all cases, shows the table, and writes the rows to `json`.

    Args:
        quick: two cases of each number of ranks, few repeats.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    repeats = 3 if quick else 9
    rows: list[Row] = []
    reference, machine = Pool(REFERENCE.world), measure_machine(cores)
    reference.run(prepare, tuple(REFERENCE))
    for world in sorted({case.world for case in CASES}):
        pool = Pool(world, max(1, cores // world))
        cases = [case for case in CASES if case.world == world]
        for case in cases[:2] if quick else cases:
            pool.run(prepare, tuple(case))
            beside, taken = [], []
            for _ in range(repeats):
                beside.append(max(reference.run(_seconds)))
                taken.append(max(pool.run(_seconds)))
            on = calibrate(machine, statistics.median(beside))
            rows += compare(case, pool.run(weigh), on, taken)
            if json is not None:
                write(rows, json)
        pool.close()
    reference.close()
    show(rows)
    for metric in ("peak error", "bytes error", "step error"):
        errors = [abs(row.value) for row in rows if row.metric == metric]
        print(f"{metric}: median {statistics.median(errors):.1f}%, largest {max(errors):.1f}%")
    return rows


def measure_machine(cores: int) -> Machine:
    """This machine's figures for one core, while two are at work; `fraction` is not known yet and is 1."""
    pool = Pool(2)
    try:
        fp32, bf16, copied = pool.run(_probe)[0]
        link = Rate(*pool.run(_probe_links)[0])
    finally:
        pool.close()
    rates: dict[str, Any] = {"fp32": fp32, "bf16": bf16, "memory_rate": copied, "intra": link, "inter": link}
    return replace(MACHINES["cpu"], fraction=1.0, cores=cores, **rates)


def calibrate(on: Machine, seconds: float) -> Machine:
    """The machine with the fraction that makes the prediction of the reference true."""
    step = _planned(REFERENCE, on).step
    return replace(on, fraction=on.fraction * step.compute / max(seconds - step.total + step.compute, 1e-9))


def _planned(case: Case, on: Machine) -> Planned:
    return row_of(case.config, layout(case.config, case.world), on, case.world)


def compare(case: Case, found: Sequence[dict[str, float]], on: Machine, seconds: Sequence[float] = ()) -> list[Row]:
    """Rows of one case: the fullest rank's peak, the mean of bytes sent, `seconds` of steps; predicted, measured."""
    planned = _planned(case, on)
    sent = planned.traffic
    middle, spread = median_and_spread(list(seconds)) if seconds else (0.0, 0.0)
    pairs = {
        "peak": (planned.memory.peak / 2**20, max(rank["peak"] for rank in found) / 2**20, "MiB", None),
        "bytes": (
            sum(flow.sent for flow in sent) / 2**20,
            statistics.mean(rank["sent"] for rank in found) / 2**20,
            "MiB",
            None,
        ),
        "step": (planned.step.total * 1e3, middle * 1e3, "ms", spread * 1e3),
    }
    rows = []
    for metric, (predicted, measured, unit, around) in pairs.items():
        if measured:
            rows.append(Row(BENCH, case.name, "run", metric, measured, unit, around))
            rows.append(Row(BENCH, case.name, "plan", metric, predicted, unit))
            rows.append(Row(BENCH, case.name, "plan", f"{metric} error", 100 * (predicted / measured - 1), "%"))
    return rows


def _probe(rank: int, world: int) -> list[float]:
    """Operations per second in fp32 and bf16, bytes per second of a copy, while the other rank does the same."""
    rates = [peak_flops(torch.device("cpu"), dtype) for dtype in (torch.float32, torch.bfloat16)]
    source, target = torch.ones(1 << 24), torch.empty(1 << 24)
    taken = []
    for _ in range(8):
        begin = time.perf_counter()
        target.copy_(source)
        taken.append(time.perf_counter() - begin)
    return [*rates, 2 * source.nbytes / statistics.median(taken)]


def _probe_links(rank: int, world: int) -> list[float]:
    assert dist.group.WORLD is not None
    return list(measure_rates(Network(dist.group.WORLD))["intra"])


def prepare(rank: int, world: int, case: tuple) -> None:
    """Builds a case on this rank, in place of the one before."""
    _KEPT[:] = [_Steps(Case(*case).config, Ranks(rank, rank, world, torch.device("cpu")))]


def _seconds(rank: int, world: int) -> float:
    """Of one step, which all ranks begin together."""
    dist.barrier()
    begin = time.perf_counter()
    _KEPT[0].step()
    return time.perf_counter() - begin


def weigh(rank: int, world: int) -> dict[str, float]:
    """What a step needs on this rank: `peak` bytes, and `sent` bytes."""
    steps, peaks = _KEPT[0], []
    for _ in range(3):
        steps.trainer.optimizer.zero_grad(set_to_none=True)
        peaks.append(peak_of(steps.step))
    with Census() as census:
        steps.step()
    # Gloo's thread now and then lets go of what it has sent a moment late, and routing differs from step to step (the
    # least peak would be the most even one's): the middle one repeats.
    peak = steps.standing() + statistics.median_low(peaks)
    return {"peak": peak, "sent": sum(moved.bytes for moved in census.moved.values())}


class _Steps:
    """Steps of the real loop on text of random words."""

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        keep_freed_memory()
        self.trainer = _trainer(config, ranks)
        self.data = iter(self.trainer.steps(0))
        for _ in range(2):
            self.step()

    def step(self) -> None:
        self.trainer.step(self.data)

    def standing(self) -> int:
        """Bytes that live between steps: masters and moments."""
        state = self.trainer.optimizer.state
        kept = [t for p in self.trainer.parameters for t in (p, *state[p].values()) if t.dim()]
        return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in kept)


_KEPT: list[_Steps] = []


def _trainer(config: TrainConfig, ranks: Ranks) -> Trainer:
    degrees, chosen = config.parallel, layout(config, ranks.world)
    mesh = build_mesh("cpu", dp_replicate=degrees.dp_replicate, tp=degrees.tp, ep=degrees.ep, etp=degrees.etp)
    model = parallelize(
        GPT(config.model, device="meta"),
        mesh,
        dtype=getattr(torch, degrees.dtype),
        reshard=degrees.reshard,
        exchanging=exchanging(config),
    )
    model.init_weights(0)
    model.recompute = degrees.recompute
    share = config.batch_size // chosen.data_ranks
    micro = config.micro_batch or share
    generator = torch.Generator().manual_seed(ranks.rank // chosen.tp)

    def steps(_: int) -> Iterator[list[Batch]]:
        shape = micro, config.seq_len + 1
        while True:
            texts = [
                torch.randint(config.model.vocab_size, shape, generator=generator) for _ in range(share // micro)
            ]
            yield [Batch(text[:, :-1].contiguous(), text[:, 1:].contiguous(), None) for text in texts]

    with tempfile.TemporaryDirectory() as folder:  # nothing is saved
        return Trainer(model, LanguageModelling(), steps, replace(config, run_dir=folder), ranks)


def peak_of(run: Callable[[], object]) -> int:
    """The most bytes that live at once of all that `run` takes from torch's allocator."""
    large, cpu_gemm._LARGE = cpu_gemm._LARGE, 1 << 62  # else large buffers come from numpy, unseen
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            run()
    finally:
        cpu_gemm._LARGE = large
    kineto: Any = recorded.profiler
    events = [e for e in kineto.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Hold the planner's predictions against steps of this machine.")
    parser.add_argument("--json", type=Path, help="write the tidy rows here")
    parser.add_argument("--quick", action="store_true", help="two cases of each number of ranks, few repeats")
    arguments = parser.parse_args()
    main(arguments.json, arguments.quick)
