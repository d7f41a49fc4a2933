"""Ranks that are spread over hosts: a file's `--worker`, started once a rank, pretended hosts or namespaces."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from .hosts import DEVICE, Hosts
from .pool import free_port

DELAY_MS, GBIT = 1.0, 1.0


def run_spread(what: str, nodes: int, per_node: int, words: Sequence[str], netns: bool, limit_s: float) -> Any:
    """Starts `coterie.benchmarks.<what> --worker FILE --where TEXT <words>` on every rank, as torchrun would, and
    returns what rank 0 wrote to the file, from JSON.

    Args:
        netns: hosts are network namespaces with links of 1 ms and 1 Gbit/s between them; else all is one machine.
        limit_s: seconds after which the ranks are ended.
    """
    with Hosts(nodes, DELAY_MS, GBIT) if netns else nullcontext() as hosts, tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        where = "loopback" if hosts is None else f"{DELAY_MS:g} ms {GBIT:g} Gbit/s by {hosts.link}"
        command = [sys.executable, "-m", f"coterie.benchmarks.{what}", "--worker", str(out), "--where", where, *words]
        common = {"WORLD_SIZE": str(nodes * per_node), "LOCAL_WORLD_SIZE": str(per_node), "OMP_NUM_THREADS": "1"}
        common |= {"MASTER_ADDR": "127.0.0.1" if hosts is None else hosts.address(0), "MASTER_PORT": str(free_port())}
        if hosts is not None:
            common["GLOO_SOCKET_IFNAME"] = DEVICE
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(nodes * per_node):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank % per_node)}
                there = command if hosts is None else hosts.command(rank // per_node, command)
                ranks.append(subprocess.Popen(there, env=os.environ | common | place))
            _wait_for(what, ranks, limit_s)
        finally:
            for one in ranks:
                one.kill()
                one.wait()
        return json.loads(out.read_text())


def _wait_for(what: str, ranks: list[subprocess.Popen[bytes]], limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while any(one.poll() is None for one in ranks):
        failed = [rank for rank, one in enumerate(ranks) if one.poll()]
        if failed or time.monotonic() > end:
            why = f"rank {failed[0]} failed" if failed else f"the ranks took over {limit_s:.0f} s"
            raise ValueError(f"bench {what}: {why}")
        time.sleep(0.1)
    if any(one.returncode for one in ranks):
        raise ValueError(f"bench {what}: a rank failed")
