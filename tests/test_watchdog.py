"""A rank that waits too long for another one ends, and tells where it stood."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from coterie.benchmarks.pool import free_port
from coterie.parallel.launch import init_ranks
from coterie.parallel.watchdog import STATUS, Watchdog


def _wait_for_the_other(rank: int, folder: str, port: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    init_ranks("cpu")
    dist.all_reduce(torch.ones(1))
    if rank == 1:
        time.sleep(600)
    log = os.open(f"{folder}/said", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 2)
    with Watchdog(rank, 1.0, Path(folder) / "hang", lambda: "at step 3 in forward"):
        time.sleep(1.5)  # without an open collective
        os.write(log, f"{time.time()}\n".encode())
        dist.all_to_all_single(torch.empty(2), torch.ones(2))


@pytest.mark.dist
def test_a_rank_that_waits_too_long_tells_where_and_ends(tmp_path: Path) -> None:
    ranks = mp.spawn(_wait_for_the_other, args=(str(tmp_path), free_port()), nprocs=2, join=False)
    assert ranks is not None
    first, second = ranks.processes
    first.join(60)
    ended = time.time()
    second.kill()
    assert first.exitcode == STATUS
    since, said = (tmp_path / "said").read_text().splitlines()
    assert 1 <= ended - float(since) < 5
    file = tmp_path / "hang" / "rank0.json"
    assert said == (
        "coterie: rank 0 has waited 1 s at step 3 in forward for the other ranks in gloo:all_to_all: a rank that "
        f"does not say so hangs or is gone; torch's flight record is in {file}; the same command goes on from the "
        "last checkpoint"
    )
    entries = json.loads(file.read_text())
    assert [(e["profiling_name"], e["retired"]) for e in entries[-2:]] == [
        ("gloo:all_reduce", True),
        ("gloo:all_to_all", False),
    ]


def test_one_rank_is_not_watched(tmp_path: Path) -> None:
    with Watchdog(0, 1.0, tmp_path, lambda: "") as watchdog:
        assert not watchdog.is_alive()
