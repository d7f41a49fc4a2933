"""All ranks of a run on this machine, from one command: torchrun inside this process, without its own tracebacks."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import uuid
from collections.abc import Iterator, Sequence

from . import pretrain

# torchrun kills ranks half a minute after it has handed a signal on; the step and the save may need longer.
_SAVE_SECONDS = 600
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def launch(ranks: int, arguments: Sequence[str], restarts: int = 0) -> int:
    """Pretrains with so many processes: `RECIPE [--leaf value ...]`. Returns the exit status; what went wrong in a
    rank has been told by that rank.

    Args:
        restarts: how often all ranks are started again, from the newest checkpoint, when one has failed; a rank
            that told why the run cannot be ends it.

    Raises:
        ValueError: what can be refused without a rank, in one sentence.
    """
    if ranks < 1:
        raise ValueError(f"--ranks {ranks} is not a number of processes: give 1 or more")
    if restarts < 0:
        raise ValueError(f"--restarts {restarts} is not a number of restarts: give 0 or more")
    if ranks == 1 and not restarts:
        return pretrain.main(arguments)
    config = pretrain.parse(arguments)
    if config is None:
        return 0
    pretrain.refuse(config, ranks)
    return _torchrun(ranks, restarts, arguments)


def _torchrun(ranks: int, restarts: int, arguments: Sequence[str]) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # else torchrun sets it, with a warning; ranks set their threads
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SAVE_SECONDS))
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from ..parallel.launch import OWN_STORE

    os.environ[OWN_STORE] = "1"
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # As --standalone has it, but with one name for all lives: by it they know each other (lives.py).
    words = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", str(uuid.uuid4())]
    words += ["--nproc-per-node", str(ranks), "-m", "coterie.train.pretrain", *arguments]
    with _handlers_kept():
        while True:
            try:
                run.run(run.parse_args(words))
            except SignalException as stopped:  # the ranks have got it too, and have saved
                return 128 + stopped.sigval
            except ChildFailedError as error:
                # Not torchrun's --max-restarts: it starts ranks again whatever their exit status was.
                if restarts and error.get_first_failure()[1].exitcode != pretrain.REFUSED:
                    restarts -= 1
                    continue
                return _status(error)
            return 0


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    """torchrun leaves its signal handlers behind: puts back what was there."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _status(error: object) -> int:
    """The exit status of the rank that failed first. One that was killed could say nothing: it is told here."""
    rank, failure = error.get_first_failure()  # type: ignore[attr-defined]
    if failure.exitcode > 0:
        return failure.exitcode
    number = -failure.exitcode
    name = signal.Signals(number).name
    hint = ", most likely for want of memory" if number == signal.SIGKILL else ""
    print(
        f"coterie: rank {rank} was killed by {name}{hint}: the same command goes on from the last checkpoint",
        file=sys.stderr,
    )
    return 128 + number
