"""Standing gloo ranks of this machine: starting them costs more than most calls."""

from __future__ import annotations

import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TCPStore = dist.TCPStore  # pyright: ignore[reportPrivateImportUsage]


def preload() -> None:
    """Has the process from which ranks are forked import what they need, once for all of them."""
    names = ["torch.distributed.fsdp", "coterie.models.parallelize", "coterie.train.loop"]
    mp.get_context("forkserver").set_forkserver_preload(names)


def free_port() -> int:
    """A port of the loopback device that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def open_store(world: int) -> TCPStore:
    """Where ranks find each other, on a port of its own choice; it must outlive them."""
    return TCPStore("127.0.0.1", 0, world, is_master=True, wait_for_workers=False)


def open_rank(rank: int, world: int, port: int, threads: int = 1) -> None:
    """Makes this process a rank, as torchrun would. `port`: of a store."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(threads)
    store = TCPStore("127.0.0.1", port, world, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)


def _serve(rank: int, world: int, port: int, threads: int, folder: str, calls: Connection) -> None:
    open_rank(rank, world, port, threads)
    call: Any
    while (call := calls.recv()) is not None:
        fn, args = call
        try:
            torch.save(fn(rank, world, *args), os.path.join(folder, f"{rank}.pt"))
            calls.send(None)
        except Exception:
            calls.send(traceback.format_exc())
    dist.destroy_process_group()


class Pool:
    """`world` ranks of so many threads each, started by the first call. After a failure they are started anew."""

    def __init__(self, world: int, threads: int = 1) -> None:
        self.world, self.threads = world, threads
        self._folder = tempfile.TemporaryDirectory()
        self._ranks: list[tuple[Any, Connection]] = []
        self._store: TCPStore | None = None

    def run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """Calls `fn(rank, world, *args)` on every rank; returns what each gave (tensors, numbers, strings and
        containers of them). `fn` must live at the top of its file.

        Raises:
            AssertionError: what a rank raised.
        """
        if not self._ranks:
            self._start()
        for _, calls in self._ranks:
            calls.send((fn, args))
        waiting, problems = {calls: rank for rank, (_, calls) in enumerate(self._ranks)}, []
        while waiting and not problems:
            for calls in wait(list(waiting)):
                problem = calls.recv()  # type: ignore[union-attr]
                rank = waiting.pop(calls)  # type: ignore[arg-type]
                problems += [] if problem is None else [f"rank {rank}: {problem}"]
        if problems:
            self.close()  # the other ranks may wait for this one
            raise AssertionError("\n".join(problems))
        names = [os.path.join(self._folder.name, f"{rank}.pt") for rank in range(self.world)]
        return [torch.load(name, weights_only=True) for name in names]

    def _start(self) -> None:
        preload()
        context, self._store = mp.get_context("forkserver"), open_store(self.world)
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, self.world, self._store.port, self.threads, self._folder.name, theirs),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def close(self) -> None:
        """Ends the ranks."""
        for process, _ in self._ranks:
            process.kill()
            process.join()
        self._ranks, self._store = [], None
