"""Meshes: who shares experts with whom, at any degree, and that FSDP composes with them."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from helpers import assert_close_rms
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from coterie.parallel import collectives
from coterie.parallel.layout import Layout
from coterie.parallel.mesh import Mesh, build_mesh


@pytest.fixture
def pretend() -> Iterator:
    """Opens a process group of any size whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def start(rank: int, world: int) -> None:
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())

    yield start
    dist.destroy_process_group()


def test_every_layer_of_a_pyramid_has_its_own_degree(pretend) -> None:
    # The paper's 128 GPUs with layers of 32, 64 and 128 experts: EP 32/64/128 x expert-DP 4/2/1.
    pretend(70, 128)
    mesh = build_mesh("cpu", ep=128)
    for experts, ep_ranks, edp_ranks in [
        (32, list(range(64, 96)), [6, 38, 70, 102]),
        (64, list(range(64, 128)), [6, 70]),
        (128, list(range(128)), [70]),
    ]:
        layer = mesh.experts(experts)
        assert layer.ep.mesh.tolist() == ep_ranks
        assert layer.edp.mesh.tolist() == edp_ranks
        assert layer.ep.size() * layer.edp.size() == 128
    assert mesh.whole.size() == mesh.world == 128
    assert mesh.rank == 70
    assert mesh.experts(256) is mesh.experts(128), "meshes of equal shape are shared"


def test_degree_one_keeps_all_experts_at_home(pretend) -> None:
    pretend(1, 4)
    layer = build_mesh("cpu").experts(8)
    assert layer.ep.mesh.tolist() == [1]
    assert layer.edp.mesh.tolist() == [0, 1, 2, 3]


def test_dense_axes_and_folded_experts(pretend) -> None:
    pretend(13, 24)
    mesh = build_mesh("cpu", dp_replicate=2, tp=3, ep=4, etp=2)
    assert mesh.layout == Layout(2, 4, 3, 4, 2)
    assert mesh.tp.mesh.tolist() == [12, 13, 14]
    assert mesh.shard.mesh.tolist() == [[1, 4, 7, 10], [13, 16, 19, 22]]
    assert mesh.whole.mesh.tolist() == [list(range(12)), list(range(12, 24))]
    layer = mesh.experts(8)  # edp 3: the groups of experts span the copies
    assert layer.ep.mesh.tolist() == [9, 11, 13, 15]
    assert layer.etp.mesh.tolist() == [12, 13]
    assert layer.cut.mesh.tolist() == [[8, 9], [10, 11], [12, 13], [14, 15]]
    assert layer.edp.mesh.tolist() == [5, 13, 21]
    layer = mesh.experts(2)  # edp 6: each copy has three of its own
    assert layer.cut.mesh.tolist() == [[12, 13], [14, 15]]
    assert layer.edp.mesh.tolist() == [[1, 5, 9], [13, 17, 21]]


def test_copies_without_tensor_parallelism(pretend) -> None:
    pretend(3, 4)
    mesh = build_mesh("cpu", dp_replicate=2)
    assert mesh.shard.mesh.tolist() == mesh.whole.mesh.tolist() == [[0, 1], [2, 3]]


def test_mistakes_are_named(pretend) -> None:
    pretend(0, 6)
    with pytest.raises(ValueError, match="ep=4 does not divide 6 ranks: the nearest that does is 3 or 6"):
        build_mesh("cpu", ep=4)
    with pytest.raises(ValueError, match="dp_replicate=3 x tp=6 does not make 6 ranks"):
        build_mesh("cpu", tp=6, dp_replicate=3)
    with pytest.raises(ValueError, match="4 experts do not spread over ep=3"):
        build_mesh("cpu", ep=3).experts(4)


class _Stack(nn.Module):
    """Two experts' weights that already live on the expert mesh, as the models' parallelisation makes them."""

    def __init__(self, weight_EDD: torch.Tensor, mesh: Mesh) -> None:
        super().__init__()
        ep = mesh.experts(len(weight_EDD)).ep
        here = len(weight_EDD) // ep.size()
        own = weight_EDD[ep.get_local_rank() * here :][:here].clone()
        self.weight = nn.Parameter(DTensor.from_local(own, ep, [Shard(0)], run_check=False))

    def forward(self, x_D: torch.Tensor) -> torch.Tensor:
        return (self.weight.to_local() @ x_D).sum()


def _on_four_ranks(rank: int, world: int) -> dict:
    mesh = build_mesh("cpu", ep=4)
    results: dict = {}
    for experts in (2, 4):
        torch.manual_seed(experts)
        stack = _Stack(torch.randn(experts, 3, 3), mesh)
        fully_shard(stack, mesh=mesh.experts(experts).edp)
        stack.set_gradient_divide_factor(1.0)
        stack.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
        stack(torch.arange(3.0) + rank).backward()
        grad = stack.weight.grad
        assert isinstance(grad, DTensor)
        results[f"grad {experts}"] = grad.full_tensor()
    results["sums"] = collectives.all_reduce_sums([torch.full((2,), rank), torch.full((1, 3), 10 * rank)])
    results["max"] = collectives.all_reduce_max(torch.tensor([rank, -rank]))
    results["any"] = [collectives.any_rank(rank == 2), collectives.any_rank(False)]
    results["gather"] = collectives.all_gather_rows(torch.tensor([rank, rank * rank]))
    mine = torch.tensor([rank + 5])
    results["broadcast"] = collectives.broadcast(mine)
    results["edp"] = collectives.all_reduce_sum(mine, mesh.experts(2).edp.get_group())
    results["untouched"] = mine
    results["size"] = collectives.size()
    collectives.barrier()
    return results


@pytest.mark.dist
def test_collectives_and_fsdp_over_expert_data_parallel_ranks() -> None:
    for rank, one in enumerate(run_ranks(_on_four_ranks, 4)):
        assert [t.tolist() for t in one["sums"]] == [[6, 6], [[60, 60, 60]]]
        assert one["max"].tolist() == [3, 0]
        assert one["any"] == [True, False]
        assert one["gather"].tolist() == [[0, 0], [1, 1], [2, 4], [3, 9]]
        assert one["broadcast"].tolist() == [5]
        assert one["edp"].tolist() == [rank % 2 + rank % 2 + 2 + 10]
        assert one["untouched"].tolist() == [rank + 5]
        assert one["size"] == 4
        x_RD = torch.arange(3.0) + torch.arange(4.0)[:, None]
        # An expert's gradient is the sum over the ranks that hold it: with two experts, ranks e and e + 2.
        for experts in (2, 4):
            owners = [[r for r in range(4) if r % experts == e] for e in range(experts)]
            expected = torch.stack([x_RD[o].sum(0).expand(3, 3) for o in owners])
            assert_close_rms(one[f"grad {experts}"], expected)


def test_collectives_without_ranks_cost_nothing() -> None:
    t = torch.tensor([1, 2])
    assert collectives.size() == 1
    assert collectives.all_reduce_sum(t) is t
    assert collectives.all_reduce_max(t) is t
    assert collectives.all_reduce_sums([t])[0] is t
    assert collectives.all_reduce_sums([]) == []
    assert collectives.broadcast(t) is t
    assert collectives.any_rank(True)
    assert collectives.all_gather_rows(t).tolist() == [[1, 2]]
    collectives.barrier()
