"""Every collective of a stretch of code, counted where it is dispatched: whoever started it, in backward too."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "alltoall_base_": "all_to_all",
}


class Moved(NamedTuple):
    """Collectives of one kind, and the bytes that this rank sends to others in them.

    all-gather: its part to each other rank; reduce-scatter: each other rank's part; all-reduce: both of these (a
    ring); all-to-all: what is not for itself.
    """

    calls: int = 0
    bytes: float = 0.0


class Census(TorchDispatchMode):
    """Counts collectives while it is entered, on the thread that enters it.

    Args:
        timed: let every collective wait first until all its ranks are there, then finish before going on. `wait` and
            `exchange` add up the seconds of the two. That takes away every overlap: not for measuring a step's time.
    """

    def __init__(self, timed: bool = False) -> None:
        super().__init__()
        self.timed = timed
        self.moved: dict[str, Moved] = dict.fromkeys(KINDS.values(), Moved())
        self.wait = self.exchange = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = KINDS.get(func._opname) if func.namespace == "c10d" else None
        if kind is None:
            return func(*args, **(kwargs or {}))
        group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject) and _is_group(a))
        calls, size = self.moved[kind]
        self.moved[kind] = Moved(calls + 1, size + _bytes(kind, args, group))
        if not self.timed:
            return func(*args, **(kwargs or {}))
        begin = time.perf_counter()
        group.barrier().wait()
        ready = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        work = result[-1] if isinstance(result, tuple | list) else result
        dist.Work.unbox(work).wait()
        self.wait += ready - begin
        self.exchange += time.perf_counter() - ready
        return result


def _is_group(script: torch.ScriptObject) -> bool:
    return str(script._type()).endswith("ProcessGroup")


def _bytes(kind: str, args: Any, group: dist.ProcessGroup) -> float:
    others = group.size() - 1
    if kind == "all_reduce":
        return sum(t.nbytes for t in args[0]) * 2 * others / group.size()
    source: Tensor = args[1]
    if kind == "all_gather":
        return source.nbytes * others
    splits = args[4] if kind == "all_to_all" else []
    if not splits:
        return source.nbytes * others / group.size()
    row = source[:1].numel() * source.element_size()
    return (sum(splits) - splits[group.rank()]) * row
