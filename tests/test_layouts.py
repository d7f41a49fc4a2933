"""Every layout is the same training: loss, gradients, their norm and three steps of SGD equal those of one rank."""

from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from helpers import assert_close_rms
from layouts import CONFIGS, losses, pools, share_of, whole
from ranks import Pool

from coterie.models.gpt import GPT
from coterie.models.parallelize import parallelize
from coterie.parallel.mesh import build_mesh
from coterie.train.optim import local_square_sum

__all__ = ["pools"]
pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]
STEPS, RATE = 3, 0.3


class Case(NamedTuple):
    """One layout of one model."""

    world: int
    degrees: dict[str, int]
    config: str = "modern"
    recompute: bool = False
    reshard: bool = True

    def __str__(self) -> str:
        degrees = "-".join(f"{name}{value}" for name, value in self.degrees.items()) or "dp"
        return f"{self.world}-{degrees}-{self.config}{'-recompute' * self.recompute}{'-keep' * (not self.reshard)}"


GRID = [
    Case(2, {}),
    Case(2, {"dp_replicate": 2}, "gpt2"),
    Case(2, {"ep": 2}, recompute=True),
    Case(2, {"tp": 2}),
    Case(2, {"tp": 2}, "gpt2", recompute=True),
    Case(2, {"etp": 2}, "gpt2"),
    Case(2, {"tp": 2, "ep": 2}, recompute=True),
    Case(2, {"tp": 2, "etp": 2}, reshard=False),
    Case(4, {"ep": 4}, "gpt2", reshard=False),
    Case(4, {"dp_replicate": 2, "ep": 2}),
    Case(4, {"tp": 2}, reshard=False),
    Case(4, {"tp": 2}, "gpt2"),
    Case(4, {"tp": 4}),
    Case(4, {"tp": 4, "ep": 4}, "gpt2"),
    Case(4, {"tp": 2, "ep": 4}, recompute=True),
    Case(4, {"tp": 2, "ep": 2, "etp": 2}),
    Case(4, {"ep": 2, "etp": 2}, "gpt2", recompute=True),
    Case(4, {"dp_replicate": 2, "tp": 2}, "gpt2"),
    Case(4, {"dp_replicate": 2, "tp": 2, "ep": 4}),
    Case(4, {"etp": 4, "dp_replicate": 4}),
    Case(8, {"ep": 8}, recompute=True),
    Case(8, {"tp": 2, "ep": 8}),
    Case(8, {"tp": 4, "ep": 4, "etp": 2}, "gpt2"),
    Case(8, {"dp_replicate": 2, "tp": 2, "ep": 2, "etp": 2}, recompute=True),
    Case(8, {"dp_replicate": 2, "tp": 2, "ep": 4}, "gpt2"),
    Case(8, {"dp_replicate": 2, "ep": 8}),
    Case(8, {"dp_replicate": 4, "tp": 2, "ep": 8, "etp": 1}, "gpt2", recompute=True),
]


def train(model: GPT, rows: slice) -> dict[str, Any]:
    """The first step's loss terms, gradients and norm, and the parameters after the last step."""
    found: dict[str, Any] = {"before": {name: whole(p) for name, p in model.named_parameters()}}
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, foreach=False)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss, parts = losses(model, rows)
        loss.backward()
        if step == 0:
            missing = [name for name, p in model.named_parameters() if p.grad is None]
            assert not missing, f"no gradient of {missing}"
            square = local_square_sum(model.parameters(), dist.get_world_size() if dist.is_initialized() else 1)
            found["square"], found["terms"] = square.clone(), parts.clone()
            found["grads"] = {name: whole(p.grad) for name, p in model.named_parameters()}
        optimizer.step()
    found["last"] = losses(model, rows)[1]
    found["after"] = {name: whole(p) for name, p in model.named_parameters()}
    return found


def on_ranks(rank: int, world: int, config: str, degrees: dict[str, int], recompute: bool, reshard: bool) -> Any:
    """`train` on a layout: sums over ranks and whole tensors, from rank 0 alone."""
    mesh = build_mesh("cpu", **degrees)
    model = parallelize(GPT(CONFIGS[config], device="meta"), mesh, reshard=reshard)
    model.init_weights(3)
    model.recompute = recompute
    rows = share_of(rank, mesh.layout.data_ranks, mesh.layout.tp)
    found = train(model, rows)
    for name in ("square", "terms", "last"):
        dist.all_reduce(found[name])
    return found if rank == 0 else None


@cache
def one_rank(config: str) -> dict[str, Any]:
    model = GPT(CONFIGS[config])
    model.init_weights(3)
    return train(model, slice(None))


@pytest.mark.parametrize("case", GRID, ids=str)
def test_equals_one_rank(case: Case, pools: dict[int, Pool]) -> None:
    for world, pool in pools.items():
        if world != case.world:
            pool.close()
    expected = one_rank(case.config)
    found = pools[case.world].run(on_ranks, case.config, case.degrees, case.recompute, case.reshard)[0]
    for name, ours, theirs in zip(("lm", "aux", "z"), found["terms"], expected["terms"], strict=True):
        assert_close_rms(ours, theirs, 1e-5, name)
    wrong = [name for name, value in expected["before"].items() if not torch.equal(found["before"][name], value)]
    assert not wrong, f"other initial values: {wrong}"
    for name, grad in expected["grads"].items():
        try:
            assert_close_rms(found["grads"][name], grad, 1e-5, f"gradient of {name}")
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong, "\n".join(wrong)
    assert found["square"].sqrt().item() == pytest.approx(expected["square"].sqrt().item(), rel=1e-5)
    for name, value in expected["after"].items():
        assert_close_rms(found["after"][name], value, 1e-5, f"{name} after {STEPS} steps")
    assert_close_rms(found["last"], expected["last"], 1e-5, f"loss terms after {STEPS} steps")
    assert expected["last"][0] < 0.97 * expected["terms"][0], "nothing was learned"


def test_gradients_of_the_router_and_the_norms_under_tensor_parallelism(pools: dict[int, Pool]) -> None:
    """Each rank sees some positions, or some heads: a gradient that is not reduced looks plausible, and is wrong."""
    expected, names = one_rank("modern")["grads"], ("gate.weight", "norm.weight", "coefficient.weight")
    found = pools[2].run(on_ranks, "modern", {"tp": 2}, False, True)[0]["grads"]
    shared = [name for name in expected if name.endswith(names)]
    assert len(shared) == 3 + 4 * 4 + 1 + 3  # routers; two norms and two of heads a block; the last; coefficients
    for name in shared:
        assert_close_rms(found[name], expected[name], 1e-5, name)
