"""The service on a real Ray of this machine; only where Ray is installed."""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

import pytest
from serving import KEY, process, save_model, until

from coterie.infer.config import EngineConfig
from coterie.serve.settings import KEYS_VARIABLE, ServerSettings

pytest.importorskip("ray")
psutil = pytest.importorskip("psutil")
httpx = pytest.importorskip("httpx")
pytestmark = [pytest.mark.slow, pytest.mark.dist, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def test_a_port_must_be_told(tmp_path: Path) -> None:
    from coterie.serve.ray_app import serve_ray

    with pytest.raises(ValueError, match="port is 0"):
        serve_ray(tmp_path, ServerSettings(port=0), EngineConfig(), 1)


@pytest.mark.long
def test_replicas_of_ray_answer_as_one_server_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import coterie

    save_model(tmp_path / "tiny")
    prompts = ["the cat", "a dog ran", "the"]
    with coterie.pipeline(tmp_path / "tiny") as pipe:
        expected = [one.text for one in pipe(prompts, temperature=0, max_tokens=12)]
    monkeypatch.setenv(KEYS_VARIABLE, KEY)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model = str(tmp_path / "tiny")
    command = [sys.executable, "-m", "coterie.cli", "serve", model, "--port", str(port), "--replicas", "2", "--ray"]
    with process(tmp_path, command) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        body = {"model": "tiny", "temperature": 0, "max_tokens": 12}
        assert client.post("/v1/completions", json=body | {"prompt": "a"}).status_code == 401
        client.headers["authorization"] = f"Bearer {KEY}"

        def answers() -> list[str]:
            told = [client.post("/v1/completions", json=body | {"prompt": prompt}) for prompt in prompts * 3]
            return [one.json()["choices"][0]["text"] for one in told]

        assert answers() == expected * 3
        with client.stream("POST", "/v1/completions", json=body | {"prompt": "a", "stream": True}) as stream:
            lines = [line for line in stream.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        assert len(lines) > 3
        with client.stream("POST", "/v1/completions", json=body | {"prompt": "a", "max_tokens": 240, "stream": True}):
            pass
        pages: list[str] = []

        def free_again() -> bool:
            pages.append(client.get("/metrics").text)
            return 'vllm:kv_cache_usage_perc{model_name="tiny"} 0.0' in pages[-1]

        until(free_again)
        replicas = [one for one in psutil.Process(server.inner.pid).children(True) if "ServeReplica" in one.name()]
        assert len(replicas) == 2
        os.kill(replicas[0].pid, signal.SIGKILL)
        until(lambda: client.get("/health").status_code == 200 and answers() == expected * 3, 60)
        server.inner.send_signal(signal.SIGTERM)
        assert server.end(60) == 0
