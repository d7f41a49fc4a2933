"""A run directory across the lives of its run: who writes it now, and whether torchrun or a queue began it before."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

LOCK, BEGUN = "lock", "begun.json"


@contextlib.contextmanager
def only_writer(run_dir: Path) -> Iterator[None]:
    """Holds the run directory for this process. The system frees it when the process ends, however that is.

    Raises:
        ValueError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # not a Unix
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ValueError(
                f"{run_dir} is being written by {holder}: wait for it, or give another --run-dir"
            ) from None
        except OSError:  # a file system without locks
            yield
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def mark_begun(directory: Path) -> None:
    """Tells later lives of this torchrun job that what lies in `directory` is the job's own."""
    if _job():
        (directory / BEGUN).write_text(json.dumps({"job": _job(), "agent": _agent()}))


def goes_on(directory: Path) -> bool:
    """Whether this is a later life of a job that has begun in `directory`: what the setting `checkpoint.resume` asked
    for has been done then.

    Two launches may have the same --rdzv-id. Restarted ranks are told so, save when a node has joined them: then they
    have the same agent.
    """
    try:
        begun = json.loads((directory / BEGUN).read_text())
    except (OSError, ValueError):
        return False
    return bool(_job()) and begun["job"] == _job() and (restarts() > 0 or begun["agent"] == _agent())


def restarts() -> int:
    """How often torchrun or Slurm has started this run again."""
    return sum(int(os.environ.get(name, "0")) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def _job() -> str:
    return os.environ.get("TORCHELASTIC_RUN_ID", "")


def _agent() -> str:
    return f"{socket.gethostname()} {os.getppid()}"
