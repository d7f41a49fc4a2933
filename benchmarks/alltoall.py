"""`coterie bench alltoall`: the exchanges side by side, over hosts that are pretended or network namespaces.

Every rank has the same number of tokens and random choices; experts answer with what they get. One run is a forward
and a backward pass. Coordinated: pairs of ranks hold the same tokens, twice as many, and each sends its half.
Last, a whole layer on two hosts of one rank: its exchanges waited for, overlapped, and in chunks.
"""

# Shapes: T tokens of a rank, E experts, K choices, D model.

from __future__ import annotations

import argparse
import json as jsonlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..moe.config import MoEConfig
from ..moe.dispatch import AllToAllDispatch, Coordinated
from ..moe.gate import Routing, Stats
from ..moe.layer import MoE
from ..parallel.all_to_all import Network
from ..parallel.collectives import all_reduce_max
from ..parallel.cost import Batch, choose_exchange
from ..parallel.exchange import Flat
from ..parallel.exchange_dedup import EXCHANGES, make_exchange
from ..parallel.exchange_probe import measure_rates, pick_exchange
from ..parallel.exchange_replicas import Replicas
from ..parallel.launch import init_ranks
from .rows import Row, show, write
from .spread import run_spread
from .timing import interleaved, median_and_spread

BENCH = "alltoall"
HOSTS = ((2, 2), (2, 4), (4, 2))  # nodes, ranks on each
TOKENS = (64, 8192)  # of all ranks together
DIM, EXPERTS, TOP_K = 512, 16, 4
LAYER_TOKENS = 1024


def main(
    json: str | Path | None = None, quick: bool = False, netns: bool = False, limit_s: float = 1200
) -> list[Row]:
    """Measures all cases of this machine, shows the table, and writes the rows to `json`.

    Args:
        quick: the first hosts with the small batch alone, few repeats.
        netns: hosts are network namespaces with links of 1 ms and 1 Gbit/s between them; needs root.
        limit_s: seconds after which the ranks of one case are ended.
    """
    rows: list[Row] = []
    for nodes, per_node in HOSTS[:1] if quick else HOSTS:
        for found in _on_ranks(nodes, per_node, TOKENS[:1] if quick else TOKENS, 3 if quick else 11, netns, limit_s):
            rows += _rows(found)
        if json is not None:
            write(rows, json)
    if not quick:
        for found in _on_ranks(2, 1, (), 11, netns, limit_s):
            rows += _layer_rows(found)
        if json is not None:
            write(rows, json)
    show([row for row in rows if not row.metric.startswith("intra")])
    return rows


def _rows(found: dict[str, Any]) -> list[Row]:
    """The tidy rows of one case."""
    case, rows = found["case"], []
    times = {name: median_and_spread(seconds) for name, seconds in found["seconds"].items()}
    best = min(times[name][0] for name in EXCHANGES)
    for name, (value, spread) in times.items():
        rows.append(Row(BENCH, case, name, "step", value * 1e3, "ms", spread * 1e3, best * 1e3, best / value))
        for how, seconds in found["predictions"].items():
            if name in seconds:
                rows.append(Row(BENCH, case, name, how, seconds[name] * 1e3, "ms"))
        for link, (messages, size) in found["sent"][name].items():
            rows.append(Row(BENCH, case, name, f"{link}_messages", messages, "per rank"))
            rows.append(Row(BENCH, case, name, f"{link}_bytes", size / 2**20, "MiB per rank"))
    picked = found["picked"]
    rows.append(
        Row(BENCH, case, picked, "picked", times[picked][0] / best, "x best", None, 1.0, best / times[picked][0])
    )
    for kind, (latency, bandwidth, message) in found["rates"].items():
        rows.append(Row(BENCH, case, kind, "latency", latency * 1e3, "ms"))
        rows.append(Row(BENCH, case, kind, "per_message", message * 1e3, "ms"))
        rows.append(Row(BENCH, case, kind, "bandwidth", bandwidth / 1e6, "MB/s"))
    return rows


def _layer_rows(found: dict[str, Any]) -> list[Row]:
    times = {name: median_and_spread(seconds) for name, seconds in found["seconds"].items()}
    base = next(iter(times.values()))[0]
    return [
        Row(BENCH, found["case"], name, "layer", value * 1e3, "ms", spread * 1e3, base * 1e3, base / value)
        for name, (value, spread) in times.items()
    ]


def _on_ranks(
    nodes: int, per_node: int, tokens: tuple[int, ...], repeats: int, netns: bool, limit_s: float
) -> list[dict[str, Any]]:
    words = ["--repeats", str(repeats), "--tokens", *map(str, tokens)]
    return run_spread(BENCH, nodes, per_node, words, netns, limit_s)


def worker(out: Path, where: str, tokens: list[int], repeats: int) -> None:
    """One rank: measures the links, then every exchange for every batch; a layer where no batch is given. Rank 0
    writes."""
    ranks = init_ranks("cpu")
    torch.set_num_threads(1)
    group = dist.group.WORLD
    assert group is not None
    network = Network(group)
    rates, found = measure_rates(network), []
    nodes = network.grid()
    runs = _dispatches(network)
    for total in tokens:
        each = total // ranks.world
        steps = {name: _step(dispatch, each, ranks.rank) for name, dispatch in runs.items()}
        seconds = interleaved(steps, repeats)
        slowest = all_reduce_max(torch.tensor(list(seconds.values()), dtype=torch.float64)).tolist()
        batch = Batch(each, DIM, TOP_K, EXPERTS)
        choice, modelled = pick_exchange(network, batch), choose_exchange(batch, nodes, rates)
        found.append(
            {
                "case": f"{nodes.nodes}x{nodes.per_node} hosts, {total} tokens, {where}",
                "seconds": dict(zip(seconds, slowest, strict=True)),
                "sent": {name: _sent(runs[name], step) for name, step in steps.items()},
                "predictions": {"predicted": choice.predictions, "by_formula": modelled.predictions},
                "picked": choice.name,
                "rates": rates,
            }
        )
    if not tokens:
        found.append({"case": f"layer of 2 hosts, {LAYER_TOKENS} tokens each, {where}"})
        found[0]["seconds"] = interleaved(_layers(network), repeats)
    if ranks.first:
        out.write_text(jsonlib.dumps(found))
    ranks.shutdown()


def _dispatches(network: Network) -> dict[str, AllToAllDispatch | Coordinated]:
    found: dict[str, AllToAllDispatch | Coordinated] = {
        name: AllToAllDispatch(network.group, EXPERTS, exchange=make_exchange(name, network)) for name in EXCHANGES
    }
    rank, world = network.group.rank(), network.group.size()
    # Pairs of neighbours hold the same tokens; the ranks of a place among the pairs share the experts out.
    pair, place = _group(range(rank - rank % 2, rank - rank % 2 + 2)), _group(range(rank % 2, world, 2))
    dispatch = AllToAllDispatch(place, EXPERTS, exchange=Flat(Network(place)))
    return found | {"coordinated": Coordinated(dispatch, Replicas(pair, dispatch.traffic))}


def _layers(network: Network) -> dict[str, Callable[[], None]]:
    """The same PR-MoE layer with its rows waited for, under way beside its residual MLP, and in chunks."""
    x_BSD, dy_BSD = torch.randn(2, 1, LAYER_TOKENS, DIM)
    x_BSD.requires_grad_()
    steps = {}
    for name, overlap, chunks in (("waited for", False, 1), *((f"chunks {n}", True, n) for n in (1, 2, 4))):
        moe = MoE(DIM, EXPERTS, MoEConfig(hidden=2 * DIM, top_k=2, residual=True))
        for key, whole in list(moe.experts.named_parameters()):
            mine = whole.detach().chunk(network.group.size())[network.group.rank()].clone()
            setattr(moe.experts, key, torch.nn.Parameter(mine))
        exchange = make_exchange("flat", network, overlap=overlap)
        moe.dispatch = AllToAllDispatch(network.group, EXPERTS, exchange=exchange, chunks=chunks)
        steps[name] = partial(_train, moe, x_BSD, dy_BSD)
    return steps


def _train(moe: MoE, x_BSD: Tensor, dy_BSD: Tensor) -> None:
    moe(x_BSD).y.backward(dy_BSD)
    moe.zero_grad()
    x_BSD.grad = None


def _group(ranks: range) -> dist.ProcessGroup:
    group = dist.new_group(list(ranks), use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _step(dispatch: AllToAllDispatch | Coordinated, tokens: int, rank: int) -> Callable[[], None]:
    """One forward and one backward pass of experts that answer with what they get."""
    pairs = isinstance(dispatch, Coordinated)
    generator = torch.Generator().manual_seed(rank // 2 if pairs else rank)
    tokens = tokens * 2 if pairs else tokens
    ids_TK = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K).indices
    x_TD = torch.randn(tokens, DIM, generator=generator).requires_grad_()
    dy_TD, none = torch.randn(tokens, DIM, generator=generator), torch.zeros(())
    counts_E = ids_TK.flatten().bincount(minlength=EXPERTS)
    weights_TK = torch.full((tokens, TOP_K), 1 / TOP_K)
    routing = Routing(ids_TK, ids_TK, weights_TK, none, none, Stats(counts_E, counts_E, none, none, none))

    def run() -> None:
        dispatch(x_TD, routing, _echo).backward(dy_TD)
        x_TD.grad = None

    return run


def _echo(x_QD: Tensor, *_: object) -> Tensor:
    return x_QD * 1


def _sent(dispatch: AllToAllDispatch | Coordinated, step: Callable[[], None]) -> dict[str, list[float]]:
    """Messages and bytes of one run on the rank that sends most, by kind of link."""
    inner = dispatch.dispatch if isinstance(dispatch, Coordinated) else dispatch
    assert isinstance(inner, AllToAllDispatch)
    traffic = inner.traffic
    traffic.read()
    step()
    sent = traffic.read()
    most = all_reduce_max(torch.tensor([list(s) for s in sent.values()], dtype=torch.float64))
    return dict(zip(sent, most.tolist(), strict=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time the exchanges of expert parallelism side by side.")
    parser.add_argument("--json", type=Path, help="write the tidy rows here")
    parser.add_argument("--quick", action="store_true", help="one case, few repeats")
    parser.add_argument("--netns", action="store_true", help="hosts are network namespaces; needs root")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--where", default="", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, nargs="*", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        worker(arguments.worker, arguments.where, arguments.tokens, arguments.repeats)
    else:
        main(arguments.json, arguments.quick, arguments.netns)
