"""The soak's server: `coterie serve` in a process, with a short queue and so few blocks that sequences lose some."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from .soak_client import ask

ROOT = Path(__file__).resolve().parent.parent


class Server:
    """Starts, watches and kills it.

    Attributes:
        port: where it listens.
    """

    BLOCKS = 24
    _BLOCK_BYTES = 16 * 2 * 2 * 2 * 16 * 4  # tokens, layers, keys and values, heads, width, fp32

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder, self.log, self.port = folder, log, 0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self.alive:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()

    async def start(self) -> float:
        """Seconds until it is ready. RuntimeError, with the end of its log: it is not."""
        self.port = _free_port()
        settings = {
            "port": self.port,
            "device": "cpu",
            "max-sequences": 8,
            "max-queued-requests": 32,
            "kv-memory": self.BLOCKS * self._BLOCK_BYTES,
            "budget": 64,
            "drain-s": 2,
        }
        flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        started = time.monotonic()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "coterie.cli", "serve", str(self.folder), *flags],
                stdout=log,
                stderr=log,
                env=os.environ
                | {"PYTHONPATH": os.pathsep.join([str(ROOT.parent), os.environ.get("PYTHONPATH", "")])},
            )
        while time.monotonic() - started < 60 and self.alive:
            if (await ask(self.port, "GET", "/health/ready", timeout_s=1)).status == 200:
                return time.monotonic() - started
            await asyncio.sleep(0.05)
        raise RuntimeError(f"the server does not start:\n{self.log.read_text(errors='replace')[-2000:]}")

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def memory(self) -> int:
        """Bytes of it that lie in memory; 0 where /proc does not say."""
        with contextlib.suppress(OSError, IndexError):
            assert self._process is not None
            pages = Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]
            return int(pages) * os.sysconf("SC_PAGE_SIZE")
        return 0

    def kill(self) -> None:
        """Without a warning."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
