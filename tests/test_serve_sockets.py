"""Clients that go away, wait, or send too much: over real sockets."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from fake_engine import FakeEngine
from serving import Running, read_all, until


def _gone(server: Running) -> None:
    """Nothing is left of any request."""
    until(lambda: server.engine.idle and server.app.state.life.active == 0)
    assert server.engine.used_blocks == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("phase", ["queued", "prefill", "decode"])
def test_a_client_that_goes_is_aborted_in_every_phase(phase: str, stream: bool) -> None:
    engine = FakeEngine(step_s=0.02, max_model_len=4000)
    engine.chunk = 1
    engine.config.max_sequences = 0 if phase == "queued" else 8
    prompt = [1] * (2000 if phase == "prefill" else 1)
    with Running(engine) as server:
        opened = server.ask(prompt=prompt, max_tokens=1500, stream=stream)
        until(lambda: engine.phases[phase] == 1)
        opened.close()
        _gone(server)
        assert len(engine.aborted) == 1
        assert engine.steps < 500  # else it ran to its end


def test_a_client_that_goes_at_the_last_step() -> None:
    engine = FakeEngine()
    with Running(engine) as server:
        for _ in range(20):
            engine.gate.clear()
            opened = server.ask(max_tokens=1, stream=True)
            until(lambda: not engine.idle)
            engine.gate.set()
            opened.close()
            _gone(server)


def test_one_of_several_goes_and_the_others_are_served() -> None:
    engine = FakeEngine(step_s=0.005)
    with Running(engine) as server:
        first, second = (server.ask(max_tokens=60, stream=True) for _ in range(2))
        until(lambda: engine.phases["decode"] == 2)
        first.close()
        second.sendall(b"")
        data = b""
        while b"[DONE]" not in data:
            data += second.recv(65536)
        assert data.count(b"data: ") == 61
        second.close()
        _gone(server)


def test_a_client_that_does_not_read_is_dropped() -> None:
    engine = FakeEngine(max_model_len=200_000)
    with Running(engine, write_timeout_s=0.3) as server:
        opened = server.ask(buffer=4096, prompt="a", max_tokens=100_000, stream=True, logprobs=20)
        until(lambda: bool(engine.submitted))
        _gone(server)
        assert engine.aborted
        opened.close()


def test_headers_that_do_not_come() -> None:
    with Running(FakeEngine(), header_timeout_s=0.2) as server:
        for raw in (b"", b"GET /health HTTP/1.1\r\nhost: local", b"POST /v1/completions HTTP/1.1\r\n"):
            opened = server.connect()
            opened.sendall(raw)
            start = time.monotonic()
            assert read_all(opened) == b""
            assert time.monotonic() - start < 5
        opened = server.connect()
        opened.sendall(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        data = b""
        while not data.endswith(b'{"status":"ok"}'):
            data += opened.recv(65536)
        opened.sendall(b"GET /hea")  # the second request of a connection is watched too
        assert read_all(opened) == b""


def test_a_body_that_does_not_come() -> None:
    with Running(FakeEngine(), body_timeout_s=0.2) as server:
        opened = server.connect()
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        opened.sendall(f'{head}content-length: 50\r\n\r\n{{"model"'.encode())
        assert b" 408 " in read_all(opened)
        _gone(server)


def test_headers_that_are_too_large_or_no_http() -> None:
    with Running(FakeEngine()) as server:
        for raw, status in (
            (b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 60_000 + b"\r\n\r\n", (400, 431)),
            (b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * 5000 + b"\r\n", (400, 431)),
            (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n", (400,)),
        ):
            opened = server.connect()
            opened.sendall(raw)
            answer = read_all(opened)
            assert int(answer.split(b" ")[1]) in status
            assert b'{"error":' in answer


def test_one_connection_too_many() -> None:
    with Running(FakeEngine(), max_connections=2) as server:
        held = [server.connect() for _ in range(2)]
        time.sleep(0.05)
        answer = read_all(server.connect())
        assert b" 503 " in answer
        assert b"retry-after: 1" in answer
        for opened in held:
            opened.close()
        until(lambda: _health(server) == 200)


def _health(server: Running) -> int:
    opened = server.connect()
    opened.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    return int(read_all(opened).split(b" ")[1])


def test_many_clients_that_come_and_go_leave_nothing() -> None:
    engine = FakeEngine(step_s=0.001)
    engine.config.max_queued_requests = 12
    with Running(engine) as server:
        series = []
        for i in range(120):
            body: dict[str, Any] = {"max_tokens": 1 + i % 40, "stream": i % 2 == 0, "n": 1 + i % 3}
            if i % 7 == 0:
                body = {"max_tokens": True}
            opened = server.ask(**body)
            if i % 3 == 0:
                read = opened.recv(100)
                assert read.startswith(b"HTTP/1.1")
            opened.close()
            if i in (59, 119):
                time.sleep(0.1)  # for the last ones to arrive
                _gone(server)
                series.append(_series(server))
        assert series[0] == series[1]


def _series(server: Running) -> int:
    """Lines of the metrics: a label for each request would make them grow."""
    opened = server.connect()
    opened.sendall(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    return sum(not line.startswith(b"#") for line in read_all(opened).splitlines())


def test_requests_on_one_connection() -> None:
    with Running(FakeEngine()) as server:
        raw = json.dumps({"model": "fake", "prompt": "a", "max_tokens": 1}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(raw)}\r\n\r\n"
        opened = server.connect()
        opened.sendall((head.encode() + raw) * 3)  # pipelined
        data = b""
        while data.count(b"HTTP/1.1 200 OK") < 3:
            data += opened.recv(65536)
        opened.close()
