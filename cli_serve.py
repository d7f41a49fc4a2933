"""`coterie serve`: one model behind OpenAI's API."""

from __future__ import annotations

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
    replicas: int = 1,
    ray: bool = False,
) -> None:
    """Serve a model over HTTP: OpenAI's /v1/completions and /v1/chat/completions, metrics, and a page to try it.

    Args:
        model: A directory of a model, ours or Hugging Face's, of a run, or hf://org/name.
        server: Where to listen, for whom, and the limits.
        engine: How the model is run.
        replicas: Processes that each hold the model, behind one address; each has a GPU of its own where there are
            several.
        ray: Let Ray Serve run the replicas, on its cluster or on one that it starts here.
    """
    from .serve.settings import load_keys

    if replicas < 1:
        raise ValueError(f"replicas is {replicas}: give 1 or more")
    if server.record is not None and (ray or replicas > 1):
        raise ValueError(
            "record names one process's file: record without replicas, or start each at a port of its own"
        )
    load_keys(server)  # what is wrong with the keys is told before the model is loaded
    try:
        run = _several(replicas, ray) if ray or replicas > 1 else _one()
    except ModuleNotFoundError as error:
        message = f"serving needs the package {error.name}: pip install 'coterie[{'ray' if ray else 'serve'}]'"
        raise ModuleNotFoundError(message) from None
    raise SystemExit(run(model, server, engine))


def _one() -> Run:
    from .serve.run import serve_model

    return serve_model


def _several(replicas: int, ray: bool) -> Run:
    if ray:
        from .serve.ray_app import serve_ray

        return partial(serve_ray, replicas=replicas)
    from .serve.balancer import serve_replicas

    return partial(serve_replicas, count=replicas)
