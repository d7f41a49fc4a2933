"""Runs under torchrun's elastic agent whose ranks kill themselves at a chosen moment: see `kill_at` and `runs`.

As a script it is a rank: `torchrun --max-restarts 1 tests/elastic.py PHASE STEP RANK RECIPE [--leaf value ...]`.
"""

import json
import os
import shutil
import signal
import sys
import uuid
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from coterie.models.gpt import Block
from coterie.parallel.launch import OWN_STORE
from coterie.train import checkpoint, loop, pretrain, session  # noqa: F401 (the session's imports take seconds)

PHASES = ("forward", "exchange", "backward", "optimizer", "save")


def die(*_: object, **__: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def kill_at(phase: str, step: int) -> None:
    """This process kills itself within `phase` of `step`."""
    now = [0]

    def wrap(owner: Any, name: str, before: Any, after: Any = None) -> None:
        real = getattr(owner, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            if now[0] >= step:
                before(*arguments, **options)
            result = real(*arguments, **options)
            if now[0] >= step and after is not None:
                after(result, *arguments)
            return result

        setattr(owner, name, wrapped)

    def in_first_block(action: Any) -> Any:
        return lambda result, block, *_: action(result) if block.layer == 0 and torch.is_grad_enabled() else None

    def send_and_die(out: Any, sent: Any, receive: Any, send: Any, **options: Any) -> None:
        if send is not None:  # rows; counts went before
            dist.distributed_c10d.all_to_all_single(out, sent, receive, send, **options | {"async_op": True})
            die()

    step_of_trainer = loop.Trainer.step

    def begin(trainer: Any, *arguments: Any) -> Any:
        now[0] = trainer.progress.step + 1
        return step_of_trainer(trainer, *arguments)

    loop.Trainer.step = begin  # type: ignore[method-assign]

    def idle(*_: object, **__: object) -> None: ...

    if phase == "forward":
        wrap(Block, "forward", idle, in_first_block(die))
    elif phase == "exchange":
        wrap(dist, "all_to_all_single", send_and_die)
        wrap(loop.Trainer, "_reduce", die)  # a layout without all-to-alls: the other ranks are in the sum of the norm
    elif phase == "backward":
        wrap(Block, "forward", idle, in_first_block(lambda result: result[0].register_hook(die)))
    elif phase == "optimizer":
        wrap(torch.optim.AdamW, "step", idle, die)
    elif phase == "save":
        named = f"{step:08d}"  # the shards are written; of another step's save, perhaps
        wrap(checkpoint.Checkpointer, "_hash_own", lambda _, folder: die() if folder.name.endswith(named) else None)
    else:
        raise ValueError(phase)


def rank_main(run: dict[str, Any]) -> None:
    """One rank of one life of a run; before the second life the run directory is copied to `copy`."""
    log = os.open(run["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    first, rank = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0", int(os.environ["RANK"])
    if run["kill"] and first and rank == run["kill"][2]:
        kill_at(*run["kill"][:2])
    if run["copy"] and not first and rank == 0:
        shutil.copytree(run["directory"], run["copy"])
    status = pretrain.main(run["arguments"])
    if status:
        os._exit(status)


def agent_main(run: dict[str, Any]) -> bool:
    """One run, with torchrun's agent in this process and ranks forked from it; whether it came to its end."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=run["world"],
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=run["restarts"],
        monitor_interval=0.1,
        start_method="fork",
    )
    try:
        elastic_launch(config, rank_main)(run)
    except Exception as error:
        print(error, file=sys.stderr)
        return False
    return True


def main() -> None:
    os.environ[OWN_STORE] = "1"
    if len(sys.argv) == 2:
        print(json.dumps([agent_main(run) for run in json.loads(Path(sys.argv[1]).read_text())]))
        return
    phase, step, rank, *arguments = sys.argv[1:]
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == rank:
        kill_at(phase, int(step))
    sys.exit(pretrain.main(arguments))


if __name__ == "__main__":
    main()
