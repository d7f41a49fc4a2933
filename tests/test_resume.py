"""A run killed with SIGKILL at any moment, also while it saves, goes on bit for bit as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import write_text

from coterie.benchmarks.pool import free_port
from coterie.train.metrics import read_metrics
from coterie.train.prepare import prepare

# Lives of a run, one after another: each is a process per rank, forked from one that has imported everything.
# A life has a SIGKILL built into one rank: "moment:count" kills at the count-th passing of that moment. When a rank
# dies the others are killed too, as torchrun does. Reports, per life, the first rank's end and the checkpoints left.
SCRIPT = """
import json, os, signal, sys
from coterie.train import checkpoint, metrics, pretrain, session
from coterie.train.token_files import quiet_megatron

quiet_megatron("gpt_dataset")

def kill_at(owner, method, count, before):
    real, left = getattr(owner, method), [count]
    def wrapped(*arguments, **options):
        left[0] -= 1
        if left[0] == 0 and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **options)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, method, wrapped)

MOMENTS = {
    "row": (metrics.MetricsWriter, "write", False),
    "shards": (checkpoint.Checkpointer, "_hash_own", True),
    "manifest": (checkpoint.Checkpointer, "_write_manifest", False),
    "renamed": (checkpoint.Checkpointer, "_prune", True),
}

def live(life, rank, world):
    log = os.open(life["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(life["port"]))
    moment, _, count = life["kill"].partition(":")
    if moment and rank == life["killed_rank"]:
        owner, method, before = MOMENTS[moment]
        kill_at(owner, method, int(count), before)
    os._exit(pretrain.main(life["arguments"]))

report = []
for life in json.loads(sys.argv[1]):
    children = []
    for rank in range(life["world"]):
        child = os.fork()
        if child == 0:
            live(life, rank, life["world"])
        children.append(child)
    ends = {}
    while len(ends) < len(children):
        child, status = os.wait()
        ends[child] = os.waitstatus_to_exitcode(status)
        if ends[child]:
            for other in children:
                if other not in ends:
                    os.kill(other, signal.SIGKILL)
    report.append([ends[children[life["killed_rank"]]], sorted(os.listdir(life["checkpoints"]))])
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    """Runs lives of one directory after another: run([(directory, kill), ...]) -> [(exit code, checkpoints), ...]."""
    folder = tmp_path_factory.mktemp("resume")
    prepare([write_text(folder / "text.txt")], folder / "train", train_vocab=300, split="blank", quiet=True)
    script = folder / "lives.py"
    script.write_text(SCRIPT)

    def call(lives: list[tuple[Path, str]], world: int = 1, killed_rank: int = 0) -> list[Any]:
        options = {
            "--data.train": folder / "train",
            "--data.split": "90,10,0",
            "--data.cache": folder / f"cache{world}",
            "--parallel.device": "cpu",
            "--parallel.threads": 1,
            "--parallel.ep": world,
            "--steps": 9,
            "--eval-every": 4,
            "--checkpoint.every": 2,
            "--checkpoint.keep": 2,
            "--log.tensorboard": False,
            "--model.moe.gate.noise": "jitter",
            "--model.moe.gate.bias-update": 0.01,
        }
        told = [
            {
                "arguments": ["tiny", *(str(x) for p in ({"--run-dir": d} | options).items() for x in p)],
                "log": f"{d}.log",
                "checkpoints": f"{d}/checkpoints",
                "kill": kill,
                "world": world,
                "killed_rank": killed_rank,
                "port": free_port(),
            }
            for d, kill in lives
        ]
        command = [sys.executable, str(script), json.dumps(told)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr
        return [tuple(entry) for entry in json.loads(done.stdout.splitlines()[-1])]

    return call


def story(directory: Path) -> list[tuple]:
    """All numbers that the mathematics of a run decides; JSON keeps every bit of them."""
    names = ("step", "loss", "grad_norm", "lr", "loads", "aux", "z", "valid_loss")
    return [tuple(row.get(name) for name in names) for row in read_metrics(directory)]


def test_killed_anywhere_is_bitwise_the_same(run, tmp_path: Path) -> None:
    """Saves are at steps 2, 4, 6, 8 and 9; each life goes on from the newest whole checkpoint."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    saved = ["step_00000002", "step_00000004"]
    lives = [
        ("row:1", []),  # nothing was saved yet
        ("renamed:2", saved),  # in place; what is too old is not yet removed
        ("shards:1", [*saved, "unfinished_00000006"]),  # shards written, nothing else
        ("manifest:1", [*saved, "unfinished_00000006"]),  # all written, not yet renamed
        ("row:1", saved),  # between saves; what the life before left is cleared
    ]
    done = run([(whole, ""), *((cut, kill) for kill, _ in lives), (cut, "")])
    assert done[0] == (0, ["step_00000008", "step_00000009"]), Path(f"{whole}.log").read_text()
    for (kill, left), end in zip(lives, done[1:], strict=False):
        assert end == (-signal.SIGKILL, left), f"{kill}: {Path(f'{cut}.log').read_text()}"
    assert done[-1] == done[0], Path(f"{cut}.log").read_text()
    assert Path(f"{cut}.log").read_text().count("step_00000004, step 4") == 4
    assert story(cut) == story(whole)
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (whole, cut)]
    assert weights[0] == weights[1]


@pytest.mark.dist
def test_two_ranks_one_killed_while_saving(run, tmp_path: Path) -> None:
    """Experts over two ranks; the second one dies with its shards written, in the save of step 4."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = run([(whole, ""), (cut, "shards:2"), (cut, "")], world=2, killed_rank=1)
    assert done[0][0] == 0, Path(f"{whole}.log").read_text()
    assert done[1] == (-signal.SIGKILL, ["step_00000002", "unfinished_00000004"]), Path(f"{cut}.log").read_text()
    assert done[2] == done[0], Path(f"{cut}.log").read_text()
    assert "step_00000002, step 2" in Path(f"{cut}.log").read_text()
    assert story(cut) == story(whole)
