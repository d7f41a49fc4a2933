"""Initial values by a parameter's name, so that they do not depend on how a model is cut over ranks."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from ..parallel.tensor import local_part
from .config import ModelConfig
from .shards import local_box


def draw(seed: int, name: str, shape: tuple[int, ...], std: float) -> Tensor:
    """fp32 normal values on the CPU that depend on (seed, name, shape) alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape, device="cpu", dtype=torch.float32).normal_(0.0, std, generator=generator)


def std_of(name: str, config: ModelConfig) -> float | None:
    """The rule for one parameter or buffer: its standard deviation; 0 means zeros, None means ones."""
    owner, _, kind = name.rpartition(".")
    if owner.endswith("norm"):
        return None if kind == "weight" else 0.0
    if kind in ("bias", "b_in", "b_out", "out_bias", "bias_E"):
        return 0.0
    if kind == "w_out" or owner.endswith("attention.out"):
        # The residual stream sums 2 * layers such outputs (GPT-2).
        return config.init_std / math.sqrt(2 * config.layers)
    return config.init_std


@torch.no_grad()
def init_weights(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fills every parameter and buffer of a materialised model; each expert has its own stream of numbers."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        std, local = std_of(name, config), local_part(tensor)
        if not std:
            local.fill_(1.0 if std is None else 0.0)
            continue
        box = local_box(tensor)
        if ".experts." not in name:
            local.copy_(draw(seed, name, tuple(tensor.shape), std)[box])
            continue
        for row, expert in enumerate(range(box[0].start, box[0].stop)):
            local[row].copy_(draw(seed, f"{name}.{expert}", tuple(tensor.shape[1:]), std)[box[1:]])
