"""`coterie serve`: one model behind OpenAI's API."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from .infer.config import EngineConfig
from .serve.settings import ServerSettings

Flat = tyro.conf.arg(name="")
Run = Callable[[Path, ServerSettings, EngineConfig], int]
_SERVER, _ENGINE = ServerSettings(), EngineConfig()


def serve(
    model: tyro.conf.Positional[Path],
    server: Annotated[ServerSettings, Flat] = _SERVER,
    engine: Annotated[EngineConfig, Flat] = _ENGINE,
    ranks: int = 0,
    replicas: int = 1,
    ray: bool = False,
) -> None:
    """Serve a model over HTTP: OpenAI's /v1/completions and /v1/chat/completions, metrics, and a page to try it.

    Args:
        model: A directory of a model, ours or Hugging Face's, of a run, or hf://org/name.
        server: Where to listen, for whom, and the limits.
        engine: How the model is run.
        ranks: Processes that hold the model together, divided as the engine's tp, ep and etp say; 0: as many as these
            need, or as torchrun has started.
        replicas: Processes that each hold the model, behind one address; each has a GPU of its own where there are
            several.
        ray: Let Ray Serve run the replicas, on its cluster or on one that it starts here.
    """
    from .serve.settings import load_keys

    if replicas < 1 or ranks < 0:
        raise ValueError(f"replicas is {replicas} and ranks is {ranks}: give 1 or more")
    if (replicas > 1 or ray) and (ranks > 1 or engine.least_ranks > 1):
        raise ValueError("each replica is one process: give replicas, or ranks with tp, ep and etp, not both")
    if server.record and (ray or replicas > 1):
        raise ValueError(
            "record names one process's file: record without replicas, or start each at a port of its own"
        )
    load_keys(server)  # what is wrong with the keys is told before the model is loaded
    try:
        run = _several(replicas, ray) if ray or replicas > 1 else _one(ranks or engine.least_ranks)
    except ModuleNotFoundError as error:
        message = f"serving needs the package {error.name}: pip install 'coterie[{'ray' if ray else 'serve'}]'"
        raise ModuleNotFoundError(message) from None
    raise SystemExit(run(model, server, engine))


def _one(ranks: int) -> Run:
    if "WORLD_SIZE" in os.environ:
        from .serve.ranks import serve_ranks

        return serve_ranks
    if ranks > 1:
        from .serve.ranks import launch_ranks

        return partial(launch_ranks, ranks=ranks)
    from .serve.run import serve_model

    return serve_model


def _several(replicas: int, ray: bool) -> Run:
    if ray:
        from .serve.ray_app import serve_ray

        return partial(serve_ray, replicas=replicas)
    from .serve.balancer import serve_replicas

    return partial(serve_replicas, count=replicas)
