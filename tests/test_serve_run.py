"""The process: it says when it is ready, drains, ends when the engine does, and starts again after kill -9."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from serving import gauge, process, save_model, stream, until

from coterie.infer.routes import load
from coterie.serve.limits import Life
from coterie.serve.run import _end
from coterie.serve.settings import ServerSettings

httpx = pytest.importorskip("httpx")
pytestmark = pytest.mark.slow  # each starts processes
HERE = Path(__file__).resolve().parent
FAKE = """
import sys
from fake_engine import FakeEngine
from coterie.serve.run import serve
from coterie.serve.settings import ServerSettings
engine = FakeEngine(step_s=float(sys.argv[1]))
engine.die_at = int(sys.argv[2]) or None
sys.exit(serve(engine, ServerSettings(port=int(sys.argv[4]), drain_s=float(sys.argv[3]))))
"""


def _fake(step_s: float = 0.0, die_at: int = 0, drain_s: float = 10, port: int = 0) -> list[str]:
    return [sys.executable, "-c", FAKE, str(step_s), str(die_at), str(drain_s), str(port)]


def test_sigterm_refuses_new_requests_and_finishes_the_old(tmp_path: Path) -> None:
    with process(tmp_path, _fake(step_s=0.02)) as server, stream(server.url, 60) as lines:
        next(lines)
        server.inner.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{server.url}/health/ready").status_code == 503)
        refused = httpx.post(f"{server.url}/v1/completions", json={"model": "fake", "prompt": "a"})
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        rest = list(lines)
        assert rest[-1] == "[DONE]"
        assert json.loads(rest[-2])["choices"][0]["finish_reason"] == "length"
        assert server.end() == 0


def test_after_the_drain_the_rest_is_aborted_and_told(tmp_path: Path) -> None:
    with process(tmp_path, _fake(step_s=0.05, drain_s=0.2)) as server, stream(server.url, 200) as lines:
        next(lines)
        start = time.monotonic()
        server.inner.send_signal(signal.SIGINT)
        rest = list(lines)
        assert json.loads(rest[-2])["error"]["code"] == "unavailable"
        assert server.end() == 0
        assert time.monotonic() - start < 8


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with process(tmp_path, _fake(step_s=0.05, drain_s=60)) as server, stream(server.url, 200) as lines:
        next(lines)
        server.inner.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{server.url}/health/ready").status_code == 503)
        server.inner.send_signal(signal.SIGTERM)
        assert server.end(3) == 128 + signal.SIGTERM


def test_an_engine_that_dies_takes_the_process_with_it(tmp_path: Path) -> None:
    with process(tmp_path, _fake(step_s=0.02, die_at=5)) as server, stream(server.url, 60) as lines:
        rest = list(lines)
        assert "error" in json.loads(rest[-2])
        assert "secret" not in "".join(rest)
        assert server.end() == 1
    assert "the engine has failed" in (tmp_path / "log").read_text()


def test_kill_9_loses_only_what_was_under_way(tmp_path: Path) -> None:
    with process(tmp_path, _fake(step_s=0.02)) as server:
        port = server.url.rsplit(":", 1)[1]
        with stream(server.url, 200) as lines:
            next(lines)
            server.inner.kill()
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
        assert server.end() == -signal.SIGKILL
    with process(tmp_path, _fake(port=int(port))) as server:
        answer = httpx.post(f"{server.url}/v1/completions", json={"model": "fake", "prompt": "a"})
        assert answer.status_code == 200


def test_a_port_that_is_taken_is_told_of(tmp_path: Path) -> None:
    with process(tmp_path, _fake()) as server:
        port = int(server.url.rsplit(":", 1)[1])
        second = subprocess.run(
            _fake(port=port),
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent.parent)])},
        )
    assert second.returncode != 0
    assert f"cannot listen at 127.0.0.1 port {port}" in second.stderr


def test_an_engine_that_hangs_does_not_keep_theprocess() -> None:
    engine, life = FakeEngine(), Life(ServerSettings())
    engine.stop = lambda grace_s=0.0: time.sleep(60)
    start = time.monotonic()
    asyncio.run(_end(engine, life, 0.0))
    assert time.monotonic() - start < 30
    assert life.draining


def test_the_command_serves_a_model_as_the_pipeline_does(tmp_path: Path) -> None:
    import coterie

    folder = tmp_path / "tiny"
    save_model(folder)
    settings = {"temperature": 0, "max_tokens": 12}
    with coterie.pipeline(folder) as pipe:
        expected = pipe(["the cat", "a dog ran"], **settings)
    command = [sys.executable, "-m", "coterie.cli", "serve", str(folder), "--port", "0"]
    command += ["--record", str(tmp_path / "day")]
    with process(tmp_path, command) as server:
        body = {"model": "tiny", "prompt": ["the cat", "a dog ran"], "return_token_ids": True, **settings}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30).json()
        assert [choice["text"] for choice in answer["choices"]] == [one.text for one in expected]
        assert [tuple(choice["token_ids"]) for choice in answer["choices"]] == [one.tokens for one in expected]
        messages = [{"role": "user", "content": "the cat"}]
        own = {"routes": True, "logprobs": True, "top_logprobs": 2, "max_tokens": 5}
        chat = {"model": "tiny", "messages": messages, **own}
        told = httpx.post(f"{server.url}/v1/chat/completions", json=chat, timeout=30).json()["choices"][0]
        assert len(told["routes"]) == len(told["logprobs"]["content"]) == 5
        assert all(len(layer) == 2 for token in told["routes"] for layer in token)
        form = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [1, 2]}}}}
        chosen = httpx.post(f"{server.url}/v1/chat/completions", json={**chat, **form}, timeout=30).json()
        assert json.loads(chosen["choices"][0]["message"]["content"]) in (1, 2)
        for i in range(12):
            with httpx.stream(
                "POST", f"{server.url}/v1/completions", json={**body, "max_tokens": 200, "stream": True}
            ):
                time.sleep(0.005 * i)
        until(lambda: gauge(server.url, "vllm:num_requests_running") == 0)
        assert gauge(server.url, "vllm:kv_cache_usage_perc") == 0
        steps = gauge(server.url, "coterie:recorded_steps_total")
        assert 12 < steps <= gauge(server.url, "coterie:step_seconds_count")
        tokens = gauge(server.url, "vllm:iteration_tokens_total_sum")
        assert gauge(server.url, "coterie:recorded_tokens_total") == tokens
        assert gauge(server.url, "coterie:recorded_kept_steps") == steps
        assert gauge(server.url, "coterie:recorded_kept_bytes") > 0
        assert not (tmp_path / "day").exists()
        server.inner.send_signal(signal.SIGTERM)
        assert server.end() == 0
    assert len(load(tmp_path / "day")) == steps
