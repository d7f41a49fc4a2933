"""Exchanges on gloo ranks that pretend to be nodes: all give the bits of the flat one, and send what formulas say."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from helpers import assert_close_rms
from ranks import run_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from coterie.moe.config import GateConfig, MoEConfig
from coterie.moe.dispatch import AllToAllDispatch, Coordinated
from coterie.moe.layer import MoE
from coterie.parallel import cost
from coterie.parallel.all_to_all import Network
from coterie.parallel.exchange_dedup import EXCHANGES, make_exchange
from coterie.parallel.exchange_probe import pick_exchange
from coterie.parallel.exchange_replicas import Replicas
from coterie.parallel.traffic import Nodes

D, E, F = 6, 16, 5
NODES = {4: [2, 4, 1], 8: [4, 2]}  # ranks per node that a world pretends


class Case(NamedTuple):
    config: MoEConfig
    tokens: tuple[int, ...]
    even: bool = False
    dtype: torch.dtype = torch.float32


PLAIN = GateConfig(aux_weight=0.0)
DROPS = GateConfig(capacity_factor=0.6, min_capacity=1, aux_weight=0.0)
UNEVEN = (7, 0, 12, 1, 5, 9, 0, 3)
CASES = {
    "uneven": Case(MoEConfig(hidden=F, top_k=5, gate=PLAIN), UNEVEN),
    "top1": Case(MoEConfig(hidden=F, top_k=1, gate=PLAIN), UNEVEN),
    "residual shared": Case(MoEConfig(hidden=F, residual=True, shared_hidden=4, bias=True, gate=PLAIN), UNEVEN),
    "capacity": Case(MoEConfig(hidden=F, top_k=3, gate=DROPS), UNEVEN),
    "even": Case(MoEConfig(hidden=F, top_k=3, gate=DROPS), (9,) * 8, even=True),
    "one token": Case(MoEConfig(hidden=F, top_k=4, gate=PLAIN), (0, 0, 1, 0, 0, 0, 0, 0)),
    "nothing": Case(MoEConfig(hidden=F, gate=PLAIN), (0,) * 8),
    "one expert": Case(MoEConfig(hidden=F, top_k=1, gate=PLAIN), UNEVEN),
    "bf16": Case(MoEConfig(hidden=F, top_k=6, gate=PLAIN), UNEVEN, dtype=torch.bfloat16),
}


def _layer(name: str, case: Case, group: dist.ProcessGroup, dispatch: AllToAllDispatch) -> MoE:
    torch.manual_seed(5)
    moe = MoE(D, E, case.config, dtype=case.dtype)
    torch.nn.init.normal_(moe.gate.weight, std=0.7)
    if name == "one expert":
        moe.gate.weight.data.zero_()[11, 0] = 9
    here = E // group.size()
    for key, p in list(moe.experts.named_parameters()):
        own = p.detach()[group.rank() * here : (group.rank() + 1) * here].clone()
        setattr(moe.experts, key, torch.nn.Parameter(own))
    moe.dispatch = dispatch
    return moe


def _step(
    name: str, case: Case, group: dist.ProcessGroup, dispatch: AllToAllDispatch, replicas: Replicas | None = None
) -> dict[str, Any]:
    """One forward and backward pass: the answer, all gradients, the routes and what was sent."""
    moe = _layer(name, case, group, dispatch)
    if replicas is not None:
        moe.dispatch = Coordinated(dispatch, replicas)
    generator = torch.Generator().manual_seed(100 + group.rank())
    shape = (1, case.tokens[group.rank()], D)
    x_BSD = torch.randn(shape, generator=generator).to(case.dtype)
    x_BSD[..., 0] = x_BSD[..., 0].abs() + 0.5
    x_BSD.requires_grad_()
    dy_BSD = torch.randn(shape, generator=generator).to(case.dtype)
    dispatch.traffic.read()
    out = moe(x_BSD)
    forward = dispatch.traffic.read()
    (out.y * dy_BSD).sum().backward()
    values = {n: p.grad for n, p in moe.named_parameters()} | {"y": out.y.detach(), "x": x_BSD.grad}
    traffic = [{k: list(s) for k, s in sent.items()} for sent in (forward, dispatch.traffic.read())]
    return {"values": values, "ids": out.routing.ids_TK, "traffic": traffic, "seconds": dispatch.traffic.clock.read()}


def _all(rank: int, world: int) -> dict[str, Any]:
    group = dist.group.WORLD
    assert group is not None
    results: dict[str, Any] = {"coordinated": _coordinated(rank, world), "refusals": _refusals(group)}
    results["sharded"] = _sharded(rank, world)
    for per_node in NODES[world]:
        network = Network(group, per_node)
        assert network.grid() == Nodes(world // per_node, per_node)
        for name, case in CASES.items():
            for kind in EXCHANGES:
                for overlap, chunks in _ways(case, world):
                    capacity = _capacity(case) if case.even else None
                    dispatch = AllToAllDispatch(
                        group, E, capacity, exchange=make_exchange(kind, network, overlap=overlap), chunks=chunks
                    )
                    results[f"{per_node} {name} {kind} {overlap} {chunks}"] = _step(name, case, group, dispatch)
        choice = pick_exchange(network, cost.Batch(64, D, 2, E))
        results[f"{per_node} choice"] = [choice.name, *choice.predictions.values()]
    return results


def _coordinated(rank: int, world: int) -> list[dict[str, Tensor]]:
    """Pairs of ranks hold the same tokens: each pair by itself, and coordinated."""
    pair, place = (_group(ranks) for ranks in ([rank - rank % 2, rank - rank % 2 + 1], range(rank % 2, world, 2)))
    results = []
    for name in ("uneven", "residual shared", "one token"):
        case = CASES[name]
        case = case._replace(tokens=case.tokens[: world // 2])
        for coordinated in (False, True):
            dispatch = AllToAllDispatch(place, E, exchange=make_exchange("hierarchical", Network(place, world // 2)))
            replicas = Replicas(pair, dispatch.traffic, world // 2)
            results.append(_step(name, case, place, dispatch, replicas if coordinated else None))
    return results


def _sharded(rank: int, world: int) -> list[dict[str, Tensor]]:
    """Experts on pairs of ranks, sharded by FSDP over the pairs: in one piece, and in chunks."""
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("edp", "ep"))
    group, case = mesh["ep"].get_group(), CASES["residual shared"]
    results = []
    for chunks in (1, 4):
        moe = _layer("", case, group, AllToAllDispatch(group, E, chunks=chunks))
        sharded = fully_shard(moe.experts, mesh=mesh["edp"], reshard_after_forward=True)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        generator = torch.Generator().manual_seed(rank)
        x_BSD = torch.randn((1, 5 + rank, D), generator=generator).requires_grad_()
        for _ in range(2):  # gradients of two passes add up
            moe(x_BSD).y.square().sum().backward()
        values = {n: p.grad for n, p in moe.named_parameters() if p.grad is not None} | {"x": x_BSD.grad}
        results.append({n: v.to_local() if isinstance(v, DTensor) else v for n, v in values.items()})
    return results


def _refusals(group: dist.ProcessGroup) -> list[str]:
    world = group.size()
    attempts: list[Callable[[], Any]] = [
        lambda: make_exchange("fast", Network(group)),
        lambda: make_exchange("hierarchical", Network(group, world - 1)),
        lambda: AllToAllDispatch(group, E, chunks=3),
        lambda: AllToAllDispatch(group, E, 4, chunks=2),
        lambda: Coordinated(AllToAllDispatch(group, E, 4), Replicas(group)),
    ]
    said = []
    for attempt in attempts:
        try:
            attempt()
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said


def _group(ranks: Any) -> dist.ProcessGroup:
    group = dist.new_group(list(ranks), use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _ways(case: Case, world: int) -> list[tuple[bool, int]]:
    """Whether what travels overlaps, and the chunks."""
    if case.even or case.config.top_k == 3:
        return [(True, 1)]
    return [(True, 1), (False, 1), (True, 2)] if case.config.residual else [(True, 1), (True, E // world)]


def _capacity(case: Case) -> int:
    return max(-(-case.tokens[0] * case.config.top_k * 6 // (E * 10)), 1)


def _same_bits(mine: Tensor | None, theirs: Tensor | None) -> bool:
    if mine is None or theirs is None:
        return mine is theirs
    whole = {2: torch.int16, 4: torch.int32}[theirs.element_size()]
    return mine.shape == theirs.shape and torch.equal(mine.view(whole), theirs.view(whole))


@pytest.mark.dist
@pytest.mark.parametrize("world", [pytest.param(n, marks=[pytest.mark.long] * (n == 4)) for n in NODES])
def test_all_exchanges_give_the_same_bits_and_send_what_the_formulas_say(world: int) -> None:
    ranks = run_ranks(_all, world)
    _check_coordinated([r["coordinated"] for r in ranks])
    _check_refusals(ranks[0]["refusals"], world)
    for whole, cut in (r["sharded"] for r in ranks):
        assert whole.keys() == cut.keys()
        assert all(_same_bits(cut[n], whole[n]) and whole[n].abs().sum() > 0 for n in whole)
    for per_node in NODES[world]:
        choices = [r[f"{per_node} choice"] for r in ranks]
        assert choices == choices[:1] * world, "all ranks pick the same"
        assert min(choices[0][1:]) > 0
        for name, case in CASES.items():
            for kind in EXCHANGES:
                for overlap, chunks in _ways(case, world):
                    key = f"{per_node} {name} {kind} {overlap} {chunks}"
                    for rank, result in enumerate(ranks):
                        expected = result[f"{per_node} {name} flat True 1"]["values"]
                        for n, value in result[key]["values"].items():
                            assert _same_bits(value, expected[n]), f"{n} of rank {rank} in {key}"
                    if not case.even and chunks == 1:
                        _check_counts([r[key] for r in ranks], Nodes(world // per_node, per_node), kind, case)


def _check_counts(results: list[dict[str, Any]], nodes: Nodes, kind: str, case: Case) -> None:
    routed = cost.observe([r["ids"].numpy() for r in results], E, nodes)
    batch = cost.Batch(0, D, case.config.top_k, E, case.dtype.itemsize)
    forward = cost.phases(kind, routed, nodes, batch, backward=False)
    both = cost.phases(kind, routed, nodes, batch)
    for rank, result in enumerate(results):
        for counted, matrices in zip(result["traffic"], (forward, both[len(forward) :]), strict=True):
            expected = cost.sent(matrices, nodes, rank)
            assert counted == {k: list(s) for k, s in expected.items()}, f"rank {rank} of {nodes} by {kind}"


def _check_coordinated(ranks: list[list[dict[str, Any]]]) -> None:
    """What replicas get by their shares is what each gets by itself; an expert's gradients are halves of it."""
    for first, second in zip(ranks[::2], ranks[1::2], strict=True):
        for alone, one, other in zip(first[::2], first[1::2], second[1::2], strict=True):
            for name, expected in alone["values"].items():
                if not name.startswith("experts."):
                    assert_close_rms(one["values"][name], expected, 1e-6, name)
                    assert _same_bits(one["values"][name], other["values"][name]), name
                else:
                    assert_close_rms(one["values"][name] + other["values"][name], expected, 1e-6, name)
            assert sum(s[1] for s in one["traffic"][0].values()) > 0


def _check_refusals(said: list[str], world: int) -> None:
    expected = [
        "exchange 'fast' is not one of flat, hierarchical, deduplicated",
        f"do not fill nodes of {world - 1} ranks evenly: use the flat exchange",
        f"the {E // world} experts of a rank do not divide into 3 chunks",
        "even splits travel in one piece: give chunks=2 without even_capacity",
        "coordinate a dispatch without even_capacity",
    ]
    for one, text in zip(said, expected, strict=True):
        assert text in one
