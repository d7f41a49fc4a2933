"""The all-to-all of expert parallelism: counts, then rows, differentiable, timed."""

# Shapes: P ranks, E experts, L = E / P experts of one rank, R rows sent, Q rows received, D model.

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Clock:
    """Adds up the time between `start` and `stop`: seconds of this process on CPU, device events on CUDA."""

    def __init__(self) -> None:
        self._seconds, self._events = 0.0, []

    def start(self, device: torch.device) -> Any:
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self, started: Any) -> None:
        if isinstance(started, float):
            self._seconds += time.perf_counter() - started
        else:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append((started, event))

    def read(self) -> float:
        """Seconds since the last reading. On CUDA it waits for the recorded work: call it when a step is logged."""
        seconds, self._seconds = self._seconds, 0.0
        for begin, end in self._events:
            end.synchronize()
            seconds += begin.elapsed_time(end) / 1e3
        self._events.clear()
        return seconds


def exchange_counts(counts_E: Tensor, group: dist.ProcessGroup, clock: Clock | None = None) -> Tensor:
    """Tells every rank how many rows it gets. Returns counts_PL: rows from rank p for my local expert l. int64."""
    counts_PL = counts_E.view(group.size(), -1)
    if group.size() == 1:
        return counts_PL
    return _swap(counts_PL, None, None, group, clock)


def all_to_all_rows(
    x_RD: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup, clock: Clock | None = None
) -> Tensor:
    """Sends rows to the ranks of the group and returns what they send, in the order of the ranks. Differentiable.

    Args:
        x_RD: the rows for rank 0, then those for rank 1, ...
        send, receive: rows to and from each rank; zeros are fine, but every rank must call, forward and backward.
    """
    if group.size() == 1:
        return x_RD
    return _AllToAll.apply(x_RD, send, receive, group, clock)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, send: list[int], receive: list[int], group: Any, clock: Clock | None
    ) -> Tensor:
        ctx.settings = (receive, send, group, clock)
        return _swap(x_RD, send, receive, group, clock)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _swap(grads[0], *ctx.settings), None, None, None, None


def _swap(
    x: Tensor, send: list[int] | None, receive: list[int] | None, group: dist.ProcessGroup, clock: Clock | None
) -> Tensor:
    x = x.contiguous()
    out = x.new_empty(x.shape if receive is None else (sum(receive), *x.shape[1:]))
    started = None if clock is None else clock.start(x.device)
    dist.all_to_all_single(out, x, receive, send, group=group)
    if clock is not None:
        clock.stop(started)
    return out
