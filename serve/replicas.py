"""Several processes of one model on this machine: started, watched, killed when they hang, and started again.

Each listens at a socket in a folder that only this user can open, and ends when its standard input does: it lives no
longer than the process that started it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import sys
import threading
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from ..infer.config import EngineConfig
from .routing import Router
from .run import open_engine, serve
from .settings import KEYS_VARIABLE, ServerSettings

COMMAND = (sys.executable, "-m", "coterie.serve.replicas")
_START_LOOK_S, _LOOK_S = 0.1, 1.0  # between looks at a process that starts, and at one that serves
_PATIENCE_S, _MISSES = 5.0, 3  # for an answer to a look; without so many answers in a row it hangs
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.25, 30.0  # before a process is started again; doubled as long as it ends soon
_SOON_S = 60.0
_LAST_WORDS = 1.5  # seconds to end on SIGTERM
_KEEP_ALIVE_S = (
    60.0  # of a replica's connections: longer than the client keeps one, so that none closes under a request
)
_log = logging.getLogger("coterie")


class Replica:
    """One process.

    Attributes:
        number: of it, from 0.
        client: of its socket.
        ready: it takes requests.
        served: it has ever taken some.
        starts: how often it was started.
    """

    def __init__(self, number: int, folder: Path, command: Sequence[str], order: dict[str, Any]) -> None:
        self.number, self.ready, self.served, self.starts = number, False, False, 0
        self._socket = folder / str(number)
        self._command, self._order = command, {**order, "number": number, "socket": str(self._socket)}
        self._process: Process | None = None
        self.client = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(str(self._socket), limit=0, keepalive_timeout=_KEEP_ALIVE_S / 4),
            timeout=aiohttp.ClientTimeout(total=None),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("user-agent", "accept", "accept-encoding"),
            auto_decompress=False,
        )

    async def run(self) -> None:
        """Starts it and waits until it has ended."""
        environment = {name: value for name, value in os.environ.items() if name != KEYS_VARIABLE}
        threads = max(1, (os.cpu_count() or 1) // self._order["replicas"])
        environment.setdefault("OMP_NUM_THREADS", str(threads))
        self.starts += 1
        # In a session of its own: an interrupt at the terminal is for the balancer, which drains first.
        self._process = process = await asyncio.create_subprocess_exec(
            *self._command, stdin=PIPE, start_new_session=True, env=environment
        )
        assert process.stdin is not None
        with contextlib.suppress(ConnectionError):
            process.stdin.write(json.dumps(self._order).encode() + b"\n")
            await process.stdin.drain()
        watch = asyncio.create_task(self._watch(process))
        try:
            await process.wait()
        finally:
            watch.cancel()
            self.ready = False

    async def _watch(self, process: Process) -> None:
        misses, begun = 0, False
        while misses < _MISSES:
            self.ready = await self._healthy()
            begun = begun or self.ready
            self.served = self.served or self.ready
            misses = 0 if self.ready or not begun else misses + 1
            await asyncio.sleep(_LOOK_S if begun else _START_LOOK_S)
        _log.error("replica %d does not answer: it is killed", self.number)
        process.kill()

    async def _healthy(self) -> bool:
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
            async with asyncio.timeout(_PATIENCE_S), self.client.get("http://localhost/health/ready") as answer:
                return answer.status == 200
        return False

    async def stop(self) -> None:
        """Ends it: what it computes is aborted and told."""
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), _LAST_WORDS)
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        await self.client.close()


class Replicas:
    """All of them, with what `serve.run` asks of an engine: start, stop, alive, failure, name.

    Attributes:
        router: says where requests go.
        failure: why there will be none; None: there are some, or they are being started.
    """

    def __init__(
        self,
        model: Path,
        settings: ServerSettings,
        config: EngineConfig,
        count: int,
        folder: Path,
        command: Sequence[str] = COMMAND,
    ) -> None:
        """
        Args:
            model: its directory.
            settings: of the server; the model has a name there.
            config: of each engine.
            count: how many.
            folder: for sockets; nobody else can open it.
            command: starts one.

        Raises:
            ValueError: count is under 1.
        """
        if count < 1:
            raise ValueError(f"replicas is {count}: give 1 or more")
        self.name, self.router = settings.model_name, Router(count)
        self.failure: Exception | None = None
        inside = dataclasses.replace(
            settings,
            keys_file=None,
            record="",
            allowed_hosts=(),
            drain_s=0,  # the balancer has waited already
            keep_alive_s=_KEEP_ALIVE_S,
            max_connections=settings.max_connections + 16,
        )
        told = {"server": dataclasses.asdict(inside), "engine": dataclasses.asdict(config)}
        self._order = {"model": str(model), "replicas": count, **told}
        self._command, self._count, self._folder = command, count, folder
        self.members: list[Replica] = []
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def ready(self) -> dict[int, Replica]:
        """Those that take requests, by number."""
        return {one.number: one for one in self.members if one.ready}

    @property
    def alive(self) -> bool:
        """Whether one of them takes requests."""
        return self.failure is None and bool(self.ready)

    def start(self) -> None:
        """On the event loop."""
        self._loop = asyncio.get_running_loop()
        self.members = [Replica(n, self._folder, self._command, self._order) for n in range(self._count)]
        self._tasks = [self._loop.create_task(self._keep(one)) for one in self.members]

    async def _keep(self, one: Replica) -> None:
        """Starts one again and again. One that ends while none has ever served says that none will."""
        wait = _FIRST_WAIT_S
        while True:
            started = time.monotonic()
            try:
                await one.run()
            except OSError as error:
                _log.error("replica %d cannot be started: %s", one.number, error.strerror)
            self.router.forget(one.number)
            if not any(one.served for one in self.members):
                self.failure = self.failure or RuntimeError("a replica has ended before it served")
                return
            wait = _FIRST_WAIT_S if time.monotonic() - started > _SOON_S else min(2 * wait, _LONGEST_WAIT_S)
            _log.error("replica %d has ended: it is started again in %.2f s", one.number, wait)
            await asyncio.sleep(wait)

    def stop(self) -> None:
        """From another thread: ends all of them."""
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()

    async def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(one.stop() for one in self.members))


def replica(opened: Callable[[Path, EngineConfig], tuple[Any, Path | None]] = open_engine) -> int:
    """The process itself: reads one line of orders and serves until it is told to end, or its input ends.

    Args:
        opened: from a model and its settings to an engine and the model's directory.
    """
    order = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_input, daemon=True).start()
    own_device(order["number"])
    engine, folder = opened(Path(order["model"]), EngineConfig(**order["engine"]))
    settings = ServerSettings(**order["server"])
    return serve(engine, settings, folder, inside=Path(order["socket"]), ready=lambda line: None)


def _end_with_input() -> None:
    while sys.stdin.buffer.read(1 << 10):
        pass
    os._exit(1)


def own_device(number: int) -> None:
    """Of several GPUs each replica sees one, in turn. Before anything uses them."""
    import torch

    count = torch.cuda.device_count()
    if count > 1:
        told = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = told.split(",") if told else [str(one) for one in range(count)]
        os.environ["CUDA_VISIBLE_DEVICES"] = names[number % count]


if __name__ == "__main__":
    try:
        status = replica()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"coterie: {error}", file=sys.stderr)
        status = 2
    sys.exit(status)
