"""A run killed with SIGKILL at any moment, also while it saves, goes on bit for bit as if nothing had happened."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import write_text

from coterie.train.metrics import read_metrics
from coterie.train.prepare import prepare

# Runs the entry with a SIGKILL built in: KILL="where:count" kills at the count-th call of that moment.
SCRIPT = """
import os, signal, sys
from coterie.train import checkpoint, metrics, pretrain

where, _, count = os.environ.get("KILL", "").partition(":")
left = int(count or 0)

def kill_at(name, owner, method, before):
    real = getattr(owner, method)
    def wrapped(*arguments, **options):
        global left
        if where == name:
            left -= 1
        if where == name and left == 0 and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **options)
        if where == name and left == 0 and not before:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, method, wrapped)

if os.environ.get("RANK", "0") == os.environ.get("KILL_RANK", "0"):
    kill_at("row", metrics.MetricsWriter, "write", False)
    kill_at("shards", checkpoint.Checkpointer, "_hash_own", True)
    kill_at("manifest", checkpoint.Checkpointer, "_write_manifest", False)
    kill_at("renamed", checkpoint.Checkpointer, "_prune", True)
sys.exit(pretrain.main())
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    """Calls the entry in a process of its own: run(directory, kill, ranks) -> exit status, output."""
    folder = tmp_path_factory.mktemp("resume")
    prepare([write_text(folder / "text.txt")], folder / "train", train_vocab=300, split="blank", quiet=True)
    script = folder / "entry.py"
    script.write_text(SCRIPT)

    def call(directory: Path, kill: str = "", ranks: int = 1, *flags: str, kill_rank: int = 0) -> tuple[int, str]:
        launch = [sys.executable]
        if ranks > 1:
            launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        options = {
            "--run-dir": directory,
            "--data.train": folder / "train",
            "--data.split": "90,10,0",
            "--data.cache": folder / "cache",
            "--parallel.device": "cpu",
            "--parallel.threads": 1,
            "--steps": 9,
            "--eval-every": 4,
            "--checkpoint.every": 2,
            "--checkpoint.keep": 2,
            "--log.tensorboard": False,
            "--model.moe.gate.noise": "jitter",
            "--model.moe.gate.bias-update": 0.01,
        }
        line = [str(x) for pair in options.items() for x in pair]
        environment = os.environ | {"KILL": kill, "KILL_RANK": str(kill_rank), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*launch, str(script), "tiny", *line, *flags],
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
        return done.returncode, done.stdout + done.stderr

    return call


def story(directory: Path) -> list[tuple]:
    """All numbers that the mathematics of a run decides; JSON keeps every bit of them."""
    names = ("step", "loss", "grad_norm", "lr", "loads", "aux", "z", "valid_loss")
    return [tuple(row.get(name) for name in names) for row in read_metrics(directory)]


def checkpoints(directory: Path) -> list[str]:
    return sorted(p.name for p in (directory / "checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.dist
def test_killed_anywhere_is_bitwise_the_same(run, tmp_path: Path) -> None:
    status, output = run(tmp_path / "whole")
    assert status == 0, output
    cut = tmp_path / "cut"
    # Saves are at steps 2, 4, 6, 8 and 9; each life goes on from the newest whole one.
    lives = {
        "row:1": [],  # nothing was saved yet
        "renamed:2": ["step_00000002", "step_00000004"],  # in place, what is too old not yet removed
        "shards:1": ["step_00000002", "step_00000004", "unfinished_00000006"],  # shards written, nothing else
        "manifest:1": ["step_00000002", "step_00000004", "unfinished_00000006"],  # all written, not yet renamed
        "row:3": ["step_00000004", "step_00000006"],  # between saves
    }
    for kill, left in lives.items():
        status, output = run(cut, kill)
        assert status == -signal.SIGKILL, f"{kill}: {output}"
        assert checkpoints(cut) == left, kill
    status, output = run(cut)
    assert status == 0, output
    assert "resumed from" in output
    assert story(cut) == story(tmp_path / "whole")
    assert checkpoints(cut) == ["step_00000008", "step_00000009"]
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_one_killed_while_saving(run, tmp_path: Path) -> None:
    flags = ("--parallel.ep", "2")
    status, output = run(tmp_path / "whole", "", 2, *flags)
    assert status == 0, output
    status, output = run(tmp_path / "cut", "shards:2", 2, *flags, kill_rank=1)
    assert status != 0
    assert "step_00000002" in checkpoints(tmp_path / "cut")
    assert "step_00000004" not in checkpoints(tmp_path / "cut")
    status, output = run(tmp_path / "cut", "", 2, *flags)
    assert status == 0, output
    assert "step_00000002, step 2" in output
    assert story(tmp_path / "cut") == story(tmp_path / "whole")
