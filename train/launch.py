"""All ranks of a run on this machine, from one command."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Sequence

from ..parallel.torchrun import torchrun
from . import pretrain

# torchrun kills ranks half a minute after it has handed a signal on; the step and the save may need longer.
_SAVE_SECONDS = 600


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
    job = str(uuid.uuid4())
    while True:
        ended = torchrun(ranks, "coterie.train.pretrain", arguments, grace_s=_SAVE_SECONDS, job=job)
        # Not torchrun's --max-restarts: it starts ranks again whatever their exit status was.
        if restarts and ended.rank is not None and ended.status != pretrain.REFUSED:
            restarts -= 1
            continue
        if ended.killed:
            hint = ", most likely for want of memory" if ended.killed == "SIGKILL" else ""
            print(
                f"coterie: rank {ended.rank} was killed by {ended.killed}{hint}: the same command goes on from the "
                "last checkpoint",
                file=sys.stderr,
            )
        return ended.status
