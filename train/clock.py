"""Where a step's time goes, and how fast this machine multiplies matrices."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ..kernels.cpu_gemm import product
from ..parallel.traffic import LINKS, Sent, Traffic

SPANS: tuple[str, ...] = ("data", "forward", "alltoall", "backward", "optimizer")


# Dense bf16 peaks in FLOP/s, from the makers' data sheets; first match by the device's name.
_PEAKS = (
    ("GB200", 2.5e15),
    ("B200", 2.25e15),
    ("B100", 1.75e15),
    ("H200", 989.4e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989.4e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("A10G", 70e12),
    ("A10", 125e12),
)


class Clock:
    """Adds up the spans of one step: wall time on a CPU, CUDA events on a GPU.

    The all-to-alls inside "forward" and "backward" are timed and counted by the dispatchers' own traffic; their
    seconds become the span "alltoall", and the others are given without them.
    """

    def __init__(self, device: torch.device, traffic: Sequence[Traffic] = ()) -> None:
        self._cuda = device.type == "cuda"
        self._traffic = traffic
        self._seconds = dict.fromkeys(SPANS, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Times the block under one of SPANS."""
        if self._cuda and name != "data":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
            return
        begin = time.perf_counter()
        yield
        moved = 0.0 if self._cuda else self._moved()
        self._seconds[name] += time.perf_counter() - begin - moved
        self._seconds["alltoall"] += moved

    def forget_all_to_all(self) -> None:
        """All-to-alls since the last span are then counted nowhere."""
        self._moved()
        self._sent()

    def _moved(self) -> float:
        return sum(traffic.clock.read() for traffic in self._traffic)

    def _sent(self) -> dict[str, float]:
        layers = [traffic.read() for traffic in self._traffic]
        return {
            f"{link}_{name}": sum(getattr(layer[link], name) for layer in layers)
            for link in (LINKS if layers else ())
            for name in Sent._fields
        }

    def row(self) -> dict[str, dict[str, float]]:
        """A row's part since the last call: seconds of every span, and messages and bytes that this rank's
        dispatchers sent by kind of link (none without such dispatchers)."""
        return {"time": self.read(), "sent": self._sent()}

    def read(self) -> dict[str, float]:
        """Seconds of every span since the last call; on a GPU it waits for the work of these spans."""
        for name, start, end in self._events:
            end.synchronize()
            self._seconds[name] += start.elapsed_time(end) / 1e3
        if self._cuda:
            # Reading events waits for them, so it is done here alone; both passes move the same rows.
            moved = self._moved()
            self._seconds["alltoall"] += moved
            self._seconds["forward"] -= moved / 2
            self._seconds["backward"] -= moved / 2
        seconds, self._seconds = self._seconds, dict.fromkeys(SPANS, 0.0)
        self._events.clear()
        return seconds


def dispatch_traffic(model: nn.Module) -> list[Traffic]:
    """The counters of all expert-parallel dispatchers in a model."""
    dispatchers = (getattr(module, "dispatch", None) for module in model.modules())
    counters = (getattr(dispatch, "traffic", None) for dispatch in dispatchers)
    return [traffic for traffic in counters if isinstance(traffic, Traffic)]


def peak_flops(device: torch.device, dtype: torch.dtype, budget: float = 0.2) -> float:
    """FLOP/s that a step is held against: a GPU's data sheet where it is known for bf16, else a measured GEMM.

    On a CPU all ranks measure at the same time, because they share its cores when they train.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, peak in _PEAKS:
            if part in name:
                return peak
    size = 4096 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product(a, b)  # the first one also prepares
    best, end = float("inf"), time.perf_counter() + budget
    while best == float("inf") or time.perf_counter() < end:
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        product(a, b)  # torch.mm is not always a CPU's fastest
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2.0 * size**3 / best
