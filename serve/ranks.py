"""A model on several ranks behind one address: torchrun starts the ranks, and the first one serves."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

import torch

from ..infer.config import EngineConfig
from ..infer.recording import check_path
from ..models.fit import check_fit
from ..models.hub import resolve
from ..models.weights import read_config
from ..parallel.launch import Ranks, init_ranks
from ..parallel.layout import fill
from ..parallel.torchrun import torchrun
from .run import name_of, serve
from .settings import ServerSettings

_GRACE_S = 10  # seconds to end after the drain
_PATIENCE_S = 2.0  # for the rank that has failed to tell why, before the others say that they have lost one
_log = logging.getLogger("coterie")


def launch_ranks(model: Path, settings: ServerSettings, config: EngineConfig, ranks: int) -> int:
    """Serves with so many processes on this machine; returns the exit status.

    Raises:
        FileNotFoundError, ValueError: what can be refused without a rank, in one sentence.
    """
    from ..infer.open_model import model_folder

    config.check_ranks(ranks)
    if settings.record:
        check_path(settings.record)
    folder = model_folder(resolve(model))
    check_fit(read_config(folder), fill(ranks, tp=config.tp, ep=config.ep, etp=config.etp))
    keys = None if settings.keys_file is None else str(settings.keys_file)
    server = dataclasses.asdict(dataclasses.replace(settings, keys_file=None)) | {"keys_file": keys}
    order = {"model": str(model), "server": server, "engine": dataclasses.asdict(config)}
    grace = round(settings.drain_s) + _GRACE_S
    ended = torchrun(ranks, "coterie.serve.ranks", [json.dumps(order)], grace_s=grace)
    if ended.killed:
        _log.critical("rank %s was killed by %s: the server ends", ended.rank, ended.killed)
    told_to_end = ended.rank is None and ended.status in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    return 0 if told_to_end else ended.status


def serve_ranks(model: Path, settings: ServerSettings, config: EngineConfig) -> int:
    """What each process does that torchrun has started; returns its exit status. Raises what `Engine.open` does."""
    from ..infer.open_model import model_folder

    ranks = init_ranks(config.device, timeout_s=config.rank_timeout_s)
    config.check_ranks(ranks.world)
    if ranks.device.type == "cpu":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // here))
    folder = model_folder(resolve(model))
    if not ranks.first:
        return _follow(folder, config, ranks)
    from ..infer.engine import Engine

    engine = Engine.open(folder, config, ranks)
    engine.name = name_of(model)
    status = serve(engine, settings, folder)
    sys.stdout.flush()
    if status:  # a process group that has lost a rank may wait for it
        os._exit(status)
    return status


def _follow(folder: Path, config: EngineConfig, ranks: Ranks) -> int:
    from ..infer.fleet import RankLost
    from ..infer.ranks import follow

    # All ranks get the signal; the first one drains, and then lets the others go.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    try:
        follow(folder, config, ranks)
    except RankLost as error:
        time.sleep(_PATIENCE_S)
        ranks.log.warning(str(error))
        os._exit(1)
    return 0


def main(order: str) -> int:
    """The entry of a rank: 2 where the first rank has told why it cannot be."""
    told = json.loads(order)
    keys = told["server"].pop("keys_file")
    settings = ServerSettings(**told["server"], keys_file=None if keys is None else Path(keys))
    try:
        return serve_ranks(Path(told["model"]), settings, EngineConfig(**told["engine"]))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(_PATIENCE_S)  # mostly all fail alike: the first one speaks, and torchrun ends this one
        print(f"coterie: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
