"""All ranks of a command on this machine: torchrun inside this process, without its own tracebacks."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import uuid
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .launch import OWN_STORE

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


class Ended(NamedTuple):
    """How the ranks ended."""

    status: int
    """Exit status for the whole: that of the rank which failed first; 128 + the number of a signal."""
    rank: int | None = None
    """The one that failed first."""
    killed: str = ""
    """The signal that killed it, by name: it could say nothing."""


def torchrun(ranks: int, module: str, arguments: Sequence[str], *, grace_s: int, job: str = "") -> Ended:
    """Runs a module with so many processes until all have ended.

    Args:
        grace_s: seconds that ranks have to end after a signal was handed on, before they are killed.
        job: a name by which lives of one job know each other; empty: this is a job of its own.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # else torchrun sets it, with a warning; ranks set their threads
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(grace_s))
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ[OWN_STORE] = "1"
    for name in ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # As --standalone has it, but for the name.
    words = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", job or str(uuid.uuid4())]
    words += ["--nproc-per-node", str(ranks), "-m", module, *arguments]
    with _handlers_kept():
        try:
            run.run(run.parse_args(words))
        except SignalException as stopped:  # the ranks have got it too
            return Ended(128 + stopped.sigval)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode > 0:
                return Ended(failure.exitcode, rank)
            return Ended(128 - failure.exitcode, rank, signal.Signals(-failure.exitcode).name)
    return Ended(0)


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    """torchrun leaves its signal handlers behind: puts back what was there."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
