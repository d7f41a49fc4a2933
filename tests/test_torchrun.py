"""torchrun as users start it: a rank that hangs, a node that is lost, nodes on several hosts."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import write_text

from coterie.benchmarks import hosts
from coterie.parallel.launch import OWN_STORE
from coterie.train.manifest import list_checkpoints, step_of
from coterie.train.metrics import read_metrics
from coterie.train.prepare import prepare

pytestmark = [pytest.mark.dist, pytest.mark.slow]
TIMEOUT = 280  # seconds; on an idle machine fifty are enough
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", OWN_STORE: "1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    prepare([write_text(folder / "text.txt")], folder / "train", train_vocab=300, split="blank", quiet=True)
    return folder / "train"


def leaves(data: Path, run: Path, *more: str) -> list[str]:
    fixed = ["tiny", "--run-dir", str(run), "--data.train", str(data), "--parallel.device", "cpu"]
    return [*fixed, "--parallel.threads", "1", "--log.tensorboard", "False", "--eval-batches", "0", *more]


def on_one_host(ranks: int, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "coterie.cli", "pretrain", *arguments, "--ranks", str(ranks)]


def node(endpoint: str, address: str, nodes: str, first: bool, *arguments: str) -> list[str]:
    """One torchrun with one rank; the first opens the rendezvous, as torchrun knows a machine by its name alone."""
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-id", "nodes", "--rdzv-endpoint", endpoint]
    # So long a second node is waited for, in seconds.
    settings = f"is_host={str(first).lower()},last_call_timeout=20,keep_alive_interval=1"
    rendezvous += ["--rdzv-conf", settings, "--local-addr", address]
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes, "--nproc-per-node", "1"]
    return [*start, *rendezvous, "--max-restarts", "1", "-m", "coterie.train.pretrain", *arguments]


def story(run: Path) -> list[tuple]:
    names = ("step", "loss", "grad_norm", "lr", "loads", "aux")
    return [tuple(row[name] for name in names) for row in read_metrics(run)]


def wait(process: subprocess.Popen[str], what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + TIMEOUT
    while not (found := what()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def rows(run: Path) -> int:
    return len(read_metrics(run)) if (run / "metrics.jsonl").exists() else 0


def pid_of(run: Path, rank: int) -> int:
    """Of the process that is this rank of the run; 0: there is none."""
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(run).encode() in words and f"RANK={rank}".encode() in environment:
            return int(entry.name)
    return 0


def finish(process: subprocess.Popen[str]) -> str:
    """What it still said; it must end well."""
    _, said = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, said
    return said


@pytest.mark.long
def test_a_rank_that_hangs_is_told_of_ended_and_started_again(data: Path, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    more = ("--steps", "60", "--checkpoint.every", "5", "--parallel.ep", "2", "--parallel.timeout-s", "5")
    words = [*on_one_host(2, *leaves(data, run, *more)), "--restarts", "1"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    rank = wait(process, lambda: rows(run) > 7 and pid_of(run, 1))
    os.kill(rank, signal.SIGSTOP)
    since = time.monotonic()
    assert process.stderr is not None
    line = next(line for line in process.stderr if "has waited" in line)
    assert 5 <= time.monotonic() - since < 12
    assert line.startswith("coterie: rank 0 has waited 5 s at step ")
    assert str(run / "hang" / "rank0.json") in line
    assert (run / "hang" / "rank0.json").is_file()
    assert "resumed from" in finish(process)
    subprocess.run(on_one_host(2, *leaves(data, whole, *more)), check=True, capture_output=True, timeout=TIMEOUT)
    assert story(run) == story(whole)


@pytest.mark.long
def test_a_lost_node_leaves_a_smaller_world(data: Path, tmp_path: Path) -> None:
    """Both nodes, then the first one alone: its steps are those of one rank that begins from the same checkpoint."""
    run, alone = tmp_path / "run", tmp_path / "alone"
    more = ("--steps", "60", "--checkpoint.every", "5", "--checkpoint.keep", "99")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    logs = [(tmp_path / f"node{n}").open("w+") for n in range(2)]
    nodes = []
    for n, log in enumerate(logs):
        words = node(endpoint, "127.0.0.1", "1:2", n == 0, *leaves(data, run, *more))
        nodes.append(subprocess.Popen(words, stdout=log, stderr=log, env=ENVIRONMENT, start_new_session=True))
    try:
        lost = wait(nodes[0], lambda: rows(run) > 7 and pid_of(run, 1))
        os.killpg(nodes[1].pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(lost, signal.SIGKILL)
        assert nodes[0].wait(TIMEOUT) == 0, Path(logs[0].name).read_text()
    finally:
        for one in nodes:
            one.terminate()
    said = Path(logs[0].name).read_text()
    assert "coterie: rank 0 has lost another rank: " in said
    assert "2 cpu ranks" in said
    assert "1 cpu rank\n" in said
    resumed = int(said.rpartition(", step ")[2].split()[0])
    assert 5 <= resumed < 60
    assert [row["step"] for row in read_metrics(run)] == list(range(1, 61))
    shutil.copytree(run, alone)
    for path in list_checkpoints(alone / "checkpoints"):
        if step_of(path) > resumed:
            shutil.rmtree(path)
    subprocess.run(on_one_host(1, *leaves(data, alone, *more)), check=True, capture_output=True, timeout=TIMEOUT)
    assert story(alone) == story(run)


def _hosts() -> bool:
    try:
        hosts.Hosts(2)
    except ValueError:
        return False
    return Path("/dev/net/tun").exists()


@pytest.mark.skipif(not _hosts(), reason="needs root, iproute2 and TUN devices")
def test_two_hosts_train_as_one(data: Path, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    more = ("--steps", "6", "--parallel.ep", "2")
    environment = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": hosts.DEVICE}
    nodes = []
    with hosts.Hosts(2, delay_ms=1) as two:
        for n in range(2):
            words = node(f"{two.address(0)}:29400", two.address(n), "2", n == 0, *leaves(data, run, *more))
            command = two.command(n, words)
            kind: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
            nodes.append(subprocess.Popen(command, env=environment, **kind))
        try:
            for one in nodes:
                finish(one)
        finally:
            for one in nodes:
                one.terminate()
    subprocess.run(on_one_host(2, *leaves(data, whole, *more)), check=True, capture_output=True, timeout=TIMEOUT)
    assert len(story(run)) == 6
    assert story(run) == story(whole)
