"""Runs functions on several gloo ranks of this machine."""

import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from coterie.benchmarks.pool import Pool, open_rank, open_store, preload

__all__ = ["Pool", "run_ranks"]


def _worker(rank: int, fn: Callable[..., Any], world: int, port: int, folder: str, args: tuple) -> None:
    open_rank(rank, world, port)
    try:
        result = fn(rank, world, *args)
        torch.save(result, os.path.join(folder, f"{rank}.pt"))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run_ranks(fn: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """Calls `fn(rank, world, *args)` on `world` new gloo ranks; returns what each gave (tensors, numbers,
    strings and containers of them). `fn` must live at the top of its test file."""
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(world)
        preload()
        mp.start_processes(_worker, (fn, world, store.port, folder, args), world, start_method="forkserver")
        return [torch.load(os.path.join(folder, f"{rank}.pt"), weights_only=True) for rank in range(world)]
