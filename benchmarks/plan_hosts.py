"""`coterie bench plan --netns`: the planner over hosts that are network namespaces, 1 ms and 1 Gbit/s apart.

Cores are measured as `benchmarks/plan.py` does; then, on the ranks of the hosts, the links between them, and steps.
"""

from __future__ import annotations

import argparse
import json as jsonlib
import statistics
from pathlib import Path
from typing import Any

import torch

from ..parallel.collectives import all_reduce_max, all_reduce_sum
from ..parallel.launch import init_ranks
from ..train.machines import Machine
from .hosts import Hosts
from .plan import BENCH, CASES, Case, calibrated, compare, core_count, prepare, seconds_of_step, weigh
from .plan_probe import probe_links, with_links
from .pool import Pool
from .rows import Row, show, write
from .spread import run_spread

HOSTS = {
    (2, 1): ("dense, FSDP 2", "MoE, FSDP 2", "MoE, EP 2"),
    (2, 2): ("MoE, EP 4", "MoE, TP 2, EP 4"),
}
"""By hosts and ranks on each, the cases of `benchmarks/plan.py`."""


def main(json: str | Path | None = None, quick: bool = False, netns: bool = True, limit_s: float = 600) -> list[Row]:
    """Measures all cases, shows the table, and writes the rows to `json`.

    Args:
        quick: the first hosts and case alone, few repeats.
        netns: False: hosts are pretended, and there is no link between them.
        limit_s: seconds after which the ranks of some hosts are ended.
    """
    if netns:
        Hosts(2)  # refuses at once what cannot be made
    cores, repeats = core_count(), 3 if quick else 7
    pool = Pool(2)
    try:
        machine, _ = calibrated(pool, cores, repeats)
    finally:
        pool.close()
    rows: list[Row] = []
    for (nodes, per_node), names in list(HOSTS.items())[: 1 if quick else None]:
        names = names[: 1 if quick else None]
        words = ["--repeats", str(repeats), "--cases", *names]
        found = run_spread("plan_hosts", nodes, per_node, words, netns, limit_s)
        on = with_links(machine.shared(nodes * per_node), found["links"])
        rows += _rows(found, on, f"{nodes} x {per_node} hosts", per_node)
        if json is not None:
            write(rows, json)
    show([row for row in rows if not row.metric.startswith("part ")])
    errors = [abs(row.value) for row in rows if row.metric == "step error"]
    print(f"step error: median {statistics.median(errors):.1f}%, largest {max(errors):.1f}%")
    return rows


def _rows(found: dict[str, Any], on: Machine, hosts: str, per_node: int) -> list[Row]:
    rows = []
    for case in CASES:
        if case.name in found["cases"]:
            one = found["cases"][case.name]
            named = case._replace(name=f"{case.name}, {hosts}, {found['where']}")
            rows += compare(named, one["weighed"], on, one["seconds"], node=per_node)
    for kind, link in (("intra", on.intra), ("inter", on.inter)):
        if link.bandwidth != float("inf"):
            rows.append(Row(BENCH, hosts, kind, "latency", link.latency * 1e3, "ms"))
            rows.append(Row(BENCH, hosts, kind, "bandwidth", link.bandwidth / 1e6, "MB/s"))
    return rows


def worker(out: Path, where: str, names: list[str], repeats: int) -> None:
    """One rank: measures the links, then steps of every case. Rank 0 writes."""
    ranks = init_ranks("cpu")
    torch.set_num_threads(1)
    found: dict[str, Any] = {"where": where, "links": probe_links(ranks.rank, ranks.world), "cases": {}}
    for case in [case for case in CASES if case.name in names]:
        found["cases"][case.name] = _measure(case, ranks.rank, ranks.world, repeats)
    if ranks.first:
        out.write_text(jsonlib.dumps(found))
    ranks.shutdown()


def _measure(case: Case, rank: int, world: int, repeats: int) -> dict[str, Any]:
    """Seconds of every step on the slowest rank; the fullest peak and the mean of bytes sent, as of one rank."""
    prepare(rank, world, tuple(case), 6)
    seconds = torch.tensor([seconds_of_step(rank, world) for _ in range(repeats)], dtype=torch.float64)
    weighed = weigh(rank, world)
    peak = all_reduce_max(torch.tensor(weighed["peak"], dtype=torch.float64)).item()
    sent = all_reduce_sum(torch.tensor(weighed["sent"], dtype=torch.float64)).item() / world
    return {"seconds": all_reduce_max(seconds).tolist(), "weighed": [{"peak": peak, "sent": sent}]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Hold the planner against steps over namespaces as hosts.")
    parser.add_argument("--worker", type=Path, required=True)
    parser.add_argument("--where", default="")
    parser.add_argument("--cases", nargs="*", default=[])
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    worker(arguments.worker, arguments.where, arguments.cases, arguments.repeats)
