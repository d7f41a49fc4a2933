"""Starting and ending a rank: torchrun's environment, or a single process without any."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import logging
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

# Options of mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """This process among all of them, with an open process group."""

    rank: int
    local_rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """True on the one rank that writes and prints."""
        return self.rank == 0

    @property
    def log(self) -> logging.Logger:
        """Says everything on rank 0, and warnings alone on the others."""
        return rank_logger(self.rank)

    def shutdown(self) -> None:
        """Closes the process group; safe to call twice."""
        if dist.is_initialized():
            dist.destroy_process_group()


def init_ranks(device: str | None = None, *, timeout_s: float = 1800) -> Ranks:
    """Opens the process group: gloo on CPU, NCCL (with gloo for CPU tensors) on CUDA.

    Args:
        device: "cpu", "cuda", or None for CUDA where there is one.
        timeout_s: how long a collective or a missing rank is waited for, in seconds.

    Raises:
        ValueError: half an environment or a broken one, no CUDA device for this rank, a master port in use, or a
            master out of reach.
    """
    given = [name for name in TORCHRUN[:2] if name in os.environ]
    missing = [name for name in TORCHRUN if name not in os.environ]
    if given and missing:
        raise ValueError(f"{' and '.join(given)} is set but {', '.join(missing)} is not: start the run with torchrun")
    rank, world = _number("RANK", 0), _number("WORLD_SIZE", 1)
    local_rank = _number("LOCAL_RANK", rank)
    if rank >= world:  # it would wait for ranks that never come
        raise ValueError(f"RANK={rank} is not one of WORLD_SIZE={world} ranks: they count from 0")
    if given and not 0 < _number("MASTER_PORT", 0) < 2**16:
        raise ValueError(f"MASTER_PORT={os.environ['MASTER_PORT']} is not a port: give 1 to 65535")
    chosen = _device(device, local_rank)
    if chosen.type == "cpu":
        keep_freed_memory()
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        timeout = datetime.timedelta(seconds=timeout_s)
        bound = chosen if chosen.type == "cuda" else None
        if given:
            _open(backend, timeout, bound)
        else:  # one process needs no port
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout, device_id=bound)
    rank_logger(rank)  # before anything has something to say
    return Ranks(rank, local_rank, world, chosen)


def keep_freed_memory() -> None:
    """Tells glibc's malloc to keep what is freed. By default it returns every block of over 32 MB to the system, and
    the page faults of the next one cost many times a pass over it: a training step on a CPU makes dozens of them."""
    with contextlib.suppress(OSError, AttributeError):  # another system, or another C library
        libc = ctypes.CDLL(None)
        for option, value in ((M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, (1 << 31) - 1), (M_TOP_PAD, 1 << 26)):
            libc.mallopt(option, value)


def rank_logger(rank: int) -> logging.Logger:
    """The logger `coterie`, to standard error: INFO on rank 0, WARNING with the rank's number on the others."""
    logger = logging.getLogger("coterie")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"rank {rank}: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    return logger


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(f"{name}={text!r} is not a whole number")
    return int(text)


def _device(name: str | None, local_rank: int) -> torch.device:
    if name not in (None, "cpu", "cuda"):
        raise ValueError(f"device {name!r} is not one of cpu, cuda")
    if name == "cpu" or (name is None and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch sees no CUDA device: use cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no CUDA device: this machine has {torch.cuda.device_count()}, "
            "so start that many processes at most"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _open(backend: str, timeout: datetime.timedelta, bound: torch.device | None) -> None:
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        dist.init_process_group(backend, timeout=timeout, device_id=bound)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        text = str(error)
        if "EADDRINUSE" in text or "address already in use" in text.lower():
            raise ValueError(
                f"port {port} on {address} is in use: choose another with torchrun --master-port or MASTER_PORT"
            ) from None
        raise ValueError(
            f"no answer from the first rank at {address}:{port}: check MASTER_ADDR, MASTER_PORT and WORLD_SIZE"
        ) from None
