"""The balancer's own face: who is refused before any replica sees a request, what it makes of their streams and
metrics."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from serving import HERE, KEY, events
from starlette.testclient import TestClient

from coterie.infer.config import EngineConfig
from coterie.serve.balancer import _stream, build, merged
from coterie.serve.replicas import Replicas, own_device
from coterie.serve.settings import KEYS_VARIABLE, ServerSettings

BODY = {"model": "fake", "prompt": "a"}


def _client(folder: Path, **settings: Any) -> TestClient:
    """Of a balancer whose replicas were never started."""
    told = ServerSettings(**settings)
    replicas = Replicas(folder / "fake", told, EngineConfig(), 2, folder)
    return TestClient(build(replicas, told), base_url="http://127.0.0.1:8000")


def _raw(client: TestClient, body: bytes) -> int:
    return client.post("/v1/completions", content=body, headers={"content-type": "application/json"}).status_code


def test_limits_hold_before_any_replica(tmp_path: Path) -> None:
    with _client(tmp_path, max_body_bytes=1000, max_header_bytes=2000) as client:
        assert _raw(client, b'{"a": "' + b"x" * 2000) == 413
        assert _raw(client, b"{" * 100) == 400
        assert _raw(client, b'{"a": NaN}') == 400
        assert _raw(client, b"[]") == 400
        assert _raw(client, b"") == 400
        assert client.post("/v1/completions", content=b"{}").status_code == 415
        assert client.get("/health", headers={"x": "y" * 3000}).status_code == 431
        assert client.get("/", headers={"host": "evil.example"}).status_code == 421


def test_without_a_replica_it_says_so(tmp_path: Path) -> None:
    with _client(tmp_path) as client:
        answer = client.post("/v1/completions", json=BODY)
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert "no replica" in answer.json()["error"]["message"]
        assert client.get("/v1/models").status_code == 503
        assert client.get("/health").status_code == client.get("/health/ready").status_code == 503
        assert client.get("/health/live").status_code == 200
        client.app.state.life.draining = True
        assert "stopping" in client.post("/v1/completions", json=BODY).json()["error"]["message"]
        assert 'coterie:balancer_rejected_total{code="503"} 5.0' in client.get("/metrics").text


def test_keys_are_checked_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEYS_VARIABLE, KEY)
    with _client(tmp_path) as client:
        for path in ("/", "/metrics", "/v1/models", "/page/main.js", "/openapi.json", "/nowhere"):
            assert client.get(path).status_code == 401
            assert client.post(path, json=BODY).status_code == 401
        headers = {"authorization": f"Bearer {KEY}", "coterie-identity": "somebody else"}
        assert client.post("/v1/completions", json=BODY, headers=headers).status_code == 503
        assert client.get("/health").status_code == 503


def test_an_open_address_needs_keys(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no API key is set"):
        _client(tmp_path, host="0.0.0.0")


def test_no_replicas_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="replicas is 0"):
        Replicas(tmp_path, ServerSettings(), EngineConfig(), 0, tmp_path)
    command = [sys.executable, "-m", "coterie.cli", "serve", str(tmp_path), "--replicas", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (2, "coterie: replicas is 0: give 1 or more\n")


class _Torn:
    """An answer that comes in these pieces, and ends well or not."""

    status, content_type, raw_headers = 200, "text/event-stream", ((b"Content-Type", b"text/event-stream"),)

    def __init__(self, pieces: list[bytes], breaks: bool) -> None:
        self.content, self._pieces, self._breaks = self, pieces, breaks

    async def iter_any(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece
        if self._breaks:
            raise aiohttp.ClientPayloadError


@pytest.mark.parametrize("breaks", [False, True])
def test_events_are_whole_however_they_are_cut(breaks: bool) -> None:
    whole = b'data: {"a": 1}\n\ndata: {"b": 2}\n\n' + (b'data: {"c"' if breaks else b"data: [DONE]\n\n")
    for size in range(1, len(whole)):
        sent: list[Any] = []

        async def send(message: Any, sent: list[Any] = sent) -> None:
            sent.append(message)

        pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
        asyncio.run(_stream(_Torn(pieces, breaks), send))  # pyright: ignore[reportArgumentType]
        told = events(b"".join(message.get("body", b"") for message in sent).decode())
        assert told[:2] == [{"a": 1}, {"b": 2}]
        assert [one["error"]["code"] for one in told[2:]] == (["replica_lost"] if breaks else [])
        assert sent[-1]["more_body"] is False


def test_metrics_of_all_are_one_page() -> None:
    page = '# HELP a_total Of a.\n# TYPE a_total counter\na_total{x="{ 1"} 2.0\n# HELP b Of b.\n# TYPE b gauge\nb 3\n'
    families = {one.name: one for one in text_string_to_metric_families(merged({0: page, 2: page}))}
    assert set(families) == {"a", "b"}
    told = [(sample.labels, sample.value) for sample in families["a"].samples]
    assert told == [({"replica": "0", "x": "{ 1"}, 2.0), ({"replica": "2", "x": "{ 1"}, 2.0)]
    assert [sample.labels["replica"] for sample in families["b"].samples] == ["0", "2"]
    assert merged({}) == ""


@pytest.mark.parametrize(
    ("told", "count", "seen"),
    [(None, 2, ["0", "1", "0"]), ("4,7", 2, ["4", "7", "4"]), ("5", 1, ["5"] * 3), (None, 0, [None] * 3)],
)
def test_each_replica_sees_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch, told: str | None, count: int, seen: list[str | None]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    for number, expected in enumerate(seen):
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
            if told is not None:
                patch.setenv("CUDA_VISIBLE_DEVICES", told)
            own_device(number)
            assert os.environ.get("CUDA_VISIBLE_DEVICES") == expected


def test_a_model_that_is_not_there_is_told_of(tmp_path: Path) -> None:
    path = os.pathsep.join([str(HERE), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    command = [
        sys.executable,
        "-m",
        "coterie.cli",
        "serve",
        str(tmp_path / "nothing"),
        "--replicas",
        "2",
        "--port",
        "0",
    ]
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60, env={**os.environ, "PYTHONPATH": path}
    )
    assert ended.returncode == 1
    assert f"coterie: there is no {tmp_path / 'nothing'}" in ended.stderr
    assert not ended.stdout
