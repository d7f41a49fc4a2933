"""What a layout must also do: the training loop's counts, files, logits, bf16, even splits, and clear refusals."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import assert_close_rms
from layouts import GPT2, MODERN, batch, losses, pools, share_of, whole
from ranks import Pool
from runs import ONE, batch_steps, build, make_batch, make_trainer, small_config, small_model
from torch import Tensor

from coterie.models.gpt import GPT
from coterie.models.parallelize import parallelize
from coterie.models.weights import full_state_dict, load_model, load_weights, save_model
from coterie.parallel.launch import Ranks
from coterie.parallel.mesh import build_mesh
from coterie.train.config import ParallelConfig

__all__ = ["pools"]
pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]


def loop_on_ranks(rank: int, world: int, folder: str, tp: int, micro: int) -> Tensor:
    """Norm and losses of three steps of the training loop, and a validation loss."""
    # The global scope's fractions depend on which samples make a micro-batch.
    scope = "sequence" if micro else "global"
    model = replace(small_model(aux_weight=0.05, z_weight=0.01, aux_scope=scope), heads=4)
    config = small_config(Path(folder), model, micro_batch=micro, parallel=ParallelConfig(tp=tp), eval_batches=1)
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


@pytest.mark.parametrize(("world", "tp", "micro"), [(2, 2, 0), (4, 2, 0), (4, 2, 1)])
def test_the_loop_counts_a_batch_once(
    world: int, tp: int, micro: int, pools: dict[int, Pool], tmp_path: Path
) -> None:
    expected = loop_on_ranks(0, 1, str(tmp_path / "one"), 1, micro * (world // tp))
    for found in pools[world].run(loop_on_ranks, str(tmp_path / "many"), tp, micro):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def files_and_logits(rank: int, world: int, folder: str, degrees: dict[str, int]) -> Tensor:
    """Writes the model from a layout, reads it into the same one anew, and gives its logits without targets."""
    mesh = build_mesh("cpu", **degrees)
    models = [parallelize(GPT(GPT2, device="meta"), mesh) for _ in range(2)]
    models[0].init_weights(3)
    save_model(folder, models[0])
    dist.barrier()
    load_weights(folder, models[1])
    states = [full_state_dict(model) for model in models]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    tokens_BS, _, valid_BS = batch()
    with torch.no_grad():
        return models[1].eval()(tokens_BS, valid_BS=valid_BS, logits_to_keep=3).logits_BSV


@pytest.mark.parametrize("degrees", [{"tp": 4}, {"tp": 2, "ep": 2, "etp": 2}], ids=str)
def test_files_and_logits(degrees: dict[str, int], pools: dict[int, Pool], tmp_path: Path) -> None:
    expected = GPT(GPT2).eval()
    expected.init_weights(3)
    found = pools[4].run(files_and_logits, str(tmp_path), degrees)
    alone = load_model(tmp_path)
    for name, value in expected.state_dict().items():
        assert torch.equal(alone.state_dict()[name], value), name
    tokens_BS, _, valid_BS = batch()
    with torch.no_grad():
        logits_BSV = expected(tokens_BS, valid_BS=valid_BS, logits_to_keep=3).logits_BSV
    for own in found:
        assert_close_rms(own, logits_BSV, 1e-5)


def in_bf16(rank: int, world: int, degrees: dict[str, int]) -> Tensor:
    """The loss of all ranks, with matrices in bf16; parameters and gradients stay in fp32, the router throughout."""
    mesh = build_mesh("cpu", **degrees)
    model = parallelize(GPT(MODERN, device="meta"), mesh, dtype=torch.bfloat16)
    model.init_weights(3)
    model.recompute = "full"
    seen: set[torch.dtype] = set()
    for block in model.blocks:
        if block.moe is not None:
            block.moe.gate.register_forward_pre_hook(lambda m, x: seen.add(m.weight.dtype))
    rows = share_of(rank, mesh.layout.data_ranks, mesh.layout.tp)
    loss = losses(model, rows)[0]
    loss.backward()
    assert seen == {torch.float32}
    for name, parameter in model.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32, name
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    return loss


@pytest.mark.parametrize(("world", "degrees"), [(2, {"tp": 2}), (4, {"tp": 2, "ep": 2, "etp": 2})], ids=str)
def test_bf16(world: int, degrees: dict[str, int], pools: dict[int, Pool]) -> None:
    model = GPT(MODERN)
    model.init_weights(3)
    expected = losses(model, slice(None))[0]
    for found in pools[world].run(in_bf16, degrees):
        assert_close_rms(found, expected, 1e-2)


def refuse(rank: int, world: int) -> list[str]:
    """What a layout that does not fit says."""
    said = []
    for degrees, changes in (
        ({"tp": 2}, {"kv_heads": 1}),
        ({"tp": 2}, {"hidden": 7}),
        ({"ep": 2}, {"experts": (3, 0)}),
    ):
        config = replace(MODERN, layers=2, **({"experts": (0, 2)} | changes))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r".") as error:
            parallelize(GPT(config, device="meta"), build_mesh("cpu", **degrees))
        said.append(str(error.value))
    model = parallelize(GPT(MODERN, device="meta"), build_mesh("cpu", tp=2))
    model.init_weights(3)
    with pytest.raises(ValueError, match=r"a sequence of 15") as error:
        model(batch()[0][:, :15])
    return [*said, str(error.value)]


def test_refusals(pools: dict[int, Pool]) -> None:
    for said in pools[2].run(refuse):
        assert said == [
            "tp=2 does not divide kv_heads 1: the nearest that does is 1",
            "tp=2 does not divide hidden 7: the nearest that does is 1 or 7",
            "3 experts do not spread over ep=2 of 2 places for an expert: the nearest that does is 1",
            "a sequence of 15 does not divide over tp=2: use one of 14 or 16",
        ]


def even_and_uneven(rank: int, world: int, degrees: dict[str, int]) -> None:
    """A capacity is each rank's own, so the expectation is what the same layout gives without even splits."""
    gate = replace(MODERN.moe.gate, capacity_factor=1.0, min_capacity=2)
    config, found = replace(MODERN, moe=replace(MODERN.moe, gate=gate)), []
    mesh = build_mesh("cpu", **degrees)
    for even in (False, True):
        model = parallelize(GPT(config, device="meta"), mesh, even_splits=even)
        model.init_weights(3)
        loss = losses(model, share_of(rank, mesh.layout.data_ranks, mesh.layout.tp))[0]
        loss.backward()
        found.append({"loss": loss.detach()} | {name: whole(p.grad) for name, p in model.named_parameters()})
    for name, value in found[0].items():
        assert_close_rms(found[1][name], value, 1e-5, name)


def test_even_splits(pools: dict[int, Pool]) -> None:
    pools[4].run(even_and_uneven, {"tp": 2, "ep": 2, "etp": 2})
