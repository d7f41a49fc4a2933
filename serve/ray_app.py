"""The same service as replicas of Ray Serve, on Ray's cluster or on one that is started here.

Ray routes, restarts and drains them; keys, names, bodies and all limits of a request are checked in each replica.
Connections are Ray's own matter. Ray hands the deployment to its workers as a pickle of its own making.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray  # pyright: ignore[reportMissingImports]
from fastapi import FastAPI
from ray import serve  # pyright: ignore[reportMissingImports]
from ray.serve import Application  # pyright: ignore[reportMissingImports]

from ..infer.config import EngineConfig
from ..models.hub import is_remote
from .app import build
from .run import name_of, open_engine
from .security import KeyRing
from .settings import ServerSettings, load_keys

APP = "coterie"


class Replica:
    """What Ray makes of an application; `app` is Ray's."""

    app: FastAPI

    def check_health(self) -> None:
        """Ray calls it, and starts another replica where it raises."""
        if self.app.state.service.engine.failure is not None:
            raise RuntimeError("the engine has failed")


def application(
    model: Path, settings: ServerSettings, config: EngineConfig, replicas: int, resources: dict[str, Any]
) -> Application:
    """A deployment of a model for `ray.serve.run`.

    Args:
        model: a directory that each node has, or hf://org/name.
        settings: of the server; the keys that it names are read here, and their digests go to the replicas.
        config: of each engine.
        replicas: how many.
        resources: of each, as `ray_actor_options`.

    Raises:
        ValueError: others could reach the server without a key.
    """
    settings = dataclasses.replace(settings, model_name=settings.model_name or name_of(model))
    model = model if is_remote(model) else model.resolve()
    keys = KeyRing(load_keys(settings))

    def opened() -> FastAPI:
        engine, folder = open_engine(model, config)
        engine.start()
        return build(engine, settings, folder, keys=keys)

    deployment = serve.deployment(
        serve.ingress(opened)(Replica),
        name=APP,
        num_replicas=replicas,
        max_ongoing_requests=settings.max_requests,
        ray_actor_options=resources,
        graceful_shutdown_timeout_s=settings.drain_s,
        health_check_period_s=2,
        health_check_timeout_s=15,
    )
    return deployment.bind()  # pyright: ignore[reportFunctionMemberAccess]


def serve_ray(
    model: Path,
    settings: ServerSettings,
    config: EngineConfig,
    replicas: int,
    *,
    ready: Callable[[str], None] = print,
) -> int:
    """Serves replicas of a model on Ray until a signal.

    Returns: the exit status: 0, or 1 where no replica starts.

    Raises:
        ValueError: the settings are refused, or the port is 0: Ray does not tell which one it took.
    """
    if not settings.port:
        raise ValueError("port is 0: Ray does not tell which one it takes, so give a number")
    keys = load_keys(settings)
    _connect()
    if serve.status().proxies and not keys and not settings.open_without_keys:
        ray.shutdown()
        raise ValueError("Ray Serve listens already, where it was told to: give --keys-file or --open-without-keys")
    try:
        serve.start(http_options={"host": settings.host, "port": settings.port})
        serve.run(application(model, settings, config, replicas, _resources(config, replicas)), name=APP)
    except RuntimeError as error:
        print(f"coterie: Ray starts no replica: {str(error).splitlines()[-1]}", file=sys.stderr)
        ray.shutdown()
        return 1
    name = settings.model_name or name_of(model)
    ready(f"coterie serves {name} at http://{settings.host}:{settings.port} (OpenAI's API under /v1), by Ray Serve")
    sys.stdout.flush()
    _wait()
    serve.delete(APP)
    ray.shutdown()
    return 0


def _connect() -> None:
    """To the cluster that this machine belongs to, or RAY_ADDRESS; else to one of its own."""
    try:
        ray.init(address="auto", log_to_driver=False)
    except ConnectionError:
        ray.init(address="local", include_dashboard=False, log_to_driver=False)


def _resources(config: EngineConfig, replicas: int) -> dict[str, Any]:
    """A GPU each where there are enough, and an even share of a node's cores."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    each = -(-replicas // len(nodes))
    gpus = config.device != "cpu" and min(node.get("GPU", 0) for node in nodes) >= each
    cores = int(min(node.get("CPU", 1) for node in nodes)) // each
    return {"num_cpus": max(1, cores), "num_gpus": int(gpus)}


def _wait() -> None:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    while not stop.wait(0.2):
        pass
