"""Timing side by side: every repeat runs every contender once, so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch


def interleaved(
    runs: Mapping[str, Callable[[], object]], repeats: int, device: str = "cpu", warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of every repeat of every run. The order is reversed on odd repeats."""
    for _ in range(warmup):
        for run in runs.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for repeat in range(repeats):
        for name in names if repeat % 2 == 0 else reversed(names):
            _wait(device)
            start = time.perf_counter()
            runs[name]()
            _wait(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """The median, and half the distance between the quartiles."""
    if len(values) < 2:
        return values[0], 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, (high - low) / 2


def ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Repeat by repeat, so that what disturbs both cancels."""
    return [value / other for value, other in zip(values, base, strict=True)]


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
