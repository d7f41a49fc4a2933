"""Ranks that are killed with SIGKILL under torchrun, which starts them again: the run ends as if nothing had been."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from elastic import PHASES
from runs import write_text

from coterie.train.metrics import read_metrics
from coterie.train.prepare import prepare

LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "ep2": (2, {"--parallel.ep": 2}),
    "tp2": (2, {"--parallel.tp": 2}),
    "dp2 x ep2": (4, {"--parallel.ep": 2}),
}
STEPS, KILLED, SAVED = 8, 6, 4  # checkpoints are at even steps; the one of step 6 is being written when "save" kills


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    prepare([write_text(tmp_path / "text.txt")], tmp_path / "train", train_vocab=300, split="blank", quiet=True)
    return tmp_path


def plan(folder: Path, name: str, layout: str, kill: list[Any] | None = None, copy: str = "") -> dict[str, Any]:
    """A run for `elastic.agent_main`: in `folder / name`, one restart, or none without a kill."""
    world, degrees = LAYOUTS[layout]
    options = {
        "--run-dir": folder / name,
        "--data.train": folder / "train",
        "--data.split": "90,10,0",
        "--data.cache": folder / "cache",
        "--parallel.device": "cpu",
        "--parallel.threads": 1,
        "--steps": STEPS,
        "--eval-every": 4,
        "--checkpoint.every": 2,
        "--checkpoint.asynchronous": False,
        "--log.tensorboard": False,
        "--model.moe.gate.bias-update": 0.01,
        **degrees,
    }
    return {
        "world": world,
        "restarts": int(kill is not None),
        "kill": kill,
        "directory": str(folder / name),
        "copy": str(folder / copy) if copy else "",
        "log": str(folder / f"{name}.log"),
        "arguments": ["tiny", *(str(x) for pair in options.items() for x in pair)],
    }


def play(folder: Path, runs: list[dict[str, Any]]) -> None:
    """Runs, one after another, in one process that has imported everything; all must end well."""
    told = folder / "told.json"
    told.write_text(json.dumps(runs))
    command = [sys.executable, str(Path(__file__).with_name("elastic.py")), str(told)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    ends = json.loads(done.stdout.splitlines()[-1]) if done.stdout else []
    logs = "\n".join(Path(run["log"]).read_text()[-3000:] for run in runs)
    assert ends == [True] * len(runs), f"{ends} {done.stderr[-2000:]} {logs}"


def story(directory: Path) -> list[tuple]:
    """All numbers that the mathematics of a run decides, a tuple for each row of metrics.jsonl."""
    names = ("step", "tokens", "loss", "grad_norm", "lr", "loads", "aux", "z", "valid_loss", "skipped")
    return [tuple(row.get(name) for name in names) for row in read_metrics(directory)]


def weights(directory: Path) -> bytes:
    return (directory / "model" / "model.safetensors").read_bytes()


def alike(one: list[tuple], two: list[tuple]) -> bool:
    """The same rows up to the rounding of sums in another order; no assignment to an expert may differ."""
    numbers = [[v for row in rows for v in row if isinstance(v, float)] for rows in (one, two)]
    rest = [[[v for v in row if not isinstance(v, float)] for row in rows] for rows in (one, two)]
    close = all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(*numbers, strict=True))
    return close and rest[0] == rest[1]


def check_kills(folder: Path, layout: str, phases: tuple[str, ...], other: str) -> None:
    """Each phase: killed and started again, it ends bit for bit as the whole run; a copy of what the kill left goes
    on under the layout `other`, and ends alike."""
    rank = LAYOUTS[layout][0] - 1
    killed = [plan(folder, phase, layout, [phase, KILLED, rank], copy=f"{phase} left") for phase in phases]
    moved = [plan(folder, f"{phase} left", other) for phase in phases]
    play(folder, [plan(folder, "whole", layout), *killed, *moved])
    whole = story(folder / "whole")
    assert [row[0] for row in whole] == list(range(1, STEPS + 1))
    for phase in phases:
        log = (folder / f"{phase}.log").read_text()
        assert f"step_{SAVED:08d}, step {SAVED}" in log, f"{phase}: {log}"
        assert story(folder / phase) == whole, phase
        assert weights(folder / phase) == weights(folder / "whole"), phase
        assert f"step_{SAVED:08d}, step {SAVED}" in (folder / f"{phase} left.log").read_text(), phase
        assert alike(story(folder / f"{phase} left"), whole), phase


OTHER = {"dp2": "one", "ep2": "dp2", "tp2": "ep2", "dp2 x ep2": "ep2"}
SOME = {"ep2": ("exchange", "save"), "tp2": ("backward",)}


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("layout", SOME)
def test_a_rank_killed_in_some_phase(layout: str, folder: Path) -> None:
    check_kills(folder, layout, SOME[layout], OTHER[layout])


@pytest.mark.dist
@pytest.mark.long
@pytest.mark.parametrize("layout", OTHER)
def test_a_rank_killed_in_any_phase(layout: str, folder: Path) -> None:
    check_kills(folder, layout, PHASES, OTHER[layout])
