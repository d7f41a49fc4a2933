"""Every layout is the same training: loss, gradients, their norm and three steps of SGD equal those of one rank."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from helpers import assert_close_rms
from ranks import Pool
from runs import ONE, batch_steps, build, make_batch, make_trainer, small_config, small_model
from torch import Tensor
from torch.distributed.tensor import DTensor

from coterie.models.config import ModelConfig
from coterie.models.gpt import GPT
from coterie.models.parallelize import parallelize
from coterie.moe.config import GateConfig, MoEConfig
from coterie.parallel.launch import Ranks
from coterie.parallel.mesh import build_mesh
from coterie.train.config import ParallelConfig
from coterie.train.optim import local_square_sum

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

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
    qk_norm=True,
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
    bias=True,
    qk_norm=False,
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
CONFIGS = {"modern": MODERN, "gpt2": GPT2}
BATCH, SEQUENCE, STEPS, RATE = 8, 16, 3, 0.3


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


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets, validity: some sequences are whole, others short, one is padding alone."""
    generator = torch.Generator().manual_seed(7)
    text_BS = torch.randint(0, MODERN.vocab_size, (BATCH, SEQUENCE + 1), generator=generator)
    valid_BS = torch.arange(SEQUENCE) < torch.tensor([16, 16, 11, 1, 0, 15, 16, 5])[:, None]
    return text_BS[:, :-1], text_BS[:, 1:].masked_fill(~valid_BS, -100), valid_BS


def losses(model: GPT, rows: slice) -> tuple[Tensor, Tensor]:
    """This rank's part of the globally normalised loss, and of its terms: lm, aux, z."""
    tokens_BS, targets_BS, valid_BS = batch()
    out = model(tokens_BS[rows], targets_BS=targets_BS[rows], valid_BS=valid_BS[rows])
    gate = model.config.moe.gate
    parts = torch.stack([out.lm, out.aux, out.z])
    counts = torch.stack([(targets_BS != -100).sum(), valid_BS.sum(), valid_BS.sum()])
    return (parts / counts * torch.tensor([1.0, gate.aux_weight, gate.z_weight])).sum(), parts.detach()


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(model: GPT, rows: slice) -> dict[str, Any]:
    """The first step's loss terms, gradients and norm, and the parameters after the last step."""
    found: dict[str, Any] = {}
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
    share, place = BATCH // mesh.layout.data_ranks, rank // mesh.layout.tp
    found = train(model, slice(place * share, (place + 1) * share))
    for name in ("square", "terms", "last"):
        dist.all_reduce(found[name])
    return found if rank == 0 else None


@cache
def one_rank(config: str) -> dict[str, Any]:
    model = GPT(CONFIGS[config])
    model.init_weights(3)
    return train(model, slice(None))


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, Pool]]:
    made = {world: Pool(world) for world in sorted({case.world for case in GRID})}
    yield made
    for pool in made.values():
        pool.close()


@pytest.mark.parametrize("case", GRID, ids=str)
def test_equals_one_rank(case: Case, pools: dict[int, Pool]) -> None:
    for world, pool in pools.items():
        if world != case.world:
            pool.close()
    expected = one_rank(case.config)
    found = pools[case.world].run(on_ranks, case.config, case.degrees, case.recompute, case.reshard)[0]
    for name, ours, theirs in zip(("lm", "aux", "z"), found["terms"], expected["terms"], strict=True):
        assert_close_rms(ours, theirs, 1e-5, name)
    wrong = []
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


def loop_on_ranks(rank: int, world: int, folder: str, tp: int) -> Tensor:
    """Norm and losses of three steps of the training loop, and a validation loss."""
    model = replace(small_model(aux_weight=0.05, z_weight=0.01), heads=4)
    config = small_config(Path(folder), model, parallel=ParallelConfig(tp=tp), eval_batches=1)
    ranks = ONE if world == 1 else Ranks(rank, rank, world, torch.device("cpu"))
    place, places = rank // tp, world // tp
    share = config.batch_size // places
    trainer = make_trainer(
        config,
        build(model) if world == 1 else parallelize(build(model), build_mesh("cpu", tp=tp)),
        ranks,
        steps=batch_steps(config, place, places),
        valid=lambda: [make_batch(1000 + place * share, share, config)],
    )
    data, rows = trainer.steps(0), []
    for _ in range(3):
        totals = trainer.step(data)
        rows.extend([totals.norm, *totals.losses.values(), *(float(s.tokens) for s in totals.stats)])
    return torch.tensor([*rows, trainer.evaluate()])


@pytest.mark.parametrize(("world", "tp"), [(2, 2), (4, 2)])
def test_the_loop_counts_a_batch_once(world: int, tp: int, pools: dict[int, Pool], tmp_path: Path) -> None:
    expected = loop_on_ranks(0, 1, str(tmp_path / "one"), 1)
    for found in pools[world].run(loop_on_ranks, str(tmp_path / "many"), tp):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
