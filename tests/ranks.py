"""Runs one function on several gloo ranks of this machine."""

import os
import socket
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _worker(rank: int, fn: Callable[..., Any], world: int, port: int, folder: str, args: tuple) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        result = fn(rank, world, *args)
        torch.save(result, os.path.join(folder, f"{rank}.pt"))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run_ranks(fn: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """Calls `fn(rank, world, *args)` on `world` spawned gloo ranks; returns what each gave (tensors, numbers,
    strings and containers of them). `fn` must live at the top of its test file."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, args=(fn, world, _free_port(), folder, args), nprocs=world, join=True)
        return [torch.load(os.path.join(folder, f"{rank}.pt"), weights_only=True) for rank in range(world)]
