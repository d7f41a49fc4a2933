"""`coterie bench plan`: what the planner predicts beside what training steps on this machine's ranks need.

This machine is measured first: products, copies, and a dense model's passes on each core, and at every number of
ranks the collectives between them. How long ranks wait for each other is taken from one case, the reference, whose
steps then take turns with those of each case: a busy machine slows both, and predictions are scaled by as much. Peaks
are those of torch's allocator, bytes those of a census of all collectives, and both repeat. Seconds are medians.
Ranks beyond the cores share them.
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
from ..parallel.census import Census
from ..parallel.launch import Ranks, keep_freed_memory
from ..parallel.mesh import build_mesh
from ..train.config import ParallelConfig, TrainConfig, exchanging, layout
from ..train.data import Batch
from ..train.loop import Trainer
from ..train.machines import Machine
from ..train.objective import LanguageModelling
from ..train.plan import Row as Planned
from ..train.plan import row_of
from .plan_probe import DENSE, SEQUENCE, machine_of, probe_core, probe_links, with_links
from .pool import Pool
from .rows import Row, show, write
from .timing import median_and_spread

BENCH = "plan"
WARM = 8  # oneDNN compiles a product for each new number of rows, and routing makes new ones for some time
_MOE = replace(DENSE, experts=(0, 8, 0, 8), moe=MoEConfig(top_k=2, hidden=384))
_PR_MOE = replace(DENSE, experts=(0, 4, 0, 8), moe=MoEConfig(top_k=1, hidden=384, residual=True))


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
            seq_len=SEQUENCE, batch_size=16, micro_batch=self.micro_batch, model=self.model, parallel=self.parallel
        )


# The case that tells how long ranks wait for each other; its own step is right by construction.
REFERENCE = Case("dense, FSDP 2", 2, DENSE)
CASES = (
    Case("dense, 1 rank", 1, DENSE),
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
    cores, repeats = core_count(), 3 if quick else 7
    rows: list[Row] = []
    reference = Pool(REFERENCE.world)
    machine, usual = calibrated(reference, cores, repeats)
    for world in sorted({case.world for case in CASES}):
        pool = Pool(world, max(1, cores // world))
        cases = [case for case in CASES if case.world == world]
        on = with_links(_cores_of(pool, machine, cores), pool.run(probe_links)[0])
        for case in cases[:2] if quick else cases:
            pool.run(prepare, tuple(case), 2 if quick else WARM)
            beside, taken = [], []
            for _ in range(repeats):
                beside.append(max(reference.run(seconds_of_step)))
                taken.append(max(pool.run(seconds_of_step)))
            slow = statistics.median(beside) / usual
            rows += compare(case, pool.run(weigh), on, taken, slow=slow)
            if json is not None:
                write(rows, json)
        pool.close()
    reference.close()
    report(rows)
    return rows


def _cores_of(pool: Pool, machine: Machine, cores: int) -> Machine:
    """What a rank of the pool computes with: a share of the cores; several threads wait for each other, so they are
    measured together."""
    if pool.threads == 1:
        return machine.shared(pool.world)
    return replace(machine_of(pool.run(probe_core)[0], cores), waits=machine.waits, cores=0)


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def calibrated(reference: Pool, cores: int, repeats: int) -> tuple[Machine, float]:
    """One core of this machine, with the links of two ranks; and seconds of the reference's step, which the pool then
    keeps ready."""
    machine = machine_of(reference.run(probe_core)[0], cores)
    on = with_links(machine.shared(REFERENCE.world), reference.run(probe_links)[0])
    reference.run(prepare, tuple(REFERENCE), WARM)
    usual = statistics.median(max(reference.run(seconds_of_step)) for _ in range(2 * repeats))
    return replace(machine, waits=waits(on, usual)), usual


def waits(on: Machine, seconds: float) -> float:
    """What makes the prediction of the reference true: seconds of waiting for each one of computing."""
    step = planned(REFERENCE, replace(on, waits=0.0)).step
    return max(0.0, seconds - step.total) / (step.compute + step.launch)


def report(rows: Sequence[Row]) -> None:
    """Shows the rows but for the parts of steps, and what is left to be wrong; the reference's time is no finding."""
    show([row for row in rows if not row.metric.startswith("part ")])
    for metric in ("peak error", "bytes error", "step error"):
        counted = [r for r in rows if r.metric == metric and (metric != "step error" or r.case != REFERENCE.name)]
        errors = [abs(row.value) for row in counted]
        print(f"{metric}: median {statistics.median(errors):.1f}%, largest {max(errors):.1f}%")


def planned(case: Case, on: Machine, node: int = 0) -> Planned:
    """The planner's row of a case; `node` ranks on a host, 0: all."""
    return row_of(case.config, layout(case.config, case.world), on, node or case.world)


def compare(
    case: Case,
    found: Sequence[dict[str, float]],
    on: Machine,
    seconds: Sequence[float] = (),
    *,
    slow: float = 1.0,
    node: int = 0,
) -> list[Row]:
    """Rows of one case: the fullest rank's peak, the mean of bytes sent, `seconds` of steps; predicted, measured.

    Args:
        slow: how much slower than usual the machine was.
        node: ranks of a host; 0: all.
    """
    plan = planned(case, on, node)
    predicted_bytes, sent = sum(flow.sent for flow in plan.traffic), statistics.mean(rank["sent"] for rank in found)
    middle, spread = median_and_spread(list(seconds)) if seconds else (0.0, 0.0)
    pairs = {
        "peak": (plan.memory.peak / 2**20, max(rank["peak"] for rank in found) / 2**20, "MiB", None),
        "bytes": (predicted_bytes / 2**20, sent / 2**20, "MiB", None),
        "step": (plan.step.total * slow * 1e3, middle * 1e3, "ms", spread * 1e3),
    }
    rows = []
    for metric, (predicted, measured, unit, around) in pairs.items():
        if measured:
            rows.append(Row(BENCH, case.name, "run", metric, measured, unit, around))
            rows.append(Row(BENCH, case.name, "plan", metric, predicted, unit))
            rows.append(Row(BENCH, case.name, "plan", f"{metric} error", 100 * (predicted / measured - 1), "%"))
    if seconds:
        parts = plan.step._asdict().items()
        rows += [Row(BENCH, case.name, "plan", f"part {name}", part * slow * 1e3, "ms") for name, part in parts]
    return rows


def prepare(rank: int, world: int, case: tuple, warm: int = 2) -> None:
    """Builds a case on this rank, in place of the one before, and makes `warm` steps."""
    _KEPT[:] = [_Steps(Case(*case).config, Ranks(rank, rank, world, torch.device("cpu")), warm)]


def seconds_of_step(rank: int, world: int) -> float:
    """Of one step, which all ranks begin together."""
    dist.barrier()
    begin = time.perf_counter()
    _KEPT[0].step()
    return time.perf_counter() - begin


def weigh(rank: int, world: int) -> dict[str, float]:
    """What a step needs on this rank: `peak` bytes, `sent` bytes, and all-reduces (`told`)."""
    steps, peaks = _KEPT[0], []
    for _ in range(3):
        steps.trainer.optimizer.zero_grad(set_to_none=True)
        peaks.append(peak_of(steps.step))
    with Census() as census:
        steps.step()
    # Gloo's thread now and then lets go of what it has sent a moment late, and routing differs from step to step (the
    # least peak would be the most even one's): the middle one repeats.
    peak = steps.standing() + statistics.median_low(peaks)
    sent = sum(moved.bytes for moved in census.moved.values())
    return {"peak": peak, "sent": sent, "told": census.moved["all_reduce"].calls}


class _Steps:
    """Steps of the real loop on text of random words."""

    def __init__(self, config: TrainConfig, ranks: Ranks, warm: int) -> None:
        keep_freed_memory()
        self.trainer = _trainer(config, ranks)
        self.data = iter(self.trainer.steps(0))
        for _ in range(warm):
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
