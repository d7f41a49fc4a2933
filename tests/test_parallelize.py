"""A parallelized model is the same model: loss, every gradient, the norm and an SGD step, on any layout."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from helpers import assert_close_rms
from ranks import run_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor

from coterie.models.config import ModelConfig
from coterie.models.gpt import GPT
from coterie.models.parallelize import parallelize
from coterie.moe.config import GateConfig, MoEConfig
from coterie.parallel.mesh import build_mesh

# A pyramid whose layers have different expert-parallel degrees at ep=4: 1 (dense), 2, 4 and 4 of 8.
CONFIG = ModelConfig(
    vocab_size=37,
    max_positions=16,
    layers=4,
    dim=24,
    heads=6,
    kv_heads=2,
    hidden=20,
    qk_norm=True,
    experts=(0, 2, 4, 8),
    moe=MoEConfig(top_k=2, hidden=12, residual=True, gate=GateConfig(aux_weight=0.01, z_weight=0.001)),
)
GPT2 = replace(
    CONFIG,
    activation="gelu",
    norm="layernorm",
    positions="learned",
    bias=True,
    qk_norm=False,
    tied_head=False,
    moe=MoEConfig(top_k=1, hidden=12, activation="gelu", bias=True, shared_hidden=10, shared_gate=True),
)
BATCH, SEQUENCE = 8, 10


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    text_BS = torch.randint(0, CONFIG.vocab_size, (BATCH, SEQUENCE + 1), generator=generator)
    # Uneven padding: rank 0 of 4 has full sequences, others less; one sequence is padding alone.
    lengths_B = torch.tensor([10, 10, 7, 1, 0, 9, 10, 3])
    valid_BS = torch.arange(SEQUENCE) < lengths_B[:, None]
    targets_BS = text_BS[:, 1:].masked_fill(~valid_BS, -100)
    return text_BS[:, :-1], targets_BS, valid_BS


def _loss(model: GPT, rows: slice) -> Tensor:
    """This rank's part of the globally normalised loss."""
    tokens_BS, targets_BS, valid_BS = _batch()
    out = model(tokens_BS[rows], targets_BS=targets_BS[rows], valid_BS=valid_BS[rows])
    gate = model.config.moe.gate
    router = gate.aux_weight * out.aux + gate.z_weight * out.z
    return out.lm / (targets_BS != -100).sum() + router / valid_BS.sum()


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _one_rank(config: ModelConfig) -> tuple[GPT, Tensor]:
    model = GPT(config)
    model.init_weights(3)
    loss = _loss(model, slice(None))
    loss.backward()
    return model, loss.detach()


def _check_layout(rank: int, world: int, ep: int, config: ModelConfig, recompute: bool, reshard: bool) -> None:
    expected, expected_loss = _one_rank(config)
    model = parallelize(GPT(config, device="meta"), build_mesh("cpu", ep=ep), reshard=reshard)
    model.init_weights(3)
    model.recompute = recompute
    share = BATCH // world
    loss = _loss(model, slice(rank * share, (rank + 1) * share))
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    assert_close_rms(total, expected_loss, 1e-5, "loss")

    own = dict(model.named_parameters())
    square = 0.0
    for name, parameter in expected.named_parameters():
        assert own[name].grad is not None, f"{name} has no gradient"
        grad = _whole(own[name].grad)
        assert_close_rms(grad, parameter.grad, 1e-5, f"gradient of {name}")
        square += grad.double().square().sum().item()
    norm = torch.nn.utils.get_total_norm([p.grad for p in expected.parameters()])
    assert math.sqrt(square) == pytest.approx(norm.item(), rel=1e-5)
    _check_norm_of_the_loop(model, world, norm.item())

    for each in (expected, model):
        torch.optim.SGD(each.parameters(), lr=0.5, foreach=False).step()
    after = _loss(model, slice(rank * share, (rank + 1) * share)).detach().clone()
    dist.all_reduce(after)
    assert_close_rms(after, _loss(expected, slice(None)), 1e-5, "loss after a step")
    assert after < total


def _check_norm_of_the_loop(model: GPT, world: int, expected: float) -> None:
    from coterie.train.optim import local_square_sum

    square = local_square_sum(model.parameters(), world)
    dist.all_reduce(square)
    assert square.sqrt().item() == pytest.approx(expected, rel=1e-5)


def _check_layouts(rank: int, world: int, layouts: list[tuple[int, bool, bool, bool]]) -> None:
    for ep, gpt2, recompute, reshard in layouts:
        _check_layout(rank, world, ep, GPT2 if gpt2 else CONFIG, recompute, reshard)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("world", "layouts"),
    [
        (2, [(1, False, False, True), (2, False, True, True), (2, True, False, False)]),
        (4, [(1, False, False, False), (2, False, False, True), (4, False, True, True), (4, True, True, False)]),
    ],
    ids=["2ranks", "4ranks"],
)
def test_any_layout_equals_one_rank(world: int, layouts: list) -> None:
    run_ranks(_check_layouts, world, layouts)
