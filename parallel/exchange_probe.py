"""Measures exchanges and links of a group at the start of a run, and picks the exchange that should be fastest."""

# Shapes: T tokens of a rank, K choices, R = T * K rows, D model.

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from .all_to_all import Lane, Network
from .collectives import all_reduce_max
from .cost import Batch, Choice, Rate
from .exchange import Exchange
from .exchange_dedup import EXCHANGES, make_exchange
from .traffic import Traffic

SMALL, LARGE = 1 << 8, 1 << 20  # bytes for each rank
FEW, MANY = 8, 2048  # tokens of a rank
WORTH = 1.03  # a simpler exchange that is slower by less is taken
TYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}

Line = tuple[float, float]
"""Seconds of a layer's forward and backward exchange: of any, and more for each token of a rank."""


def pick_exchange(
    network: Network,
    batch: Batch,
    device: torch.device | str = "cpu",
    *,
    lines: Mapping[str, Line] | None = None,
    override: str | None = None,
) -> Choice:
    """The exchange for batches of this kind: log the answer. Every rank must call with the same arguments.

    Args:
        lines: what `measure_exchanges` gave; None: measure now.
        override: take this one.
    """
    if network.nodes is None:  # nodes with different numbers of ranks
        return Choice(override or "flat", {})
    found = measure_exchanges(network, batch, device) if lines is None else lines
    predictions = {name: fixed + each * batch.tokens for name, (fixed, each) in found.items()}
    enough = WORTH * min(predictions.values())
    return Choice(override or next(n for n, seconds in predictions.items() if seconds <= enough), predictions)


def measure_exchanges(
    network: Network, batch: Batch, device: torch.device | str = "cpu", repeats: int = 5
) -> dict[str, Line]:
    """Runs every exchange with few tokens and with many, evenly routed, for the shapes of `batch`. It sees all that
    formulas of messages and bytes leave out: copies, and waiting for each other at every collective. Every rank must
    call, and all get the same numbers, those of the slowest."""
    at, many = torch.device(device), max(2 * FEW, min(batch.tokens, MANY))
    runs = [
        _round_trip(make_exchange(name, network), network, batch._replace(tokens=tokens), at)
        for tokens in (FEW, many)
        for name in EXCHANGES
    ]
    taken: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats + 1):
        for run, seconds in zip(runs, taken, strict=True):
            seconds.append(_time(run, at))
    medians = torch.tensor([statistics.median(seconds[1:]) for seconds in taken], dtype=torch.float64)
    slowest = all_reduce_max(medians.to(at), network.group).view(2, -1).T.tolist()
    lines = {}
    for name, (small, large) in zip(EXCHANGES, slowest, strict=True):
        each = max(0.0, large - small) / (many - FEW)
        lines[name] = small - each * FEW, each
    return lines


def _round_trip(exchange: Exchange, network: Network, batch: Batch, device: torch.device) -> Callable[[], None]:
    """Rows to experts that answer with what they get, and back, forward and backward."""
    generator = torch.Generator().manual_seed(network.group.rank())
    ids_TK = torch.rand(batch.tokens, batch.experts, generator=generator).topk(batch.top_k).indices.to(device)
    order_R = ids_TK.flatten().argsort(stable=True)
    slot_TK = order_R.argsort().view_as(ids_TK)
    counts_CPL = ids_TK.flatten().bincount(minlength=batch.experts).view(1, len(network.members), -1)
    dtype = TYPES[batch.element_bytes]
    x_RD = torch.randn(batch.tokens, batch.dim, device=device).to(dtype)[order_R // batch.top_k].requires_grad_()

    def run() -> None:
        (trip,) = exchange.prepare(ids_TK, slot_TK, counts_CPL)
        trip.reply(trip.send(x_RD)())().backward(x_RD.detach())
        x_RD.grad = None

    return run


def measure_rates(network: Network, device: torch.device | str = "cpu", repeats: int = 7) -> dict[str, Rate]:
    """Latency, bandwidth and cost of a message for each kind of link, while all ranks use it at once. Some tens of
    all-to-alls; every rank must call, and all get the same numbers, those of the slowest."""
    nodes, traffic, at = network.grid(), Traffic(), torch.device(device)
    within, across = network.within(traffic, False), network.across(traffic, False)
    whole = network.whole(traffic, False)
    uses = ((within, SMALL), (within, LARGE), (across, SMALL), (across, LARGE), (whole, SMALL))
    taken = torch.tensor([_swap_seconds(lane, size, at, repeats) for lane, size in uses], dtype=torch.float64)
    inner, inner_large, outer, outer_large, all_small = all_reduce_max(taken.to(at), network.group).tolist()
    N, G, P = *nodes, nodes.ranks
    # The whole group's small exchange waits for the same far link as that across nodes, and has more messages.
    message = max(0.0, all_small - outer) / (P - N) if N > 1 and G > 1 else 0.0
    return {
        "intra": _rate(inner, inner_large, G - 1, message),
        "inter": _rate(outer, outer_large, N - 1, message),
    }


def _swap_seconds(lane: Lane, size: int, device: torch.device, repeats: int) -> float:
    if len(lane.links) == 1:
        return 0.0
    # New ones each time: a step's rows are not in a CPU's cache either.
    parcels = [torch.zeros(len(lane.links), size, dtype=torch.uint8, device=device) for _ in range(repeats + 2)]
    return statistics.median([_time(lambda x=x: lane.swap(x)(), device) for x in parcels][2:])


def _rate(small: float, large: float, messages: int, message: float) -> Rate:
    if messages < 1:
        return Rate(0.0, float("inf"))
    moved = messages * (LARGE - SMALL)
    return Rate(max(0.0, small - messages * message), moved / max(large - small, 1e-9), message)


def _time(run: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
