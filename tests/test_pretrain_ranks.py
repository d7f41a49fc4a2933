"""`coterie pretrain --ranks N`: one sentence when it cannot run, and a signal saves before all processes are gone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from runs import write_text

from coterie.train import launch as launch_file
from coterie.train import pretrain
from coterie.train.launch import launch
from coterie.train.manifest import list_checkpoints
from coterie.train.prepare import prepare

TIMEOUT = 240  # seconds; on an idle machine ten are enough


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    prepare([write_text(folder / "text.txt")], folder / "train", train_vocab=300, split="blank", quiet=True)
    return folder / "train"


def command(data: Path, run: Path, ranks: int, *more: str) -> list[str]:
    start = [sys.executable, "-m", "coterie.cli", "pretrain", "tiny", "--ranks", str(ranks), "--run-dir", str(run)]
    leaves = ["--data.train", str(data), "--parallel.device", "cpu", "--parallel.threads", "1"]
    return [*start, *leaves, "--log.tensorboard", "False", *more]


def test_what_needs_no_rank_is_refused_before_one_starts(tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch_file, "_torchrun", lambda *_: pytest.fail("ranks were started"))
    for arguments, sentence in (
        (["tinny"], "no recipe 'tinny'"),
        (["tiny", "--optim.lrr", "1"], "no option --optim.lrr"),
        (["tiny"], "batch_size 8 does not divide over 3 ranks"),
        (["tiny", "--batch-size", "9", "--parallel.ep", "2"], "ep=2 does not divide 3 ranks"),
    ):
        with pytest.raises(ValueError, match=sentence):
            launch(3, arguments)
    with pytest.raises(ValueError, match="--ranks 0"):
        launch(0, ["tiny"])
    with pytest.raises(ValueError, match="--restarts -1"):
        launch(2, ["tiny"], -1)
    assert launch(3, ["tiny", "--help"]) == 0
    assert "--optim.lr" in capfd.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.dist
def test_what_the_ranks_refuse_is_one_sentence(tmp_path: Path) -> None:
    """Once: restarts are not for what would be refused again."""
    words = [*command(tmp_path / "nowhere", tmp_path / "run", 2), "--restarts", "2"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("coterie: there is no ")
    assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.dist
def test_what_one_rank_alone_meets_is_one_sentence(data: Path, tmp_path: Path) -> None:
    """Rank 0 alone writes metrics.jsonl; the other meets a peer that is gone, and leaves the word to it."""
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    done = subprocess.run(command(data, tmp_path / "run", 2), capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("coterie: ")
    assert "metrics.jsonl" in done.stderr.splitlines()[-1]


@pytest.mark.dist
def test_a_run_over_two_pretended_nodes_says_how_its_rows_travel(data: Path, tmp_path: Path) -> None:
    words = command(data, tmp_path / "run", 2, "--steps", "1", "--parallel.ep", "2", "--parallel.ranks-per-node", "1")
    done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    assert "experts on 2 nodes of 1 ranks: exchange " in done.stderr, done.stderr


def test_a_killed_rank_is_named(monkeypatch, capsys) -> None:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    def fail(_: object) -> None:
        raise ChildFailedError("name", {1: ProcessFailure(1, 77, -signal.SIGKILL, "<N/A>")})

    monkeypatch.setattr(run, "run", fail)
    assert launch(2, ["tiny"]) == 128 + signal.SIGKILL
    assert "coterie: rank 1 was killed by SIGKILL, most likely for want of memory" in capsys.readouterr().err


def test_ranks_are_started_again_unless_they_told_why_not(monkeypatch, capsys) -> None:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    jobs: list[str] = []

    def fail(arguments: Any) -> None:
        jobs.append(arguments.rdzv_id)
        code = codes[len(jobs) - 1]
        if code:
            raise ChildFailedError("name", {1: ProcessFailure(1, 77, code, "<N/A>")})

    monkeypatch.setattr(run, "run", fail)
    for codes, status in (
        ([1, -signal.SIGKILL, 0], 0),
        ([1, pretrain.REFUSED], pretrain.REFUSED),
        ([1, 1, 1], 1),
        ([1, 1, -signal.SIGKILL], 128 + signal.SIGKILL),
    ):
        jobs.clear()
        assert launch(2, ["tiny"], 2) == status
        assert len(jobs) == len(codes)
        assert len(set(jobs)) == 1, "lives of one run have one name"
    assert capsys.readouterr().err.count("\n") == 1, "a death that a restart mends is no news"


def _alive(run: Path) -> list[str]:
    """Command lines of all processes that name the run directory."""
    lines = []
    for entry in Path("/proc").iterdir():
        try:
            lines.append((entry / "cmdline").read_bytes().decode())
        except (OSError, UnicodeDecodeError):
            continue
    return [line for line in lines if str(run) in line]


@pytest.mark.dist
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="lists processes by /proc")
@pytest.mark.parametrize(
    ("ranks", "number", "group", "status"),
    [
        (1, signal.SIGINT, True, 0),
        pytest.param(2, signal.SIGINT, True, 130, marks=pytest.mark.long),
        (2, signal.SIGTERM, False, 143),
    ],
)
def test_a_signal_to_the_command_saves(
    ranks: int, number: int, group: bool, status: int, data: Path, tmp_path: Path
) -> None:
    """Ctrl-C at a terminal reaches the whole group of processes; `kill` reaches the command alone."""
    run = tmp_path / "run"
    words = command(data, run, ranks, "--steps", "100000")
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + TIMEOUT
    while not ((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    (os.killpg if group else os.kill)(process.pid, number)
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == status, err
    assert b"saved at step" in err
    assert b"Traceback" not in err
    assert len(list_checkpoints(run / "checkpoints")) == 1
    assert not _alive(run)
