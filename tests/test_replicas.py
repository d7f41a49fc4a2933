"""Several processes behind one address: one is killed, hangs, or has no room; clients go away; all drain."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_engine import FakeEngine
from serving import KEY, Process, client_of, complete, process, save_model, stream, until

from coterie.benchmarks.soak_client import samples
from coterie.infer.config import EngineConfig
from coterie.serve import replicas as module
from coterie.serve.replicas import Replicas
from coterie.serve.settings import KEYS_VARIABLE, ServerSettings

httpx = pytest.importorskip("httpx")
pytestmark = [pytest.mark.slow, pytest.mark.dist]
CLIENT = httpx.Client(timeout=60, verify=False)  # making one takes long
CHILD = """
import contextlib, json, os, sys
from fake_engine import FakeEngine
from coterie.infer.request import QueueFull
from coterie.serve.replicas import replica
assert "COTERIE_API_KEYS" not in os.environ
told = json.loads(os.environ["FAKE"])
class Poisoned(FakeEngine):
    def submit(self, prompt, *rest, **more):
        if len(prompt) == 13:
            os._exit(9)
        return super().submit(prompt, *rest, **more)
def opened(model, config):
    made = Poisoned(step_s=told.get("step_s", 0))
    made.config.max_sequences, made.config.max_queued_requests = 4, 1000
    for place in told.get("full", []):
        with contextlib.suppress(FileExistsError):
            os.mkdir(place)  # the first to come
            made.refuse = QueueFull("the queue is full")
    return made, None
sys.exit(replica(opened))
"""
BALANCER = f"""
import sys
from pathlib import Path
from coterie.infer.config import EngineConfig
from coterie.serve.balancer import serve_replicas
from coterie.serve.settings import ServerSettings
settings = ServerSettings(port=0, drain_s=float(sys.argv[2]))
command = (sys.executable, "-c", {CHILD!r})
sys.exit(serve_replicas(Path("fake"), settings, EngineConfig(), int(sys.argv[1]), command))
"""


@contextlib.contextmanager
def _fakes(
    folder: Path, patch: pytest.MonkeyPatch, count: int = 3, drain_s: float = 10.0, **told: Any
) -> Iterator[Process]:
    patch.setenv("FAKE", json.dumps(told))
    command = [sys.executable, "-c", BALANCER, str(count), str(drain_s)]
    with process(folder, command) as server:
        until(lambda: _told(server)["coterie:replica_up"] == count, 60)
        yield server


def _told(server: Process, **headers: str) -> dict[str, float]:
    return samples(CLIENT.get(f"{server.url}/metrics", headers=headers).text)


def _children(server: Process) -> list[psutil.Process]:
    return [one for one in psutil.Process(server.inner.pid).children() if one.status() != psutil.STATUS_ZOMBIE]


def _ended(children: list[psutil.Process]) -> bool:
    return not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in children)


def _ask(server: Process, tokens: int = 20, **body: Any) -> Any:
    told = {"model": "fake", "prompt": "the cat", "max_tokens": tokens, **body}
    return CLIENT.post(f"{server.url}/v1/completions", json=told)


def _quiet(server: Process) -> None:
    """Nothing is left of any request."""

    def nothing() -> bool:
        told = _told(server)
        return (
            not told["vllm:num_requests_running"]
            + told["vllm:num_requests_waiting"]
            + told["vllm:kv_cache_usage_perc"]
            + told["coterie:replica_outstanding_tokens"]
        )

    until(nothing)


def test_of_three_one_is_killed_under_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that stream are told; all others are answered, also those that wait for the one that is killed."""
    with client_of(FakeEngine()) as client:
        expected = complete(client, max_tokens=20).json()["choices"][0]["text"]
    with _fakes(tmp_path, monkeypatch, step_s=0.04) as server, ThreadPoolExecutor(64) as pool:
        with contextlib.ExitStack() as stack:
            begun = [stack.enter_context(stream(server.url, 150)) for _ in range(6)]
            first = [next(lines) for lines in begun]
            waiting = [pool.submit(_ask, server) for _ in range(40)]  # three times 4 compute, less those that stream
            until(lambda: _told(server)["vllm:num_requests_waiting"] > 10)
            _children(server)[0].kill()
            for answer in (one.result() for one in waiting):
                assert answer.status_code == 200, answer.text
                assert answer.json()["choices"][0]["text"] == expected
            ends = []
            for one, lines in zip(first, begun, strict=True):
                *told, done = [one, *lines]
                assert done == "[DONE]"
                ends.append(json.loads(told[-1]))
        lost = [end["error"] for end in ends if "error" in end]
        assert 1 <= len(lost) < 6
        assert {error["code"] for error in lost} == {"replica_lost"}
        assert all(end["choices"][0]["finish_reason"] for end in ends if "error" not in end)
        until(lambda: _told(server)["coterie:replica_up"] == 3, 60)
        told = _told(server)
        assert told["coterie:replica_starts_total"] == 4
        assert told["coterie:requests_retried_total"] > 0
        _quiet(server)
        assert _ask(server).status_code == 200


@pytest.mark.long
def test_clients_that_go_away_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _fakes(tmp_path, monkeypatch, 2, step_s=0.05) as server:
        for _ in range(12):
            with stream(server.url, 200) as lines:
                next(lines)
        for _ in range(12):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(
                    f"{server.url}/v1/completions",
                    json={"model": "fake", "prompt": "a", "max_tokens": 200},
                    timeout=0.1,
                )
        _quiet(server)
        assert _told(server)["coterie:requests_retried_total"] == 0


def test_sigterm_drains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _fakes(tmp_path, monkeypatch, 2, step_s=0.03) as server, stream(server.url, 60) as lines:
        children = _children(server)
        assert len(children) == 2
        next(lines)
        server.inner.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{server.url}/health/ready").status_code == 503)
        refused = _ask(server)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        rest = list(lines)
        assert rest[-1] == "[DONE]"
        assert json.loads(rest[-2])["choices"][0]["finish_reason"] == "length"
        assert server.end() == 0
        until(lambda: _ended(children))


@pytest.mark.long
def test_after_the_drain_the_rest_is_told_and_a_killed_balancer_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _fakes(tmp_path, monkeypatch, 2, 0.2, step_s=0.05) as server, stream(server.url, 200) as lines:
        children = _children(server)
        next(lines)
        server.inner.send_signal(signal.SIGTERM)
        assert json.loads(list(lines)[-2])["error"]["code"] == "unavailable"
        assert server.end() == 0
        until(lambda: _ended(children))
    with _fakes(tmp_path, monkeypatch, 2) as server:
        children = _children(server)
        server.inner.kill()
        until(lambda: _ended(children))


@pytest.mark.long
def test_one_without_room_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _fakes(tmp_path, monkeypatch, 2, full=[str(tmp_path / "one")]) as server:
        assert {_ask(server).status_code for _ in range(6)} == {200}
        assert _told(server)["coterie:requests_retried_total"] > 0
    with _fakes(tmp_path, monkeypatch, 1, full=[str(tmp_path / "two")]) as server:
        answer = _ask(server)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert answer.json()["error"]["code"] == "queue_full"


@pytest.mark.long
def test_a_request_that_ends_replicas_does_not_end_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _fakes(tmp_path, monkeypatch) as server:
        answer = _ask(server, prompt=[1] * 13)
        assert answer.status_code == 503
        assert "have ended under this request" in answer.json()["error"]["message"]
        assert _ask(server).status_code == 200
        until(lambda: _told(server)["coterie:replica_up"] == 3, 60)
        assert _told(server)["coterie:replica_starts_total"] == 5


@pytest.mark.long
def test_one_that_hangs_is_killed_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE", "{}")
    monkeypatch.setenv(KEYS_VARIABLE, KEY)  # a replica ends where it sees one
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    for name, value in (("_PATIENCE_S", 0.5), ("_LOOK_S", 0.05)):
        monkeypatch.setattr(module, name, value)
    settings = ServerSettings(model_name="fake")

    async def run() -> None:
        command = (sys.executable, "-c", CHILD)
        all_ = Replicas(tmp_path / "fake", settings, EngineConfig(), 1, tmp_path, command)
        all_.start()
        one = all_.members[0]
        await _until(lambda: one.ready)
        assert one._process is not None
        first = one._process.pid
        os.kill(first, signal.SIGSTOP)
        await _until(lambda: not one.ready)
        assert not all_.alive
        await _until(lambda: one.ready)
        assert one.starts == 2
        assert one._process.pid != first
        assert all_.failure is None
        await asyncio.get_running_loop().run_in_executor(None, all_.stop)
        assert not psutil.pid_exists(one._process.pid)

    asyncio.run(run())


async def _until(what: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.01)


def test_the_command_answers_as_one_server_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two replicas of a real model, with keys: the same tokens, prompts that follow their cache, and no cache of
    another's."""
    import coterie

    folder, other = tmp_path / "tiny", "another-key-of-them-2"
    save_model(folder)
    prompts = [[(7 * i + j) % 250 + 5 for j in range(100)] for i in range(6)]
    with coterie.pipeline(folder) as pipe:
        expected = pipe(prompts, temperature=0, max_tokens=12)
    monkeypatch.setenv(KEYS_VARIABLE, f"{KEY},{other}")
    command = [sys.executable, "-m", "coterie.cli", "serve", str(folder), "--port", "0", "--replicas", "2"]
    with process(tmp_path, command) as server:
        mine, theirs = ({"authorization": f"Bearer {key}"} for key in (KEY, other))
        until(lambda: _told(server, **mine)["coterie:replica_up"] == 2, 60)

        def ask(prompt: Any, headers: dict[str, str]) -> Any:
            body = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
            return httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60).json()

        def cached(answer: Any) -> int:
            return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

        assert ask(prompts[0], {})["error"]["code"] == "invalid_api_key"
        first = [ask(prompt, mine) for prompt in prompts]
        again = [ask(prompt, mine) for prompt in prompts]
        for told in (first, again):
            assert [tuple(one["choices"][0]["token_ids"]) for one in told] == [one.tokens for one in expected]
        assert not any(map(cached, first))
        assert all(cached(one) >= 80 for one in again)
        assert not any(cached(ask(prompt, theirs)) for prompt in prompts)
        page = httpx.get(f"{server.url}/metrics", headers=mine).text.splitlines()
        hits = [line for line in page if line.startswith("vllm:prefix_cache_hits_total")]
        assert len(hits) == 2
        assert all(float(line.rsplit(" ", 1)[1]) > 0 for line in hits)  # both did a share
        body = {"model": "tiny", "prompt": prompts[0], "max_tokens": 150, "stream": True, "ignore_eos": True}
        for i in range(6):
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=mine):
                time.sleep(0.005 * i)
        until(lambda: _told(server, **mine)["vllm:num_requests_running"] == 0)
        assert _told(server, **mine)["vllm:kv_cache_usage_perc"] == 0
        assert _told(server, **mine)["coterie:replica_outstanding_tokens"] == 0
        server.inner.send_signal(signal.SIGTERM)
        assert server.end() == 0
