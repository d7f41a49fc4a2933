"""The batch script for Slurm, with stand-ins for srun and scontrol: there is no Slurm here."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import write_text

from coterie.train.manifest import list_checkpoints
from coterie.train.metrics import read_metrics
from coterie.train.prepare import prepare

SCRIPT = Path(__file__).parent.parent / "examples" / "slurm" / "pretrain.sbatch"
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then echo localhost; else echo "$*" >> "$(dirname "$0")/said"; fi
"""


def test_the_script_is_bash() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(SCRIPT)], check=True)


def test_it_asks_for_a_recipe() -> None:
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "pretrain.sbatch RECIPE" in done.stderr


@pytest.mark.dist
@pytest.mark.slow
def test_it_saves_queues_anew_and_goes_on(tmp_path: Path) -> None:
    prepare([write_text(tmp_path / "text.txt")], tmp_path / "train", train_vocab=300, split="blank", quiet=True)
    run, bin_folder = tmp_path / "run", tmp_path / "bin"
    bin_folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1"}
    slurm |= {"RANKS_PER_NODE": "2", "PYTHON": sys.executable, "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    leaves = ["--run-dir", str(run), "--data.train", str(tmp_path / "train"), "--steps", "100000"]
    leaves += ["--parallel.device", "cpu", "--parallel.threads", "1", "--log.tensorboard", "False"]
    for life, number in enumerate((signal.SIGUSR1, signal.SIGTERM)):
        begun = len(read_metrics(run)) if life else 0
        environment = os.environ | slurm | {"SLURM_RESTART_COUNT": str(life)}
        with (tmp_path / f"log{life}").open("w") as log:
            words = ["bash", str(SCRIPT), "tiny", *leaves]
            process = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or len(read_metrics(run)) < begun + 2:
            assert process.poll() is None, Path(log.name).read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(120) == 0, Path(log.name).read_text()
        assert f"{signal.SIGTERM.name}: saved at step" in Path(log.name).read_text()
        assert ("resumed from" in Path(log.name).read_text()) == bool(life)
    assert (bin_folder / "said").read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n" * 2
    assert len(list_checkpoints(run / "checkpoints")) == 2
    assert [row["step"] for row in read_metrics(run)] == list(range(1, len(read_metrics(run)) + 1))
