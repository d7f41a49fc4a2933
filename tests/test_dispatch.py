"""Expert parallelism on gloo ranks against the oracle: outputs, all gradients, collectives, odd loads."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import assert_close_rms
from oracle import layer, parameters, route
from ranks import run_ranks
from torch import Tensor

from coterie.moe.config import GateConfig, MoEConfig
from coterie.moe.dispatch import AllToAllDispatch
from coterie.moe.layer import MoE
from coterie.parallel.all_to_all import Network
from coterie.parallel.collectives import all_reduce_sum
from coterie.parallel.exchange import Flat, flat_trip
from coterie.parallel.mesh import Mesh, build_mesh

D, E, F = 10, 8, 14  # at any degree, ranks and experts per rank differ in number

DROPS = GateConfig(capacity_factor=0.6, min_capacity=1, drop_policy="probability", aux_scope="global")
CONFIGS = {
    "dropless": MoEConfig(hidden=F, gate=GateConfig(aux_scope="global")),
    "residual bias": MoEConfig(hidden=F, residual=True, bias=True, activation="gelu", gate=DROPS),
    "shared top1": MoEConfig(hidden=F, top_k=1, shared_hidden=9, gate=GateConfig(score="sigmoid", z_weight=0.1)),
}
LAYOUTS = {1: [1], 2: [2], 4: [4, 2, 1]}
TOKENS = {1: [13], 2: [13, 4], 4: [7, 0, 12, 1]}  # different on every rank; one has none


def _whole(config: MoEConfig, experts: int, skew: bool = False) -> MoE:
    """The same model on every rank. `skew`: the last expert is never chosen."""
    torch.manual_seed(77)
    moe = MoE(D, experts, config)
    torch.nn.init.normal_(moe.gate.weight, std=0.7)
    for name, p in moe.named_parameters():
        if "b_" in name or name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.5)
    if skew:
        moe.gate.weight.data[:, 0] = 0
        moe.gate.weight.data[-1, 0] = -50
    return moe


def _tokens(rank: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + rank)
    x_BSD = torch.randn(1, count, D, generator=generator)
    x_BSD[..., 0] = x_BSD[..., 0].abs() + 0.5
    valid_BS = torch.rand(1, count, generator=generator) > 0.2
    return x_BSD, valid_BS, torch.randn(1, count, D, generator=generator)


def _scatter(moe: MoE, mesh: Mesh, even: bool) -> dist.ProcessGroup:
    """Keeps this rank's experts, as the model's own parallelisation does."""
    group = mesh.experts(moe.num_experts).ep.get_group()
    here = moe.num_experts // group.size()
    for name, p in list(moe.experts.named_parameters()):
        own = p.detach()[group.rank() * here : (group.rank() + 1) * here].clone()
        setattr(moe.experts, name, torch.nn.Parameter(own))
    moe.dispatch = AllToAllDispatch(group, moe.num_experts, moe.gate.capacity if even else None)
    moe.gate.reduce_counts = all_reduce_sum
    return group


def _rank_step(rank: int, world: int, mesh: Mesh, name: str, experts: int, even: bool, skew: bool) -> dict[str, Any]:
    moe = _whole(CONFIGS[name], experts, skew)
    group = _scatter(moe, mesh, even)
    count = 9 if even else TOKENS[world][rank]
    x_BSD, valid_BS, dy_BSD = _tokens(rank, count)
    x_BSD.requires_grad_()
    out = moe(x_BSD, valid_BS)
    ((out.y * dy_BSD).sum() + 0.4 * out.routing.aux + 0.1 * out.routing.z).backward()
    result: dict[str, Any] = {"y": out.y.detach(), "x": x_BSD.grad, "ids": out.routing.ids_TK}
    result |= {"aux": out.routing.aux.detach(), "rows": out.routing.stats.rows}
    result["grads"] = {n: p.grad for n, p in moe.named_parameters()}
    result["ep_rank"], result["ep"] = group.rank(), group.size()
    return result


def _all_cases(rank: int, world: int) -> dict[str, Any]:
    results: dict[str, Any] = {f"ep {ep}": _layout(rank, world, ep) for ep in LAYOUTS[world]}
    results["traffic"] = _traffic(rank, world)
    results["primitives"] = _primitives(rank, world)
    results["bf16"] = _bf16(rank, world)
    results["refusals"] = _refusals()
    return results


def _layout(rank: int, world: int, ep: int) -> dict[str, Any]:
    mesh = build_mesh("cpu", ep=ep)
    results = {n: _rank_step(rank, world, mesh, n, E, False, False) for n in CONFIGS}
    results["skew"] = _rank_step(rank, world, mesh, "dropless", E, False, True)
    results["even"] = _rank_step(rank, world, mesh, "residual bias", E, True, False)
    # A pyramid's other layer on the same ranks: two experts, whose degree is at most two.
    results["two experts"] = _rank_step(rank, world, mesh, "residual bias", 2, False, False)
    return results


def _traffic(rank: int, world: int) -> dict[str, list[int]]:
    """Collectives of one forward and one backward: [counts and rows sent, all-reduces]."""
    mesh = build_mesh("cpu", ep=world)
    real, calls = dist.all_to_all_single, []
    dist.all_to_all_single = lambda *a, **k: calls.append(tuple(a[1].shape)) or real(*a, **k)  # type: ignore[assignment]
    counted = {}
    try:
        for name, even in (("variable", False), ("even", True)):
            moe = _whole(MoEConfig(hidden=F, gate=GateConfig(capacity_factor=1.0, aux_scope="micro")), E)
            _scatter(moe, mesh, even)
            calls.clear()
            x_BSD = _tokens(rank, 8)[0].requires_grad_()
            y_BSD = moe(x_BSD).y
            forward = len(calls)
            y_BSD.sum().backward()
            counted[name] = [forward, len(calls) - forward]
            counted[f"{name} seconds"] = [
                moe.dispatch.traffic.clock.read() > 0,
                moe.dispatch.traffic.clock.read() == 0,
            ]
    finally:
        dist.all_to_all_single = real  # type: ignore[assignment]
    return counted


def _bf16(rank: int, world: int) -> list[Tensor]:
    """The answer and the gradients of bf16 experts, over all ranks and by themselves."""
    group = dist.group.WORLD
    assert group is not None
    x_BSD, valid_BS, dy_BSD = _tokens(rank, 9)
    config = MoEConfig(hidden=F, gate=GateConfig(aux_weight=0.0))
    whole = MoE(D, E, config, dtype=torch.bfloat16)
    cut = MoE(D, E, config, dtype=torch.bfloat16)
    here = E // world
    pairs = []
    for moe in (whole, cut):
        moe.load_state_dict(_whole(config, E).state_dict())
    for name, p in list(cut.experts.named_parameters()):
        setattr(cut.experts, name, torch.nn.Parameter(p.detach()[rank * here : (rank + 1) * here].clone()))
    cut.dispatch = AllToAllDispatch(group, E)
    for moe in (whole, cut):
        x = x_BSD.bfloat16().requires_grad_()
        y_BSD = moe(x, valid_BS).y
        (y_BSD * dy_BSD.bfloat16()).sum().backward()
        pairs += [y_BSD.detach(), x.grad, moe.gate.weight.grad]
    return pairs


def _primitives(rank: int, world: int) -> dict[str, Any]:
    """Row exchanges in three dtypes, with empty sides, and their backward."""
    group = dist.group.WORLD
    assert group is not None
    counts_E = torch.arange(2 * world) + 10 * rank
    exchange = Flat(Network(group))
    (trip,) = exchange.prepare(counts_E, counts_E, counts_E.view(1, world, 2))
    results: dict[str, Any] = {"counts": trip.counts_PL}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        # Rank r sends p rows to rank p, and so gets r from each: rank 0 gets none.
        send, receive = np.arange(world), np.full(world, rank)
        x_RD = (torch.arange(sum(send) * 3).view(-1, 3) + 100 * rank).to(dtype).requires_grad_()
        y_QD = flat_trip(exchange.lane, send, receive, counts_E).send(x_RD)()
        (y_QD * (rank + 1)).sum().backward()
        results[str(dtype)] = (y_QD.detach(), x_RD.grad)
    return results


def _expected(name: str, world: int, experts: int, even: bool, skew: bool) -> tuple[list[dict[str, Any]], dict]:
    """The oracle on every rank's tokens with the global batch's counts; gradients summed over the ranks."""
    config = CONFIGS[name]
    moe = _whole(config, experts, skew)
    p = parameters(moe)
    ranks = []
    batches = [_tokens(r, 9 if even else TOKENS[world][r]) for r in range(world)]

    def routed(x_TD: Tensor, valid_BS: Tensor, counts: list[int] | None):
        valid = valid_BS.flatten().tolist()
        return route(x_TD, p["gate.weight"], config.top_k, config.gate, valid=valid, counts=counts)

    asked = [routed(x[0].double(), valid, None).asked for x, valid, _ in batches]
    counts = [sum(column) for column in zip(*asked, strict=True)]
    for x_BSD, valid_BS, dy_BSD in batches:
        x_TD = x_BSD[0].double().requires_grad_()
        one = routed(x_TD, valid_BS, counts)
        y_TD = layer(p, x_TD, one, config)
        ((y_TD * dy_BSD[0].double()).sum() + 0.4 * one.aux + (0.1 * one.z if config.gate.z_weight else 0)).backward()
        ranks.append({"y": y_TD.detach(), "x": x_TD.grad, "kept": one.kept, "aux": one.aux.detach()})
    return ranks, {n: v.grad for n, v in p.items()}


def _check(results: list[dict[str, Any]], name: str, experts: int, even: bool = False, skew: bool = False) -> None:
    world = len(results)
    expected, grads = _expected(name, world, experts, even, skew)
    for rank, (mine, theirs) in enumerate(zip(results, expected, strict=True)):
        assert_close_rms(mine["y"][0], theirs["y"], name=f"y of rank {rank}")
        assert_close_rms(mine["x"][0], theirs["x"], name=f"x gradient of rank {rank}")
        assert_close_rms(mine["aux"], theirs["aux"], name="aux")
        kept = [ids for ids in mine["ids"].tolist() if set(ids) != {-1}]
        assert kept == [ids for ids in theirs["kept"] if ids and set(ids) != {-1}]
        rows = sum(e >= 0 for ids in theirs["kept"] for e in ids)
        assert mine["rows"] == (experts * max(-(-9 * CONFIGS[name].top_k * 6 // (experts * 10)), 1) if even else rows)
    ep = results[0]["ep"]
    for parameter, grad in grads.items():
        parts = [r["grads"][parameter] for r in results]
        if parameter.startswith("experts."):
            own = [sum(p for p, r in zip(parts, results, strict=True) if r["ep_rank"] == e) for e in range(ep)]
            assert_close_rms(torch.cat(own), grad, name=parameter)
        else:
            assert_close_rms(sum(parts), grad, name=parameter)


@pytest.mark.dist
@pytest.mark.parametrize("world", LAYOUTS)
def test_any_layout_equals_one_rank(world: int) -> None:
    results = run_ranks(_all_cases, world)
    for ep in LAYOUTS[world]:
        ranks = [r[f"ep {ep}"] for r in results]
        for name in CONFIGS:
            _check([r[name] for r in ranks], name, E)
            assert ranks[0][name]["ep"] == ep
        _check([r["skew"] for r in ranks], "dropless", E, skew=True)
        assert all((r["skew"]["ids"] != E - 1).all() for r in ranks), "the last expert was meant to be idle"
        _check([r["even"] for r in ranks], "residual bias", E, even=True)
        _check([r["two experts"] for r in ranks], "residual bias", 2)
        assert ranks[0]["two experts"]["ep"] == min(ep, 2)
    _check_primitives([r["primitives"] for r in results])
    for one in results:
        for mine, theirs in zip(one["bf16"][3:], one["bf16"][:3], strict=True):
            assert mine.dtype == theirs.dtype
            assert_close_rms(mine, theirs, 2e-2, "bf16")
        _check_traffic(one["traffic"], world)
        uneven, dropless = one["refusals"]
        assert world == 1 or f"3 experts do not spread evenly over {world} ranks" in uneven
        assert "the gate is dropless" in dropless


def _check_traffic(traffic: dict[str, list[int]], world: int) -> None:
    if world == 1:
        assert traffic["variable"] == traffic["even"] == [0, 0]
    else:
        assert traffic["variable"] == [3, 2]  # counts, rows there, rows back; gradients there and back
        assert traffic["even"] == [2, 2]
        assert traffic["variable seconds"] == traffic["even seconds"] == [True, True]


def _check_primitives(results: list[dict[str, Any]]) -> None:
    world = len(results)
    for rank, one in enumerate(results):
        assert one["counts"].tolist() == [[2 * rank + 10 * p, 2 * rank + 1 + 10 * p] for p in range(world)]
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            y_QD, grad_RD = one[str(dtype)]
            first = rank * (rank - 1) // 2  # rows that a rank sends to those before this one
            sent = [torch.arange(first * 3, (first + rank) * 3).view(-1, 3) + 100 * p for p in range(world)]
            assert torch.equal(y_QD, torch.cat(sent).to(dtype))
            assert y_QD.dtype == dtype
            factor = [p + 1 for p in range(world) for _ in range(p)]
            assert torch.equal(grad_RD, torch.tensor(factor, dtype=dtype)[:, None].expand(-1, 3))


def _refusals() -> list[str]:
    group = dist.group.WORLD
    assert group is not None
    moe = MoE(D, E, CONFIGS["dropless"])
    moe.dispatch = AllToAllDispatch(group, E, moe.gate.capacity)
    attempts: list[Callable[[], Any]] = [lambda: AllToAllDispatch(group, 3), lambda: moe(torch.randn(1, 3, D))]
    said = []
    for attempt in attempts:
        try:
            attempt()
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said
