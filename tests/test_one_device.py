"""A process group of one rank on a device, NCCL on CUDA: every dispatcher and layout gives what no group gives, and
waits for the device no more often than it says."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from helpers import assert_close_rms
from layouts import CONFIGS, losses
from torch import Tensor

from coterie.kernels.permute import permute, plan_rows
from coterie.models.gpt import GPT
from coterie.models.parallelize import parallelize
from coterie.moe.config import GateConfig, MoEConfig
from coterie.moe.dispatch import AllToAllDispatch
from coterie.moe.layer import MoE
from coterie.parallel.all_to_all import Network
from coterie.parallel.exchange_dedup import EXCHANGES, make_exchange
from coterie.parallel.launch import init_ranks
from coterie.parallel.mesh import build_mesh

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EXPERTS, TOKENS = 8, 96
pytestmark = pytest.mark.dist


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A device with the process group of its only rank."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    ranks = init_ranks(request.param)
    yield request.param
    ranks.shutdown()


@contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """An error where the host waits for the device."""
    if device == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _run(moe: MoE, x_BSD: Tensor) -> list[Tensor]:
    moe.zero_grad()
    x_BSD = x_BSD.clone().requires_grad_()
    out = moe(x_BSD)
    (out.y.square().sum() + out.routing.aux).backward()
    assert x_BSD.grad is not None
    return [out.y.detach(), x_BSD.grad, *(p.grad.clone() for p in moe.parameters() if p.grad is not None)]


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("name", EXCHANGES)
def test_a_dispatcher_of_one_rank(name: str, even: bool, device: str) -> None:
    gate = GateConfig(capacity_factor=1.0) if even else GateConfig()
    moe = MoE(32, EXPERTS, MoEConfig(top_k=2, hidden=16, residual=True, gate=gate), device=device)
    torch.manual_seed(1)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x_BSD = torch.randn(4, TOKENS // 4, 32, device=device)
    alone = _run(moe, x_BSD)
    group = dist.group.WORLD
    assert group is not None
    exchange = make_exchange(name, Network(group))
    moe.dispatch = AllToAllDispatch(group, EXPERTS, moe.gate.capacity if even else None, exchange=exchange)
    _run(moe, x_BSD)  # what is compiled or allocated once may wait
    with no_waiting(device):
        found = _run(moe, x_BSD)
    for ours, theirs in zip(found, alone, strict=True):
        assert_close_rms(ours, theirs, 1e-6) if even else torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("name", EXCHANGES)
def test_a_trip_reads_its_sizes_once(name: str, device: str) -> None:
    group = dist.group.WORLD
    assert group is not None
    exchange = make_exchange(name, Network(group))
    ids_TK = torch.rand(TOKENS, EXPERTS, device=device).argsort(1)[:, :2]
    plan = plan_rows(ids_TK, EXPERTS)
    x_RD = permute(torch.randn(TOKENS, 32, device=device), plan).requires_grad_()
    (trip,) = exchange.prepare(ids_TK, plan.slot_TK, plan.counts_E.view(1, 1, -1))
    assert trip.leaving == len(x_RD)
    with no_waiting(device):
        y_RD = trip.reply(trip.send(x_RD)())()
        y_RD.backward(torch.ones_like(y_RD))
    assert torch.equal(y_RD, x_RD)
    assert torch.equal(x_RD.grad, torch.ones_like(x_RD))  # type: ignore[arg-type]


@pytest.mark.parametrize("config", ["modern", "gpt2"])
def test_a_model_of_one_rank(config: str, device: str) -> None:
    expected = GPT(CONFIGS[config])
    expected.init_weights(3)
    loss, _ = losses(expected, slice(None))
    loss.backward()
    model = parallelize(GPT(CONFIGS[config], device="meta"), build_mesh(device))
    model.init_weights(3)
    found, _ = losses(model, slice(None), device)
    found.backward()
    assert_close_rms(found.cpu(), loss, 1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert_close_rms(ours.grad.cpu(), theirs.grad, 1e-4, name)
