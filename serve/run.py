"""One process that serves: uvicorn in our own loop, which knows how to stop and what to do when the engine fails."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from ..infer.config import EngineConfig
from ..infer.recording import check_path
from ..models.hub import is_remote, resolve
from .app import build
from .connection import connection_class
from .limits import Life
from .settings import ServerSettings

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_TICK = 0.05  # seconds between looks at the engine
_LAST_WORDS = 2.0  # seconds for streams to tell of an end that the engine gave them
_log = logging.getLogger("coterie")


class _Server(uvicorn.Server):
    """Signals are ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(
    engine: Any,
    settings: ServerSettings,
    folder: Path | None = None,
    *,
    ready: Callable[[str], None] = print,
    inside: Path | None = None,
) -> int:
    """Serves until a signal or the engine's failure; starts the engine and stops it.

    The first SIGTERM or SIGINT stops admission; what is under way may end within `drain_s`, then it is aborted. A
    second one ends the process at once.

    Args:
        engine: not started.
        settings: of the server.
        folder: the model's directory, for its chat template.
        ready: is given one line with the address when requests are taken.
        inside: a socket to listen at instead, whose folder is closed to others: a balancer stands before it and has
            checked keys and names.

    Returns: the exit status: 0, or 1 where the engine failed.

    Raises:
        ValueError: the settings are refused, or nothing can listen at the address.
    """
    app = build(engine, settings, folder, inside=inside is not None)
    return serve_app(engine, app, settings, listen_inside(inside) if inside else listen(settings), ready)


def serve_app(
    engine: Any, app: FastAPI, settings: ServerSettings, listener: socket.socket, ready: Callable[[str], None] = print
) -> int:
    """The same for an application that stands, at an open listener, which is closed at the end."""
    with contextlib.closing(listener):
        return asyncio.run(_run(engine, app, settings, listener, ready))


def listen_inside(path: Path) -> socket.socket:
    """At a socket in the file system, which may be there from before."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    return listener


def listen(settings: ServerSettings) -> socket.socket:
    """Bound before anything is said to be ready; whoever has the port already is told of."""
    try:
        family, *_, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        where = f"{settings.host} port {settings.port}"
        raise ValueError(f"cannot listen at {where}: {error.strerror or error}") from None
    return listener


def _config(app: FastAPI, settings: ServerSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=connection_class(settings),
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,  # paths and addresses are not kept; metrics count
        proxy_headers=False,
        server_header=False,
        h11_max_incomplete_event_size=settings.max_header_bytes,
        timeout_keep_alive=max(1, round(settings.keep_alive_s)),
        timeout_graceful_shutdown=max(1, round(_LAST_WORDS)),
        backlog=min(2048, settings.max_connections),
    )


async def _run(
    engine: Any, app: FastAPI, settings: ServerSettings, listener: socket.socket, ready: Callable[[str], None]
) -> int:
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    server = _Server(_config(app, settings))
    stop = asyncio.Event()
    _watch_signals(stop)
    engine.start()
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not serving.done() and not stop.is_set() and engine.failure is None:
        if server.started and engine.alive:
            break
        await asyncio.sleep(0.005)
    if server.started and engine.alive:
        ready(_line(engine, settings, listener))
        sys.stdout.flush()
    while not serving.done() and not stop.is_set() and engine.failure is None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), _TICK)
    failed = engine.failure is not None
    await _end(engine, app.state.life, 0.0 if failed else settings.drain_s)
    server.should_exit = True
    await serving
    if engine.failure is not None:
        _log.critical("the engine has failed (%s): the server ends", type(engine.failure).__name__)
    return int(engine.failure is not None)


def _watch_signals(stop: asyncio.Event) -> None:
    def told(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        return  # only the main thread is told of signals
    for number in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, told, number)


async def _end(engine: Any, life: Life, seconds: float) -> None:
    """Takes no more requests, waits for those under way, aborts the rest and lets them say so."""
    life.draining = True
    await _until(lambda: life.active == 0 or engine.failure is not None, seconds)
    # A thread that nobody waits for at the end: an engine that hangs must not keep the process.
    stopping = threading.Thread(target=engine.stop, daemon=True)
    stopping.start()
    await _until(lambda: life.active == 0 and not stopping.is_alive(), _LAST_WORDS)


async def _until(done: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        await asyncio.sleep(_TICK / 5)


def _line(engine: Any, settings: ServerSettings, listener: socket.socket) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    where = listener.getsockname()
    url = where if isinstance(where, str) else f"http://{host}:{where[1]}"
    return f"coterie serves {engine.name} at {url} (OpenAI's API under /v1)"


def serve_model(model: Path, settings: ServerSettings, config: EngineConfig) -> int:
    """Opens a model and serves it; see `serve`. Raises what `Engine.open` and `serve` do."""
    if settings.record:
        check_path(settings.record)  # before the model is loaded
    engine, folder = open_engine(model, config)
    return serve(engine, settings, folder)


def open_engine(model: Path, config: EngineConfig) -> tuple[Any, Path]:
    """The engine of a model, not started, and the model's directory. Raises what `Engine.open` does."""
    from ..infer.engine import Engine
    from ..infer.open_model import model_folder

    folder = model_folder(resolve(model))
    engine = Engine.open(folder, config)
    engine.name = name_of(model)
    return engine, folder


def name_of(model: Path) -> str:
    """What clients call a model unless they are told otherwise: of the hub's its name there, else its directory's,
    which of a run is the run's."""
    if is_remote(model):
        return str(model).partition(":")[2].strip("/").partition("@")[0]
    return Path(os.path.abspath(model)).name
