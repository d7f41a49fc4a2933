"""`coterie plan`: every layout of a recipe on so many GPUs, what each needs and how long its step takes, on paper."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..models.fit import sizes
from ..parallel.layout import Layout, divisors, near
from .config import TrainConfig
from .machines import Machine
from .plan_memory import Memory, Run, memory
from .plan_time import Step, step_time
from .plan_traffic import Traffic, traffic

DEGREES = ("dp_replicate", "dp_shard", "tp", "ep", "etp")
_WORK = {"float32": 4, "bfloat16": 2}


class Row(NamedTuple):
    """One layout that fits."""

    layout: Layout
    run: Run
    memory: Memory
    traffic: Traffic
    step: Step


class Plan(NamedTuple):
    """Layouts that fit, fastest first, and how often each reason ruled others out."""

    rows: list[Row]
    undivided: Counter[str]
    too_large: Counter[str]
    smallest: Row | None
    """Of those that divide, the one that needs the least memory."""


def candidates(world: int, experts: Sequence[int], given: dict[str, int]) -> Iterator[Layout]:
    """Every factorisation of the ranks, feasible or not, with the given degrees."""
    most = max(experts, default=1)

    def degrees(name: str, number: int) -> list[int]:
        return [d for d in divisors(number) if given.get(name, d) == d]

    for tp in degrees("tp", world):
        for copies in degrees("dp_replicate", world // tp):
            if world // tp // copies not in degrees("dp_shard", world // tp):
                continue
            for etp in degrees("etp", world) if experts else [1]:
                for ep in [d for d in degrees("ep", world // etp) if d <= most]:
                    yield Layout(copies, world // tp // copies, tp, ep, etp)


def run_of(config: TrainConfig, layout: Layout, on: Machine) -> Run:
    """The micro-batches of a layout: the recipe's size, or the largest under it that divides a rank's share.

    Raises:
        ValueError: batch or sequence does not divide over the layout.
    """
    share, rest = divmod(config.batch_size, layout.data_ranks)
    if rest or not share:
        nearest = near(layout.data_ranks, divisors(config.batch_size))
        raise ValueError(
            f"batch_size {config.batch_size} does not divide over {layout.data_ranks} data ranks: {nearest}"
        )
    if config.seq_len % layout.tp:
        raise ValueError(f"tp={layout.tp} does not divide seq_len {config.seq_len}")
    micro = max(d for d in divisors(share) if d <= (config.micro_batch or share))
    parallel = config.parallel
    return Run(
        config.seq_len,
        micro,
        share // micro,
        _WORK[parallel.dtype],
        parallel.recompute,
        parallel.reshard,
        parallel.sync_every_micro,
        on.name == "cpu",
    )


def row_of(config: TrainConfig, layout: Layout, on: Machine, node: int) -> Row:
    """All that is predicted of one layout, whether it fits or not.

    Raises:
        ValueError: batch or sequence does not divide over it.
    """
    run = run_of(config, layout, on)
    on = on.shared(min(node, layout.world))
    needed = memory(config.model, layout, run)
    sent = traffic(config.model, layout, run, on, node)
    step = step_time(config, layout, run, sent, needed.parameters // 4, on)
    return Row(layout, run, needed, sent, step)


def plan(config: TrainConfig, gpus: int, on: Machine, node: int, given: dict[str, int] | None = None) -> Plan:
    """Judges every layout of `gpus` ranks on `node` of them a host.

    Args:
        given: degrees that are fixed, by the names of DEGREES.

    Raises:
        ValueError: ranks that do not fill nodes; degrees that leave no layout.
    """
    if gpus < 1 or node < 1:
        raise ValueError(f"--gpus {gpus} and --node {node} must be 1 or more")
    if gpus % node and gpus > node:
        below = gpus // node * node
        raise ValueError(f"--gpus {gpus} is not a multiple of --node {node}: use {below} or {below + node}")
    wanted = sizes(config.model)
    found, undivided, too_large, smallest = [], Counter[str](), Counter[str](), None
    limit = on.usable * on.shared(min(node, gpus)).memory
    for layout in candidates(gpus, wanted.experts, given or {}):
        try:
            problem = next(layout.problems(wanted), None)
            if problem:
                raise ValueError(problem)
            row = row_of(config, layout, on, node)
        except ValueError as error:
            undivided[str(error).partition(":")[0]] += 1
            continue
        if smallest is None or row.memory.peak < smallest.memory.peak:
            smallest = row
        if row.memory.peak <= limit:
            found.append(row)
        else:
            too_large[_largest(row.memory)] += 1
    found.sort(key=lambda row: (row.step.total, row.memory.peak))
    return Plan(found, undivided, too_large, smallest)


def _largest(needed: Memory) -> str:
    parts = needed._asdict()
    return max(parts, key=lambda name: parts[name])
