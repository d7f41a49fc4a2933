"""Which life of a run writes its directory, and what it begins from."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import make_trainer, small_config

from coterie.train.config import CheckpointConfig
from coterie.train.lives import BEGUN, goes_on, mark_begun, only_writer
from coterie.train.manifest import CheckpointError, list_checkpoints, step_directory

HOLD = """
import sys, time
from pathlib import Path
from coterie.train.config import CheckpointConfig
from coterie.train.lives import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_runs_cannot_write_one_directory_and_death_frees_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [sys.executable, "-c", HOLD, str(run)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            with pytest.raises(ValueError, match=rf"run is being written by process {other.pid} on .*: wait for it"):
                only_writer(run).__enter__()
        finally:
            other.send_signal(signal.SIGKILL)
    with only_writer(run):
        pass
    with only_writer(run):
        pass


STOPPED = """
import os, signal
from coterie.train.faults import StopRequest
with StopRequest():
    os.kill(os.getpid(), signal.SIGTERM)
    raise {kind}("Connection closed by peer")
"""


@pytest.mark.parametrize(("kind", "status"), [("RuntimeError", 128 + signal.SIGTERM), ("ValueError", 1)])
def test_a_rank_that_is_to_end_does_not_linger_over_a_lost_one(kind: str, status: int) -> None:
    done = subprocess.run([sys.executable, "-c", STOPPED.format(kind=kind)], capture_output=True, timeout=60)
    assert done.returncode == status, done.stderr


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of a rank in the first life of a torchrun job."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    return monkeypatch


def test_a_later_life_of_a_job_goes_on(job: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not goes_on(tmp_path), "nothing has begun"
    mark_begun(tmp_path)
    assert goes_on(tmp_path), "the agent is the same: nodes have joined"
    job.setattr(os, "getppid", lambda: 1)
    assert not goes_on(tmp_path), "another launch with the same --rdzv-id"
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        job.setenv(name, "1")
        assert goes_on(tmp_path)
        job.setenv(name, "0")
    job.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    job.setenv("TORCHELASTIC_RUN_ID", "job 2")
    assert not goes_on(tmp_path), "what lies there is another job's"
    (tmp_path / BEGUN).write_text("{")
    assert not goes_on(tmp_path)


def _run(folder: Path, resume: str, steps: int) -> int:
    """Where a life that was to begin from `resume` did begin; it ends at `steps`."""
    checkpoint = CheckpointConfig(every=2, keep=9, resume=resume)
    trainer = make_trainer(small_config(folder, steps=steps, checkpoint=checkpoint))
    trainer.resume()
    begin = trainer.progress.step
    trainer.run()
    return begin


def test_a_restart_does_not_begin_anew(job: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert _run(tmp_path, "never", 2) == 0
    assert _run(tmp_path, "never", 4) == 2, "the same job"
    job.setenv("TORCHELASTIC_RUN_ID", "job 2")
    assert _run(tmp_path, "never", 2) == 0
    first = step_directory(tmp_path / "checkpoints", 2)
    assert _run(tmp_path, str(first), 6) == 2
    assert _run(tmp_path, str(first), 8) == 6


def test_resume_takes_a_run_directory(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    _run(one, "auto", 4)
    assert _run(two, str(one), 6) == 4
    newest = list_checkpoints(one / "checkpoints")[0]
    (newest / "manifest.json").write_text("{}")
    assert _run(tmp_path / "three", str(one), 6) == 2, "the newest whole one"
    assert _run(tmp_path / "four", str(one / "checkpoints"), 6) == 2
    with pytest.raises(CheckpointError, match=r"step_00000004 is damaged.*newest whole one is .*step_00000002"):
        _run(tmp_path / "five", str(newest), 6)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty is damaged: it has no manifest.json; there is no whole one"):
        _run(tmp_path / "five", str(tmp_path / "empty"), 6)


def test_another_order_of_samples_is_refused(tmp_path: Path) -> None:
    def begin(resume: str, order: str) -> int:
        config = small_config(tmp_path, steps=4, checkpoint=CheckpointConfig(every=2, keep=9, resume=resume))
        trainer = make_trainer(config, order=lambda samples: f"{order} {samples}")
        trainer.resume()
        trainer.step(iter(trainer.steps(0)))
        trainer.save()
        trainer.checkpoints.wait()
        return trainer.progress.step

    assert begin("auto", "a") == 1
    with pytest.raises(CheckpointError, match=r"seen other samples .* give --checkpoint.resume (\S+) to go on"):
        begin("auto", "b")
    newest = list_checkpoints(tmp_path / "checkpoints")[0]
    assert begin(str(newest), "b") == 2
