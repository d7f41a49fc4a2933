"""How much memory there is, how fast it is read, and how many blocks of keys and values to keep in it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn

_SHARES = {"cpu": 0.5, "cuda": 0.9}  # of what is free; other programs and the activations need the rest
_QUARTER = 4
_READ = {"cpu": 256 << 20, "cuda": 4 << 30}  # in no cache, and far longer than it takes to start


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_available(), _left_in_group())


def _available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _left_in_group(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Under the limit of a container; a great number where there is none."""
    files = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
    for most, used in files:
        try:
            return max(0, int((root / most).read_text()) - int((root / used).read_text()))
        except (OSError, ValueError):  # "max": no limit
            continue
    return 1 << 62


def count_blocks(
    kv_memory: int, block_bytes: int, block_size: int, *, max_model_len: int, max_sequences: int, device: torch.device
) -> int:
    """Blocks for keys and values: what `EngineConfig.kv_memory` says, or enough for many sequences of middling length
    in a share of the free memory, and for one of full length at least.

    Raises:
        ValueError: one sequence of max_model_len does not fit.
    """
    one = -(-max_model_len // block_size)
    if kv_memory:
        room, told = kv_memory // block_bytes, f"kv_memory {size_of(kv_memory)}"
        blocks = room
    else:
        free = free_memory(device)
        room = int(free * _SHARES.get(device.type, 0.5)) // block_bytes
        told = f"the free memory of {size_of(free)}"
        blocks = min(room, max(one, max_sequences * -(-max_model_len // _QUARTER // block_size)))
    if blocks < one:
        raise ValueError(
            f"{told} holds keys and values of {room * block_size} tokens, but one sequence may have {max_model_len}, "
            f"which take {size_of(one * block_bytes)}: lower max_model_len or kv_dtype, or give more kv_memory"
        )
    return blocks


def size_of(count: int) -> str:
    """Bytes as people write them."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"


@torch.inference_mode()
def read_rate(module: nn.Module) -> float:
    """Bytes a second at which the largest weights are read, from memory and by all threads; 0: they are too small to
    tell."""
    parts: list[Tensor] = []
    for weight in sorted(module.parameters(), key=lambda p: -p.numel()):
        size = weight.numel() * weight.element_size()
        if size >= 4 << 20 and size % 8 == 0 and weight.is_contiguous():
            parts.append(weight.detach().flatten().view(torch.uint8).view(torch.float32))
        if sum(part.nbytes for part in parts) >= _READ.get(weight.device.type, 256 << 20):
            break
    if not parts:
        return 0.0
    best = min(_read(parts) for _ in range(5))
    return sum(part.nbytes for part in parts) / best


def _read(parts: list[Tensor]) -> float:
    cuda = parts[0].is_cuda
    started = time.perf_counter()
    for part in parts:
        part.sum()
    if cuda:
        torch.cuda.synchronize(parts[0].device)
    return time.perf_counter() - started
