"""A device's clock and the rate of its memory, for benchmarks that run on a CPU or a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

READ_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}
_READS = {"cpu": 3, "cuda": 10}
_AHEAD = 1_000_000  # cycles, half a millisecond: the host has started all that is timed before the GPU comes to it


def seconds(run: Callable[[], object], device: str) -> float:
    """Of one run. On a GPU by events, behind work that keeps it busy meanwhile: starting costs nothing unless the
    host takes longer than that."""
    if device == "cpu":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(_AHEAD)
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def started(run: Callable[[], object], device: str) -> float:
    """Seconds of one run by the host's clock, from its start to the end of all its work."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def captured(run: Callable[[], object], device: str) -> Callable[[], object]:
    """What repeats a run without the host: a CUDA graph; on a CPU the run itself.

    Raises:
        RuntimeError: something in it waits for the device.
    """
    if device == "cpu":
        return run
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(2):  # compiles, and chooses tiles
            run()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class Memory:
    """Reads a large buffer, to know what memory gives at this moment."""

    def __init__(self, device: str) -> None:
        self._device, self._buffer = device, torch.ones(READ_BYTES[device] // 4, device=device)

    def rate(self) -> float:
        """Bytes a second, of the best of several reads by all threads."""
        return self._buffer.nbytes / min(seconds(self._buffer.sum, self._device) for _ in range(_READS[self._device]))
