"""What comes from outside is bounded before it costs anything: bytes, brackets, numbers, counts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_engine import FakeEngine
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import chat, client_of, complete, folder_of
from starlette.testclient import TestClient

from coterie.serve.chat_protocol import ChatRequest
from coterie.serve.errors import ApiError, encode
from coterie.serve.parse import check, is_deep, parse_json
from coterie.serve.protocol import CompletionRequest
from coterie.serve.settings import ServerSettings

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
NAMES = sorted({*CompletionRequest.model_fields, *ChatRequest.model_fields, "suffix", "tools", "other"})


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with client_of(FakeEngine(), folder_of(tmp_path_factory.mktemp("model")), max_body_bytes=1 << 20) as client:
        yield client


def _raw(client: TestClient, raw: bytes, **headers: str) -> Any:
    kind = {"content-type": "application/json", **headers}
    return client.post("/v1/completions", content=raw, headers=kind)


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(_depth, inner), default=0)


@settings(max_examples=150, deadline=None)
@given(JSON, st.integers(0, 6), st.booleans())
def test_depth_is_that_of_the_brackets(value: Any, most: int, ascii: bool) -> None:
    raw = json.dumps(value, ensure_ascii=ascii).encode(errors="replace")
    assert is_deep(raw, most) == (_depth(value) > most)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.text(alphabet='[]{}",\\:ab1 ').map(str.encode))
def test_any_bytes_are_an_object_or_refused(raw: bytes) -> None:
    refused = _refusal(lambda: parse_json(raw, 8), dict)
    assert refused is None or "\n" not in refused.message


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4), st.sampled_from([CompletionRequest, ChatRequest]))
def test_any_values_are_a_request_or_refused(own: dict[str, Any], kind: Any) -> None:
    base = {"model": "fake", "prompt": "a"} if kind is CompletionRequest else {"model": "fake"}
    refused = _refusal(lambda: check(kind, {**base, **own}), kind)
    assert refused is None or encode(refused.body)


def _refusal(call: Callable[[], Any], kind: type) -> ApiError | None:
    """What was raised; None: it gave what it should."""
    try:
        found: Any = call()
    except ApiError as error:
        found = error
    assert isinstance(found, kind) or found.status == 400
    return found if isinstance(found, ApiError) else None


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":' * 30_000,
        b"[" * 100_000,
        b"[]" * 100_000,
        b'"\\' * 100_000,
        b'{"a":"' + b'\\"' * 200_000,
        b'{"a":' + b"9" * 100_000 + b"}",
        b'{"model":"fake","prompt":"a",' + b",".join(b'"x%d":1' % i for i in range(50_000)) + b"}",
        b'{"model":"fake","prompt":[' + b'"a",' * 100_000 + b"1]}",
        b'{"model":"fake","prompt":"a","logit_bias":{' + b",".join(b'"x%d":1' % i for i in range(50_000)) + b"}}",
        b'{"model":"fake","prompt":' + json.dumps([[0.5]] * 50_000).encode() + b"}",
    ],
)
def test_a_hostile_body_is_refused_quickly(client: TestClient, raw: bytes) -> None:
    start = time.perf_counter()
    answer = _raw(client, raw)
    assert answer.status_code == 400
    assert len(answer.content) < 2000
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b'{"model":"fake","prompt":"a","temperature":NaN}', "the number NaN"),
        (b'{"model":"fake","prompt":"a","temperature":-Infinity}', "the number -Infinity"),
        (b'{"model":"fake","prompt":"a","temperature":1e999}', "too large"),
        (b'{"model":"fake","prompt":"\\ud800"}', "surrogate"),
        (b'{"model":"fake","prompt":"\xff"}', "is not JSON"),
        (b"[1]", "is a JSON array: give an object"),
        (b"", "is not JSON"),
    ],
)
def test_json_that_is_none(client: TestClient, raw: bytes, words: str) -> None:
    answer = _raw(client, raw)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_a_key_that_stands_twice_counts_once(client: TestClient) -> None:
    answer = _raw(client, b'{"model":"x","model":"fake","prompt":"a","max_tokens":1}')
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", v) for v in (True, "1", -0.1, 2.1, [1])],
        *[("max_tokens", v) for v in (True, 1.0, 0, -1, 2**31, "5")],
        *[("n", v) for v in (0, 129, True, 10**30)],
        *[("best_of", v) for v in (0, 129)],
        *[("logprobs", v) for v in (-1, 21, True)],
        *[("stop", v) for v in ("", ["a"] * 17, ["a" * 257], [1], {})],
        *[("stop_token_ids", v) for v in ([-1], [True], [1] * 65)],
        *[
            ("logit_bias", v)
            for v in ({"1": 101}, {"-1": 1}, {"a": 1}, {"1": True}, {str(i): 1 for i in range(1025)})
        ],
        *[("seed", v) for v in (2**63, 0.5)],
        *[("top_k", v) for v in (-2, True)],
        *[("prompt", v) for v in ([], [[]], [True], [-1], [2**31], ["a", 1], None, {})],
        *[("cache_salt", v) for v in ("", "a" * 257, 1)],
        *[("stream", v) for v in (1, "true")],
    ],
)
def test_values_out_of_bounds_name_their_parameter(client: TestClient, name: str, value: Any) -> None:
    answer = complete(client, **{name: value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name


def test_token_ids_outside_of_the_vocabulary(client: TestClient) -> None:
    for own in ({"prompt": [300]}, {"stop_token_ids": [300]}, {"logit_bias": {"300": 1}}):
        assert complete(client, **own).status_code == 400


def test_counts(client: TestClient) -> None:
    assert complete(client, prompt=["a"] * 65).json()["error"]["param"] == "prompt"
    assert complete(client, prompt=["a"] * 64, n=3).json()["error"]["param"] == "n"
    assert complete(client, prompt="a" * 300).json()["error"]["code"] == "context_length_exceeded"
    assert complete(client, max_tokens=255).json()["error"]["code"] == "context_length_exceeded"
    many = [{"role": "user", "content": "a"}] * 2049
    assert client.post("/v1/chat/completions", json={"model": "fake", "messages": many}).status_code == 400
    tools = [{"type": "function", "function": {"name": "f"}}] * 129
    assert chat(client, tools=tools).json()["error"]["param"] == "tools"


def test_characters_are_counted_before_they_are_tokens(tmp_path: Any) -> None:
    engine = FakeEngine()
    engine.tokenizer = _Watched(engine.tokenizer)
    with client_of(engine, folder_of(tmp_path), max_prompt_characters=100) as client:
        assert complete(client, prompt=["a" * 60, "a" * 60]).status_code == 400
        assert chat(client, "a" * 101).status_code == 400
        assert not engine.tokenizer.asked
        assert complete(client, prompt=["a" * 50, "a" * 50]).status_code == 200


class _Watched:
    def __init__(self, inner: Any) -> None:
        self._inner, self.asked = inner, 0

    def __getattr__(self, name: str) -> Any:
        self.asked += name.startswith("encode")
        return getattr(self._inner, name)


def test_bodies_and_headers(client: TestClient) -> None:
    large = json.dumps({"model": "fake", "prompt": "a" * (1 << 20)}).encode()
    assert _raw(client, large).status_code == 413
    chunks = (large[i : i + 4096] for i in range(0, len(large), 4096))  # no content-length
    answer = client.post("/v1/completions", content=chunks, headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert answer.headers["connection"] == "close"
    assert _raw(client, b"{}", **{"content-type": "text/plain"}).status_code == 415
    assert _raw(client, b"{}", **{"content-encoding": "gzip"}).status_code == 415
    assert _raw(client, b"{}", **{"x-large": "a" * (16 << 10)}).status_code == 431
    assert client.get("/health?" + "a" * (16 << 10)).status_code == 431


def test_places_run_out_and_come_back() -> None:
    engine = FakeEngine()
    with client_of(engine, max_requests=2) as client:
        life = client.app.state.life
        life.active = 2
        refused = complete(client)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        assert refused.headers["retry-after"] == "1"
        assert client.get("/health").status_code == 200
        assert 'code="429"' in client.get("/metrics").text
        life.active = 0
        for body in ({"max_tokens": 1}, {"max_tokens": 0}):
            complete(client, **body)
        assert life.active == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("port", 65536), ("port", -1), ("max_requests", 0), ("body_timeout_s", float("inf")), ("host", "")],
)
def test_settings_that_mean_nothing(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        ServerSettings(**{name: value})
