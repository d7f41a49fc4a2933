"""What the planner must know of this machine, measured on ranks: its cores, and its links at a number of ranks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..models.config import ModelConfig
from ..models.gpt import GPT
from ..models.params import flops_per_token
from ..parallel.all_to_all import Lane, Network
from ..parallel.cost import Rate
from ..parallel.exchange_probe import measure_rates
from ..parallel.launch import keep_freed_memory
from ..parallel.tensor import all_gather_single, reduce_scatter_single
from ..parallel.traffic import Traffic
from ..train.clock import peak_flops
from ..train.machines import MACHINES, Links, Machine, Rings
from ..train.plan_time import BLOCK, ENDS

DENSE = ModelConfig(vocab_size=2048, max_positions=128, layers=4, dim=256, heads=4, hidden=768)
SEQUENCE = 128
FEW, MANY = 1, 8  # sequences of a pass: their line's slope is a rate, and where it begins is what operators cost
SMALL, LARGE = 1 << 8, 1 << 20  # bytes of a rank's shard
TYPES = (torch.float32, torch.bfloat16)
KINDS = ("gather", "scatter", "total")


def probe_core(rank: int, world: int) -> list[float]:
    """While the other ranks do the same: FLOP/s of large products in fp32 and bf16, bytes per second of a copy, and
    seconds of DENSE's two passes in each type, with FEW sequences and with MANY."""
    keep_freed_memory()
    rates = [peak_flops(torch.device("cpu"), dtype) for dtype in TYPES]
    source, target = torch.ones(1 << 24), torch.empty(1 << 24)
    copy = _median(lambda: target.copy_(source), 8)
    return [*rates, 2 * source.nbytes / copy, *(_passes(dtype, n) for dtype in TYPES for n in (FEW, MANY))]


def _passes(dtype: torch.dtype, sequences: int) -> float:
    """Median seconds of a forward and a backward pass, after some: the first ones compile products."""
    model = GPT(DENSE)
    model.init_weights(0)
    model.to(dtype)
    ids = torch.randint(DENSE.vocab_size, (sequences, SEQUENCE))

    def run() -> None:
        out = model(ids, targets_BS=ids)
        assert out.lm is not None
        out.lm.backward()
        model.zero_grad(set_to_none=True)

    return _median(run, 11)


def machine_of(found: Sequence[float], cores: int) -> Machine:
    """One core, from what `probe_core` found while all were at work. Its links are still those of the table."""
    fp32, bf16, copied, *seconds = found
    one = flops_per_token(DENSE, SEQUENCE) * SEQUENCE
    few, many, few16, many16 = seconds
    slopes = (max(many - few, 1e-9) / (MANY - FEW), max(many16 - few16, 1e-9) / (MANY - FEW))
    launch = max(0.0, few - FEW * slopes[0]) / (ENDS + DENSE.layers * BLOCK)
    figures: dict[str, Any] = {"fp32": fp32, "bf16": bf16, "memory_rate": copied, "launch": launch, "cores": cores}
    fractions = {"fraction": one / slopes[0] / fp32, "fraction_bf16": one / slopes[1] / bf16}
    return replace(MACHINES["cpu"], **figures, **fractions)


def probe_links(rank: int, world: int) -> list[list[list[float]]]:
    """Rates within nodes and across, of all-to-alls and of each kind of ring, while all ranks use them at once."""
    keep_freed_memory()
    assert dist.group.WORLD is not None
    network = Network(dist.group.WORLD)
    rates, traffic = measure_rates(network), Traffic()
    found = [[list(rates["intra"]), list(rates["inter"])]]
    lanes = network.within(traffic, False), network.across(traffic, False)
    for kind in KINDS:
        found.append([list(_ring_rate(kind, lane)) for lane in lanes])
    return found


def with_links(on: Machine, found: Sequence[Sequence[Sequence[float]]]) -> Machine:
    """The machine with the links that `probe_links` found."""
    exchange, *rings = (Links(*(Rate(*rate) for rate in links)) for links in found)
    if exchange.inter.bandwidth == float("inf"):  # one node: nothing asks for the others
        exchange, *rings = (Links(links.intra, links.intra) for links in (exchange, *rings))
    return replace(on, intra=exchange.intra, inter=exchange.inter, rings=Rings(*rings))


def _ring_rate(kind: str, lane: Lane) -> Rate:
    """All that a small one takes is its hops."""
    n, rounds = len(lane.links), 2 if kind == "total" else 1
    if n == 1:
        return Rate(0.0, float("inf"))
    small, large = (_ring_seconds(kind, lane, size) for size in (SMALL, LARGE))
    hops = rounds * (n - 1)
    return Rate(0.0, hops * (LARGE - SMALL) / max(large - small, 1e-9), small / hops)


def _ring_seconds(kind: str, lane: Lane, size: int, repeats: int = 11) -> float:
    """Median seconds on the slowest rank. Each repeat has tensors of its own: a step's are in no cache either."""
    n = len(lane.links)
    pairs = iter([(torch.zeros(size // 4), torch.zeros(n * size // 4)) for _ in range(repeats + 3)])
    calls: dict[str, Callable[[Tensor, Tensor], object]] = {
        "gather": lambda shard, whole: all_gather_single(whole, shard, group=lane.group),
        "scatter": lambda shard, whole: reduce_scatter_single(shard, whole, group=lane.group),
        "total": lambda shard, whole: dist.all_reduce(whole, group=lane.group),
    }
    taken = torch.tensor(_median(lambda: calls[kind](*next(pairs)), repeats))
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return taken.item()


def _median(run: Callable[[], object], repeats: int) -> float:
    taken = []
    for _ in range(repeats + 3):
        begin = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[3:])
