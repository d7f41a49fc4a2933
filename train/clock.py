"""Where a step's time goes, and how fast this machine multiplies matrices."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

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
    """Adds up named spans of one step: wall time on a CPU, CUDA events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        if self._cuda and name != "data":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
            return
        begin = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - begin)

    def add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def read(self) -> dict[str, float]:
        """Seconds of every span since the last call; on a GPU it waits for the work of these spans."""
        for name, start, end in self._events:
            end.synchronize()
            self.add(name, start.elapsed_time(end) / 1e3)
        seconds, self._seconds = self._seconds, {}
        self._events.clear()
        return seconds


def peak_flops(device: torch.device, dtype: torch.dtype, budget: float = 0.2) -> float:
    """FLOP/s that a step is held against: a GPU's data sheet where it is known for bf16, else a measured GEMM.

    On a CPU all ranks measure at the same time, because they share its cores when they train.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, peak in _PEAKS:
            if part in name:
                return peak
    size = 4096 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + budget
    torch.mm(a, b)
    while time.perf_counter() < end:
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2.0 * size**3 / best
