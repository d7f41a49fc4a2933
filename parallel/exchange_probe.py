"""Measures the links of a group at the start of a run, and picks the exchange that should be fastest on them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch

from .all_to_all import Lane, Network
from .collectives import all_reduce_max
from .cost import Batch, Choice, Rate, choose_exchange
from .traffic import Traffic

SMALL, LARGE = 1 << 8, 1 << 20  # bytes for each rank


def measure_rates(network: Network, device: torch.device | str = "cpu", repeats: int = 7) -> dict[str, Rate]:
    """Latency, bandwidth and cost of a message for each kind of link, while all ranks use it at once. Some tens of
    all-to-alls; every rank must call, and all get the same numbers, those of the slowest."""
    nodes, traffic, at = network.grid(), Traffic(), torch.device(device)
    lanes = [network.within(traffic, False), network.across(traffic, False), network.whole(traffic, False)]
    taken = [_seconds(lane, size, at, repeats) for lane in lanes for size in (SMALL, LARGE)]
    slowest = all_reduce_max(torch.tensor(taken, dtype=torch.float64).to(at), network.group).tolist()
    inner, inner_large, outer, outer_large, whole, _ = slowest
    N, G, P = *nodes, nodes.ranks
    return {
        "intra": _rate(inner, inner_large, G - 1, _message(whole, inner, P - G)),
        "inter": _rate(outer, outer_large, N - 1, _message(whole, outer, P - N)),
    }


def pick_exchange(
    network: Network,
    batch: Batch,
    device: torch.device | str = "cpu",
    *,
    rates: Mapping[str, Rate] | None = None,
    override: str | None = None,
) -> Choice:
    """The exchange for batches of this kind: log the answer. Every rank must call with the same arguments.

    Args:
        rates: what `measure_rates` gave, or what is known; None: measure now.
        override: take this one.
    """
    if network.nodes is None:  # nodes with different numbers of ranks
        return Choice(override or "flat", {})
    measured = measure_rates(network, device) if rates is None else rates
    return choose_exchange(batch, network.nodes, measured, override=override)


def _seconds(lane: Lane, size: int, device: torch.device, repeats: int) -> float:
    if len(lane.links) == 1:
        return 0.0
    parcels = torch.zeros(len(lane.links), size, dtype=torch.uint8, device=device)
    taken = []
    for _ in range(repeats + 2):
        _wait(device)
        begin = time.perf_counter()
        lane.swap(parcels)()
        _wait(device)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[2:])


def _message(whole: float, part: float, more: int) -> float:
    """Seconds of one message more: the whole group's small exchange has `more` of them than that of a part."""
    return max(0.0, whole - part) / more if more > 0 and part > 0 else 0.0


def _rate(small: float, large: float, messages: int, message: float) -> Rate:
    if messages < 1:
        return Rate(0.0, float("inf"))
    moved = messages * (LARGE - SMALL)
    return Rate(max(0.0, small - messages * message), moved / max(large - small, 1e-9), message)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
