"""Starting ranks: torchrun's environment, a single process, and the mistakes that people make."""

import logging
import os
import socket
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.distributed as dist

from coterie.parallel.launch import TORCHRUN, init_ranks, rank_logger


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCHRUN, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_a_single_process_needs_no_environment_and_no_port() -> None:
    ranks = init_ranks("cpu")
    try:
        assert (ranks.rank, ranks.local_rank, ranks.world) == (0, 0, 1)
        assert ranks.device == torch.device("cpu")
        assert ranks.first
        total = torch.ones(2)
        dist.all_reduce(total)
        assert total.tolist() == [1, 1]
        assert init_ranks("cpu") == ranks, "a second call joins the open group"
    finally:
        ranks.shutdown()
        ranks.shutdown()
    assert not dist.is_initialized()


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ValueError, match="RANK is set but WORLD_SIZE, MASTER_PORT is not"):
        init_ranks("cpu")


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in zip(TORCHRUN, ("0", "2", "127.0.0.1", port), strict=True):
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=f"port {port} on 127.0.0.1 is in use"):
            init_ranks("cpu")
    assert not dist.is_initialized()


def test_an_absent_master_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in zip(TORCHRUN, ("1", "2", "127.0.0.1", port), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"no answer from the first rank at 127.0.0.1:{port}"):
        init_ranks("cpu", timeout_s=1)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("RANK", "5", "RANK=5 is not one of WORLD_SIZE=2 ranks"),
        ("WORLD_SIZE", "0", "RANK=0 is not one of WORLD_SIZE=0 ranks"),
        ("MASTER_PORT", "99999", "MASTER_PORT=99999 is not a port"),
    ],
)
def test_a_number_out_of_range_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str) -> None:
    """Torch would wait half an hour for a rank 5 of 2."""
    for one, right in zip(TORCHRUN, ("0", "2", "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(one, right)
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        init_ranks("cpu")


@pytest.mark.parametrize(("name", "value"), [("RANK", "two"), ("WORLD_SIZE", ""), ("MASTER_PORT", "-1")])
def test_a_number_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    for one, right in zip(TORCHRUN, ("0", "1", "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(one, right)
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name}={value!r} is not a whole number"):
        init_ranks("cpu")


def test_devices_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="'tpu' is not one of cpu, cuda"):
        init_ranks("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch sees no CUDA device"):
            init_ranks("cuda")


@pytest.mark.dist
def test_torchrun_starts_two_ranks(tmp_path) -> None:
    script = tmp_path / "hello.py"
    script.write_text(
        textwrap.dedent("""
        import torch, torch.distributed as dist
        from coterie.parallel.launch import init_ranks
        ranks = init_ranks("cpu")
        total = torch.tensor([ranks.rank + 1])
        dist.all_reduce(total)
        ranks.log.info("sum %d of %d", total.item(), ranks.world)
        ranks.log.warning("careful")
        ranks.shutdown()
        """)
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "sum" in line or "careful" in line]
    assert sorted(said) == ["careful", "rank 1: careful", "sum 3 of 2"]


def test_the_logger_is_set_up_once() -> None:
    assert rank_logger(0) is rank_logger(0)
    # pytest hangs its own handlers on a logger that does not propagate
    assert [type(handler) for handler in rank_logger(0).handlers].count(logging.StreamHandler) == 1
