"""Every layout is the same training: loss, gradients, their norm and three steps of SGD equal those of one rank."""

from functools import cache
from typing import Any, NamedTuple

import oracle
import oracle_gpt
import pytest
import torch
import torch.distributed as dist
from helpers import assert_close_rms
from layouts import CONFIGS, batch, losses, pools, share_of, tokens_of_ranks, whole
from ranks import Pool

from coterie.models.gpt import GPT, Recompute
from coterie.models.parallelize import parallelize
from coterie.moe.exchanging import Exchanging
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
    recompute: Recompute = "none"
    reshard: bool = True
    compile: bool = False
    exchange: str = "flat"
    per_node: int = 0
    chunks: int = 1

    def __str__(self) -> str:
        degrees = "-".join(f"{name}{value}" for name, value in self.degrees.items()) or "dp"
        more = f"-{self.recompute}" * (self.recompute != "none") + "-keep" * (not self.reshard)
        travel = f"-{self.exchange}" * (self.exchange != "flat") + f"-chunks{self.chunks}" * (self.chunks > 1)
        return f"{self.world}-{degrees}-{self.config}{more}{'-compile' * self.compile}{travel}"


GRID = [
    Case(2, {}),
    Case(2, {"dp_replicate": 2}, "gpt2"),
    Case(2, {"ep": 2}, recompute="full"),
    Case(2, {"tp": 2}),
    Case(2, {"tp": 2}, "gpt2", recompute="full"),
    Case(2, {"etp": 2}, "gpt2"),
    Case(2, {"tp": 2}, "olmoe", compile=True),
    Case(2, {"tp": 2, "ep": 2}, recompute="selective"),
    Case(2, {"tp": 2, "etp": 2}, reshard=False),
    Case(4, {"ep": 4}, "gpt2", reshard=False),
    Case(4, {"dp_replicate": 2, "ep": 2}),
    Case(4, {"tp": 2}, reshard=False),
    Case(4, {"tp": 4}),
    Case(4, {"tp": 2, "ep": 4}, "olmoe", recompute="full"),
    Case(4, {"tp": 4, "ep": 4}, "gpt2"),
    Case(4, {"tp": 2, "ep": 2, "etp": 2}),
    Case(4, {"ep": 2, "etp": 2}, "gpt2", recompute="full"),
    Case(4, {"dp_replicate": 2, "tp": 2, "ep": 4}),
    Case(4, {"etp": 4, "dp_replicate": 4}),
    Case(8, {"ep": 8}, recompute="selective"),  # DeepSpeed-MoE's pyramid: EP 2 / 4 / 8, 4 / 2 / 1 copies
    Case(8, {"tp": 4, "ep": 4, "etp": 2}, "gpt2"),
    Case(2, {"ep": 2}, "capacity"),
    Case(4, {"tp": 2, "ep": 2}, "capacity"),
    Case(8, {"tp": 2, "ep": 4, "etp": 2}, "capacity", recompute="selective"),
    Case(4, {"ep": 4}, exchange="hierarchical", per_node=2),
    Case(4, {"tp": 2, "ep": 4}, exchange="deduplicated", per_node=2, recompute="full"),
    Case(8, {"dp_replicate": 2, "ep": 8}, exchange="deduplicated", per_node=4),
    Case(8, {"tp": 2, "ep": 4, "etp": 2}, "gpt2", exchange="hierarchical", per_node=4),
    Case(2, {"ep": 2}, chunks=2),
    Case(4, {"tp": 2, "ep": 2, "etp": 2}, "gpt2", chunks=2, recompute="full"),
    Case(4, {"ep": 2}, "capacity", exchange="deduplicated", per_node=1, chunks=2),
    Case(2, {"tp": 2, "etp": 2}, "gpt2", recompute="full", compile=True),
]
# Only `pytest -m long` runs these: what they join is tried above in parts.
MORE = [
    Case(8, {"ep": 2}),
    Case(8, {"tp": 2, "ep": 8}),
    Case(8, {"dp_replicate": 2, "tp": 2, "ep": 2, "etp": 2}, recompute="full"),
    Case(8, {"dp_replicate": 2, "tp": 2, "ep": 4}, "gpt2"),
    Case(8, {"dp_replicate": 2, "ep": 8}),
    Case(8, {"dp_replicate": 4, "tp": 2, "ep": 8, "etp": 1}, "gpt2", recompute="full"),
    Case(4, {"dp_replicate": 2, "ep": 4}, "capacity", recompute="full"),
    Case(2, {"ep": 2}, compile=True),
    Case(4, {"tp": 2}, "gpt2"),
    Case(4, {"tp": 4, "ep": 2}, "olmoe"),
    Case(4, {"dp_replicate": 2, "tp": 2}, "gpt2"),
    Case(4, {"tp": 2, "ep": 4}, recompute="selective"),
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


def on_ranks(rank: int, world: int, case: tuple) -> Any:
    """`train` on a layout: sums over ranks and whole tensors, from rank 0 alone."""
    case = Case(*case)
    mesh = build_mesh("cpu", **case.degrees)
    model = GPT(CONFIGS[case.config], device="meta")
    travel = Exchanging(case.exchange, case.chunks, case.per_node)
    model = parallelize(model, mesh, reshard=case.reshard, compile=case.compile, exchanging=travel)
    model.init_weights(3)
    model.recompute = case.recompute
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


@cache
def by_the_oracle(config: str, world: int = 1, tp: int = 1) -> dict[str, Any]:
    """What `train` gives, in fp64; a capacity counts the tokens of each of the ranks."""
    model = GPT(CONFIGS[config])
    model.init_weights(3)
    p = oracle.parameters(model)
    found: dict[str, Any] = {"before": {name: value.detach().float() for name, value in p.items()}}
    _, targets_BS, valid_BS = batch()
    gate = CONFIGS[config].moe.gate
    for step in range(STEPS + 1):
        terms = oracle_gpt.losses(p, CONFIGS[config], *batch(), tokens_of_ranks(world, tp))
        found["last"] = torch.stack(terms).detach()
        if step == STEPS:
            break
        tokens = valid_BS.sum()
        loss = terms.lm / (targets_BS >= 0).sum() + (gate.aux_weight * terms.aux + gate.z_weight * terms.z) / tokens
        grads = dict(zip(p, torch.autograd.grad(loss, list(p.values())), strict=True))
        if step == 0:
            found["terms"], found["grads"] = found["last"], grads
            found["square"] = sum(grad.square().sum() for grad in grads.values())
        with torch.no_grad():
            for name, value in p.items():
                value -= RATE * grads[name]
    found["after"] = {name: value.detach() for name, value in p.items()}
    return found


def assert_same_training(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Initial values bit by bit; loss terms, gradients, their norm, and what three steps make of it to 1e-5."""
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


@pytest.mark.parametrize("config", CONFIGS)
def test_one_rank_equals_the_oracle(config: str) -> None:
    assert_same_training(one_rank(config), by_the_oracle(config))


@pytest.mark.parametrize("case", [*GRID, *(pytest.param(case, marks=pytest.mark.long) for case in MORE)], ids=str)
def test_equals_one_rank(case: Case, pools: dict[int, Pool]) -> None:
    """A capacity makes each rank drop its own: the oracle knows which tokens are whose."""
    for world, pool in pools.items():
        if world != case.world:
            pool.close()
    alone = case.config != "capacity"
    expected = one_rank(case.config) if alone else by_the_oracle(case.config, case.world, case.degrees.get("tp", 1))
    assert_same_training(pools[case.world].run(on_ranks, tuple(case))[0], expected)


def test_gradients_of_the_router_and_the_norms_under_tensor_parallelism(pools: dict[int, Pool]) -> None:
    """Each rank sees some positions, or some heads: a gradient that is not reduced looks plausible, and is wrong."""
    expected, names = one_rank("modern")["grads"], ("gate.weight", "norm.weight", "coefficient.weight")
    found = pools[2].run(on_ranks, tuple(Case(2, {"tp": 2})))[0]["grads"]
    shared = [name for name in expected if name.endswith(names)]
    assert len(shared) == 3 + 4 * 4 + 1 + 3  # routers; two norms and two of heads a block; the last; coefficients
    for name in shared:
        assert_close_rms(found[name], expected[name], 1e-5, name)
