"""What the routes answer: shapes of OpenAI's API, streams, logprobs, usage, extensions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_engine import WORDS, FakeEngine, small_tokenizer
from serving import chat, client_of, complete, events, folder_of
from starlette.testclient import TestClient

from coterie.infer.request import EngineDead, QueueFull, RequestError


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def client(engine: FakeEngine, tmp_path: Path) -> Iterator[TestClient]:
    with client_of(engine, folder_of(tmp_path)) as client:
        yield client


def test_a_completion(client: TestClient) -> None:
    body = complete(client, max_tokens=5).json()
    assert body["object"] == "text_completion"
    assert body["choices"] == [
        {"index": 0, "text": " sat on the mat and", "logprobs": None, "finish_reason": "length"}
    ]
    assert body["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 5,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert body["system_fingerprint"].startswith("fp_")


def test_a_stream_says_the_same_as_one_answer(client: TestClient) -> None:
    for settings in ({}, {"stop": ["dog"]}, {"stop": " the small"}, {"n": 3}, {"echo": True}, {"seed": 4}):
        whole = complete(client, max_tokens=40, **settings).json()
        chunks = events(complete(client, max_tokens=40, stream=True, **settings).text)
        for choice in whole["choices"]:
            parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
            assert "".join(part["text"] for part in parts) == choice["text"]
            assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]
        assert len({chunk["id"] for chunk in chunks}) == 1


def test_chats_stream_a_role_then_text_then_the_end(client: TestClient) -> None:
    whole = chat(client, max_tokens=6).json()
    assert whole["object"] == "chat.completion"
    chunks = events(chat(client, max_tokens=6, stream=True, stream_options={"include_usage": True}).text)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(c["delta"].get("content", "") for chunk in chunks for c in chunk["choices"])
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_a_chat_goes_through_the_template(client: TestClient, engine: FakeEngine) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    chat(client, [{"type": "text", "text": "a "}, {"type": "text", "text": "cat"}], tools=[tool], max_tokens=1)
    chat(client, "a cat", tools=[tool], tool_choice="none", max_tokens=1)
    texts = [engine.tokenizer.decode(prompt) for _, prompt, _, _ in engine.submitted]
    assert texts[0].startswith("<user>a cat\n<tools>[{")
    assert texts[1] == "<user>a cat\n<assistant>"


def test_without_max_tokens_a_chat_has_all_the_room(client: TestClient, engine: FakeEngine) -> None:
    chat(client)
    complete(client)
    (_, prompt, params, _), (_, _, plain, _) = engine.submitted
    assert len(prompt) + params.max_tokens == engine.max_model_len
    assert plain.max_tokens == 16


def test_logprobs_of_completions(client: TestClient, engine: FakeEngine) -> None:
    engine.words = engine.tokenizer.encode("a € b")
    choice = complete(client, max_tokens=30, logprobs=2).json()["choices"][0]
    told = choice["logprobs"]
    for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert choice["text"][offset:].startswith(token)
    assert all(token in top for token, top in zip(told["tokens"], told["top_logprobs"], strict=True))
    assert any(token.startswith("bytes:\\x") for token in told["tokens"])  # a part of a €
    none = complete(client, max_tokens=2, logprobs=0).json()["choices"][0]["logprobs"]
    assert none["top_logprobs"] is None
    assert none["token_logprobs"] == [-0.5, -0.5]


def test_logprobs_of_chats(client: TestClient, engine: FakeEngine) -> None:
    engine.words = engine.tokenizer.encode("a € b")
    choice = chat(client, max_tokens=30, logprobs=True, top_logprobs=2).json()["choices"][0]
    content = choice["logprobs"]["content"]
    raw = b"".join(bytes(one["bytes"]) for one in content)
    assert raw.decode(errors="replace") == choice["message"]["content"]
    assert all(len(one["top_logprobs"]) == 2 for one in content)
    chunks = events(chat(client, max_tokens=30, logprobs=True, stream=True).text)
    streamed = [one for c in chunks for ch in c["choices"] for one in (ch["logprobs"] or {"content": []})["content"]]
    assert [one["token"] for one in streamed] == [one["token"] for one in content]


def test_extensions_reach_the_engine(client: TestClient, engine: FakeEngine) -> None:
    own = {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.5, "ignore_eos": True, "min_tokens": 2}
    body = complete(client, **own, max_tokens=3, stop_token_ids=[7], return_token_ids=True, routes=True).json()
    params = engine.submitted[0][2]
    assert {name: getattr(params, name) for name in own} == own
    assert params.stop_token_ids == (7,)
    choice = body["choices"][0]
    assert choice["prompt_token_ids"] == list(engine.submitted[0][1])
    assert engine.tokenizer.decode(choice["token_ids"]) == choice["text"]
    assert [len(token) for token in choice["routes"]] == [2, 2, 2]
    chunks = events(chat(client, max_tokens=3, stream=True, routes=True, return_token_ids=True).text)
    parts = [c for chunk in chunks for c in chunk["choices"]]
    assert sum(len(part.get("routes", ())) for part in parts) == 3
    assert sum(len(part.get("token_ids", ())) for part in parts) == 3
    assert parts[0]["prompt_token_ids"] == list(engine.submitted[1][1])


def test_several_prompts_and_samples(client: TestClient, engine: FakeEngine) -> None:
    body = complete(client, prompt=[[1, 2], [3]], n=2, best_of=3, max_tokens=2).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [params.best_of for _, _, params, _ in engine.submitted] == [3, 3]
    assert body["usage"]["prompt_tokens"] == 3
    assert complete(client, prompt="", max_tokens=1).json()["usage"]["prompt_tokens"] == 1


def test_text_of_tokens_is_echoed(client: TestClient) -> None:
    tokens = small_tokenizer().encode("a cat")
    assert complete(client, prompt=tokens, echo=True, max_tokens=1).json()["choices"][0]["text"].startswith("a cat")


def test_a_stop_string_does_not_leak(client: TestClient) -> None:
    for stop in ("small dog", "on the", "the", "é"):
        text = complete(client, max_tokens=60, stop=stop).json()["choices"][0]["text"]
        assert stop not in text
        assert (WORDS * 3).split(" sat", 1)[1].startswith(text.removeprefix(" sat"))


def test_models_and_health(client: TestClient, engine: FakeEngine) -> None:
    listed = client.get("/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["fake"]
    assert client.get("/v1/models/fake").json() == listed[0]
    assert client.get("/v1/models/org/other").status_code == 404
    for path in ("/health", "/health/live", "/health/ready"):
        assert client.get(path).status_code == 200
    client.app.state.life.draining = True
    assert [client.get(f"/health/{name}").status_code for name in ("live", "ready")] == [200, 503]
    refused = complete(client)
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (QueueFull("1024 sequences wait"), 429, "queue_full"),
        (EngineDead("the engine is stopping"), 503, "unavailable"),
        (RequestError("top_k is odd"), 400, None),
        (RuntimeError("secret in /home/someone/model.py"), 500, "internal_error"),
    ],
)
def test_what_the_engine_refuses(
    client: TestClient, engine: FakeEngine, error: Exception, status: int, code: str | None
) -> None:
    engine.refuse = error
    for stream in (False, True):
        answer = complete(client, stream=stream)
        told = answer.json()["error"]
        assert (answer.status_code, told["code"]) == (status, code)
        assert "secret" not in answer.text
        assert ("retry-after" in answer.headers) == (status in (429, 503))
        assert told["param"] == ("top_k" if status == 400 else None)
    engine.refuse = None
    assert complete(client, max_tokens=1).status_code == 200


def test_the_second_of_two_prompts_has_no_room_and_the_first_is_given_up(
    client: TestClient, engine: FakeEngine
) -> None:
    engine.gate.clear()
    engine.config.max_queued_requests = 3
    assert complete(client, prompt=[[1], [2]], n=2).status_code == 429
    assert engine.aborted == [engine.submitted[0][0]]
    engine.gate.set()


def test_a_failed_sequence_fails_its_request_alone(client: TestClient, engine: FakeEngine) -> None:
    engine.fail_at = 2
    answer = complete(client, max_tokens=4, n=2)
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "this sequence could not be sampled"
    streamed = events(complete(client, max_tokens=4, stream=True).text)
    assert "choices" in streamed[0]
    assert streamed[-1]["error"]["type"] == "server_error"
    engine.fail_at = 0  # before anything is sent there is a status
    assert complete(client, max_tokens=4, stream=True).status_code == 500
    engine.fail_at = None
    assert complete(client, max_tokens=4).status_code == 200
    assert engine.idle


def test_the_engine_dies(client: TestClient, engine: FakeEngine) -> None:
    engine.die_at = 3
    streamed = events(complete(client, max_tokens=9, stream=True).text)
    assert "error" in streamed[-1]
    assert "secret" not in str(streamed)
    assert [client.get(f"/health/{name}").status_code for name in ("live", "ready")] == [503, 503]
    assert complete(client).status_code == 503


def test_a_deadline(engine: FakeEngine) -> None:
    engine.step_s = 0.02
    with client_of(engine, request_timeout_s=0.1) as client:
        late = complete(client, max_tokens=200)
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline")
        streamed = events(complete(client, max_tokens=200, stream=True).text)
        assert streamed[-1]["error"]["code"] == "deadline"


def test_a_model_without_tokenizer_takes_tokens(engine: FakeEngine) -> None:
    with client_of(engine) as client:
        client.app.state.service.engine.tokenizer = None
        assert complete(client).json()["error"]["param"] == "prompt"
        assert complete(client, prompt=[1], max_tokens=2, logprobs=1).status_code == 200


def test_a_checkpoint_without_template(engine: FakeEngine) -> None:
    with client_of(engine) as client:
        assert chat(client).json()["error"]["code"] == "no_chat_template"


def test_the_checkpoints_settings_count_where_a_request_says_nothing(client: TestClient, engine: FakeEngine) -> None:
    engine.defaults = {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    complete(client, max_tokens=1, temperature=None)
    chat(client, max_tokens=1, temperature=0, top_k=-1, top_p=1)
    (_, _, first, _), (_, _, second, _) = engine.submitted
    assert (first.temperature, first.top_k, first.top_p) == (0.6, 20, 0.95)
    assert (second.temperature, second.top_k, second.top_p) == (0, 0, 1)


@pytest.mark.parametrize("prompt", ["a cat é on", [[72, 5, 9], [4]], "b"])
@pytest.mark.parametrize("most", [0, 1, 4])
def test_echo_with_logprobs_tells_of_the_prompt(
    client: TestClient, engine: FakeEngine, prompt: str | list[list[int]], most: int
) -> None:
    asked = {"prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": most, "n": 2}
    body = complete(client, **asked).json()
    assert body["usage"]["completion_tokens"] == most * len(body["choices"])
    chunks = events(complete(client, **asked, stream=True).text)
    for choice in body["choices"]:
        told = choice["logprobs"]
        ids = engine.submitted[choice["index"] // 2][1]
        assert {len(column) for column in told.values()} == {len(ids) + most}
        assert (told["token_logprobs"][0], told["top_logprobs"][0], told["text_offset"][0]) == (None, None, 0)
        assert told["token_logprobs"][1:] == [-1.0] * (len(ids) - 1) + [-0.5] * most
        for token, offset, top in zip(told["tokens"], told["text_offset"], told["top_logprobs"], strict=True):
            assert token.startswith("bytes:") or choice["text"][offset:].startswith(token)
            assert top is None or token in top
        assert choice["finish_reason"] == "length"
        parts = [one for chunk in chunks for one in chunk["choices"] if one["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for name, column in told.items():
            assert [x for part in parts if part["logprobs"] for x in part["logprobs"][name]] == column


def test_nothing_to_answer_is_refused(client: TestClient) -> None:
    assert complete(client, max_tokens=0).json()["error"]["param"] == "max_tokens"
    assert chat(client, max_tokens=0).json()["error"]["param"] == "max_tokens"
    silent = complete(client, max_tokens=0, echo=True).json()["choices"][0]
    assert (silent["text"], silent["logprobs"]) == ("the cat", None)
