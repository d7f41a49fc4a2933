"""A server of the fake engine for tests: in this process without sockets, or with them on a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fake_engine import FakeEngine, small_tokenizer
from starlette.testclient import TestClient

from coterie.serve.app import build
from coterie.serve.run import _config, _Server, listen
from coterie.serve.settings import ServerSettings

HERE = Path(__file__).resolve().parent
KEY = "a-key-of-the-tests-1"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if tools %}<tools>{{ tools | tojson }}\n{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def folder_of(path: Path, template: str | None = TEMPLATE, **config: Any) -> Path:
    """A model's directory as far as templates go."""
    path.mkdir(exist_ok=True)
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    if config:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@contextlib.contextmanager
def client_of(engine: FakeEngine, folder: Path | None = None, **settings: Any) -> Iterator[TestClient]:
    """Requests without a socket."""
    engine.start()
    app = build(engine, ServerSettings(**settings), folder)
    with TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=True) as client:
        yield client
    engine.stop()


def complete(client: TestClient, **body: Any) -> Any:
    """POST /v1/completions."""
    return client.post("/v1/completions", json={"model": "fake", "prompt": "the cat", **body})


def chat(client: TestClient, content: Any = "the cat", **body: Any) -> Any:
    """POST /v1/chat/completions."""
    messages = [{"role": "user", "content": content}]
    return client.post("/v1/chat/completions", json={"model": "fake", "messages": messages, **body})


def events(text: str) -> list[Any]:
    """What a stream said; its end is checked."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


class Running:
    """A server with a socket.

    Attributes:
        app, engine, port: of it.
    """

    def __init__(self, engine: FakeEngine, folder: Path | None = None, **settings: Any) -> None:
        told = ServerSettings(port=0, **settings)
        self.engine, self.app = engine, build(engine, told, folder)
        self._listener = listen(told)
        self.port: int = self._listener.getsockname()[1]
        self._server = _Server(_config(self.app, told))
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._listener]))

    def __enter__(self) -> Running:
        self.engine.start()
        self._thread.start()
        until(lambda: self._server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.gate.set()
        self.engine.stop()
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self, buffer: int = 0) -> socket.socket:
        """A socket to it; buffer: bytes that it takes without being read."""
        opened = socket.socket()
        if buffer:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        opened.settimeout(10)
        opened.connect(("127.0.0.1", self.port))
        return opened

    def ask(self, path: str = "/v1/completions", *, buffer: int = 0, **body: Any) -> socket.socket:
        """Sends a request and reads nothing."""
        raw = json.dumps({"model": "fake", "prompt": "the cat", **body}).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        opened = self.connect(buffer)
        opened.sendall(f"{head}content-length: {len(raw)}\r\n\r\n".encode() + raw)
        return opened


def until(what: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits for it; fails when it does not come."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def read_all(opened: socket.socket) -> bytes:
    """Until the other side closes."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := opened.recv(65536):
            data += piece
    return data


class Process:
    """A server in a process of its own."""

    def __init__(self, command: list[str], log: Path) -> None:
        path = os.pathsep.join([str(HERE), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
        self._log = log.open("w")
        self.inner = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._log, text=True, env={**os.environ, "PYTHONPATH": path}
        )
        assert self.inner.stdout is not None
        self.line = self.inner.stdout.readline()
        assert " at http://" in self.line, log.read_text()
        self.url = self.line.split(" at ")[1].split()[0]

    def end(self, seconds: float = 20) -> int:
        return self.inner.wait(seconds)


@contextlib.contextmanager
def process(tmp_path: Path, command: list[str]) -> Iterator[Process]:
    """It is killed at the end."""
    started = Process(command, tmp_path / "log")
    try:
        yield started
    finally:
        started.inner.kill()
        started.inner.wait()


@contextlib.contextmanager
def stream(url: str, tokens: int) -> Iterator[Iterator[str]]:
    """The events of an answer."""
    import httpx

    body = {"model": "fake", "prompt": "a", "max_tokens": tokens, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as answer:
        yield (line.removeprefix("data: ") for line in answer.iter_lines() if line)


def save_model(folder: Path) -> None:
    """A tiny random model with a tokenizer and a chat template."""
    from coterie.models.config import ModelConfig
    from coterie.models.gpt import GPT
    from coterie.models.weights import save_model as save
    from coterie.moe.config import MoEConfig

    moe = MoEConfig(top_k=2, hidden=16)
    config = ModelConfig(
        vocab_size=300, max_positions=256, layers=2, dim=16, heads=2, hidden=16, experts=(0, 4), moe=moe
    )
    model = GPT(config)
    model.init_weights(1)
    save(folder, model, small_tokenizer())
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def gauge(url: str, name: str) -> float:
    """The first of that name in /metrics."""
    import httpx

    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))
