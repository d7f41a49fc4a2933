"""Models, a batch and standing ranks for the tests of layouts."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from ranks import Pool
from torch import Tensor
from torch.distributed.tensor import DTensor

from coterie.models.config import ModelConfig, RopeScaling
from coterie.models.gpt import GPT
from coterie.moe.config import GateConfig, MoEConfig

# A pyramid, grouped queries with norms, a tied head and a residual expert; no two axes are of one size.
MODERN = ModelConfig(
    vocab_size=37,
    max_positions=16,
    layers=4,
    dim=24,
    heads=8,
    kv_heads=4,
    head_dim=6,
    hidden=40,
    qk_norm="head",
    experts=(0, 2, 4, 8),
    moe=MoEConfig(top_k=2, hidden=16, residual=True, gate=GateConfig(aux_weight=0.05, z_weight=0.01)),
)
# Biases everywhere, learned positions, a head of its own, a gated shared expert, a loss per sequence.
GPT2 = replace(
    MODERN,
    layers=3,
    experts=(0, 4, 8),
    heads=8,
    kv_heads=0,
    activation="gelu",
    norm="layernorm",
    positions="learned",
    attention_bias="all",
    mlp_bias=True,
    qk_norm="none",
    tied_head=False,
    moe=MoEConfig(
        top_k=1,
        hidden=20,
        activation="gelu",
        bias=True,
        shared_hidden=10,
        shared_gate=True,
        gate=GateConfig(aux_weight=0.05, z_weight=0.01, aux_scope="sequence"),
    ),
)
# Every second assignment or so is dropped: a rank's capacity counts its own tokens.
CAPACITY = replace(
    MODERN,
    layers=2,
    experts=(4, 8),
    moe=replace(MODERN.moe, gate=replace(MODERN.moe.gate, capacity_factor=0.75, min_capacity=1)),
)
# What checkpoints from elsewhere need: norms over all heads, no bias behind attention, slower rotations, one balance
# loss for all layers.
OLMOE = replace(
    MODERN,
    layers=3,
    experts=(4, 0, 4),
    qk_norm="all",
    attention_bias="qkv",
    mlp_bias=True,
    rope_scaling=RopeScaling("llama3", 3.0, original_max_positions=12),
    moe=MoEConfig(top_k=2, hidden=20, gate=GateConfig(renormalize="none", aux_weight=0.3, aux_over="model")),
)
CONFIGS = {"modern": MODERN, "gpt2": GPT2, "capacity": CAPACITY, "olmoe": OLMOE}
BATCH, SEQUENCE = 8, 16


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets, validity: some sequences are whole, others short, one is padding alone."""
    generator = torch.Generator().manual_seed(7)
    text_BS = torch.randint(0, MODERN.vocab_size, (BATCH, SEQUENCE + 1), generator=generator)
    valid_BS = torch.arange(SEQUENCE) < torch.tensor([16, 16, 11, 1, 0, 15, 16, 5])[:, None]
    return text_BS[:, :-1], text_BS[:, 1:].masked_fill(~valid_BS, -100), valid_BS


def losses(model: GPT, rows: slice, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """This rank's part of the globally normalised loss, and of its terms: lm, aux, z."""
    tokens_BS, targets_BS, valid_BS = (part.to(device) for part in batch())
    out = model(tokens_BS[rows], targets_BS=targets_BS[rows], valid_BS=valid_BS[rows])
    gate = model.config.moe.gate
    parts = torch.stack([out.lm, out.aux, out.z])
    counts = torch.stack([(targets_BS != -100).sum(), valid_BS.sum(), valid_BS.sum()])
    weights = torch.tensor([1.0, gate.aux_weight, gate.z_weight], device=device)
    return (parts / counts * weights).sum(), parts.detach()


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def share_of(rank: int, data_ranks: int, tp: int) -> slice:
    """The sequences that a rank reads."""
    share, place = BATCH // data_ranks, rank // tp
    return slice(place * share, (place + 1) * share)


def tokens_of_ranks(world: int, tp: int) -> list[list[int]]:
    """The tokens b * S + s that each rank holds: its sequences' positions, cut over tp."""
    index_BS = torch.arange(BATCH * SEQUENCE).view(BATCH, SEQUENCE)
    shares = [index_BS[share_of(rank, world // tp, tp)].chunk(tp, 1)[rank % tp] for rank in range(world)]
    return [share.flatten().tolist() for share in shares]


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, Pool]]:
    """Ranks by their number; starting costs nothing before the first call."""
    made = {world: Pool(world) for world in (2, 4, 8)}
    yield made
    for pool in made.values():
        pool.close()
