"""OpenAI's own client over every parameter that its library documents: it works, or is refused by its name."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from serving import TEMPLATE, Running, folder_of

openai = pytest.importorskip("openai")

TOOL = {"type": "function", "function": {"name": "f", "description": "a tool", "parameters": {"type": "object"}}}
SCHEMA = {"name": "s", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}
SHARED: dict[str, list[Any]] = {
    "model": ["fake"],
    "frequency_penalty": [0.5, -2, None],
    "presence_penalty": [0.5, 2, None],
    "logit_bias": [{"5": 100, "6": -100}, {}],
    "max_tokens": [1, 7],
    "n": [1, 2],
    "seed": [0, 2**40, -1],
    "stop": ["dog", ["dog", "cat"], None],
    "stream": [True, False],
    "stream_options": [{"include_usage": True}],
    "temperature": [0, 1.5],
    "top_p": [0.1, 1],
    "user": ["someone"],
}
COMPLETIONS = {
    **SHARED,
    "prompt": ["a", ["a", "b"], [1, 2], [[1], [2]]],
    "best_of": [1, 3],
    "echo": [True, False],
    "logprobs": [0, 5],
}
CHATS = {
    **SHARED,
    "messages": [
        [{"role": role, "content": "a"} for role in ("system", "developer", "user", "assistant")],
        [
            {"role": "user", "content": [{"type": "text", "text": "a"}], "name": "someone"},
            {
                "role": "assistant",
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "b"},
        ],
    ],
    "logprobs": [True, False],
    "top_logprobs": [0, 3],
    "max_completion_tokens": [4],
    "response_format": [{"type": "text"}, {"type": "json_object"}, {"type": "json_schema", "json_schema": SCHEMA}],
    "tools": [[TOOL]],
    "tool_choice": ["none", "auto"],
    "parallel_tool_calls": [True, False],
    "prompt_cache_key": ["k"],
    "safety_identifier": ["s"],
    "service_tier": ["auto", "default"],
    "store": [False],
    "modalities": [["text"]],
}
REFUSED_COMPLETIONS = {"suffix": "end"}
REFUSED_CHATS = {
    "audio": {"format": "wav", "voice": "x"},
    "function_call": "auto",
    "functions": [{"name": "f"}],
    "metadata": {"a": "b"},
    "modalities": ["text", "audio"],
    "moderation": {"model": "m"},
    "prediction": {"type": "content", "content": "a"},
    "prompt_cache_options": {"mode": "implicit"},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "low",
    "service_tier": "flex",
    "store": True,
    "tool_choice": "required",
    "verbosity": "low",
    "web_search_options": {},
}
NEEDS: dict[str, dict[str, Any]] = {
    "stream_options": {"stream": True},
    "top_logprobs": {"logprobs": True},
    "tool_choice": {"tools": [TOOL]},
    "echo": {},
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = folder_of(tmp_path_factory.mktemp("model"))
    with (
        Running(FakeEngine(), folder) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def _create(client: Any, what: str, **settings: Any) -> Any:
    if what == "completions":
        return client.completions.create(**{"model": "fake", "prompt": "a", "max_tokens": 5, **settings})
    messages = [{"role": "user", "content": "a"}]
    room = {} if "max_completion_tokens" in settings else {"max_tokens": 5}
    return client.chat.completions.create(**{"model": "fake", "messages": messages, **room, **settings})


ACCEPTED = [("completions", n, v) for n, vs in COMPLETIONS.items() for v in vs]
ACCEPTED += [("chat", n, v) for n, vs in CHATS.items() for v in vs]
REFUSED = [("completions", n, v) for n, v in REFUSED_COMPLETIONS.items()]
REFUSED += [("chat", n, v) for n, v in REFUSED_CHATS.items()]


@pytest.mark.parametrize(("what", "name", "value"), ACCEPTED)
def test_a_documented_parameter_works(client: Any, what: str, name: str, value: Any) -> None:
    settings = {**NEEDS.get(name, {}), name: value}
    if name == "response_format" and value["type"] != "text":
        pytest.importorskip("llguidance")
        settings["max_tokens"] = 60
    answer = _create(client, what, **settings)
    if settings.get("stream"):
        chunks = list(answer)
        assert any(chunk.choices and chunk.choices[0].finish_reason for chunk in chunks)
        assert (chunks[-1].usage is not None) == (name == "stream_options")
        return
    assert answer.usage.completion_tokens > 0
    assert all(choice.finish_reason in ("stop", "length") for choice in answer.choices)


@pytest.mark.parametrize(("what", "name", "value"), REFUSED)
def test_a_parameter_that_is_not_served_is_refused_by_name(client: Any, what: str, name: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        _create(client, what, **{**NEEDS.get(name, {}), name: value})
    assert caught.value.param == name
    assert caught.value.code == "unsupported_parameter"
    assert name in caught.value.body["message"]


def test_no_documented_parameter_is_left_out(client: Any) -> None:
    http = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    for create, known in (
        (client.completions.create, {*COMPLETIONS, *REFUSED_COMPLETIONS}),
        (client.chat.completions.create, {*CHATS, *REFUSED_CHATS}),
    ):
        documented = set(inspect.signature(create).parameters) - http
        assert documented == known


def test_errors_are_of_the_clients_kinds(client: Any) -> None:
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="unknown parameter 'top_q'"):
        client.completions.create(model="fake", prompt="a", extra_body={"top_q": 1})
    with pytest.raises(openai.BadRequestError, match="image_url"):
        _create(client, "chat", messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").id == "fake"


def test_structured_text_follows_its_grammar(client: Any) -> None:
    pytest.importorskip("llguidance")
    own = {"structured_outputs": {"choice": ["true", "false"]}}
    answer = client.completions.create(model="fake", prompt="a", max_tokens=20, extra_body=own)
    assert answer.choices[0].text in ("true", "false")
    own = {"structured_outputs": {"regex": "[0-9]{3}"}}
    answer = client.completions.create(model="fake", prompt="a", max_tokens=20, extra_body=own)
    assert answer.choices[0].text.isdigit()
    for bad in ({"regex": "(((("}, {"grammar": "no grammar"}, {"regex": "a", "choice": ["b"]}, {"json": {"type": 5}}):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="fake", prompt="a", extra_body={"structured_outputs": bad})


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "f"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_tools(tmp_path: Path, choice: Any, stream: bool) -> None:
    pytest.importorskip("llguidance")
    shown = TEMPLATE + '{# <tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call> #}'
    engine = FakeEngine(max_model_len=1024)
    engine.script = engine.tokenizer.encode('a <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>')
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    settings: dict[str, Any] = {"tools": [tool], "tool_choice": choice, "max_tokens": 100}
    with (
        Running(engine, folder_of(tmp_path, shown)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        messages: list[Any] = [{"role": "user", "content": "a"}]
        if stream:
            with client.chat.completions.stream(model="fake", messages=messages, **settings) as events:
                last = events.get_final_completion().choices[0]
        else:
            last = client.chat.completions.create(model="fake", messages=messages, **settings).choices[0]
        (call,) = last.message.tool_calls
        assert (last.finish_reason, last.message.content or None) == ("tool_calls", "a" if choice == "auto" else None)
        assert (call.function.name, json.loads(call.function.arguments)) == ("f", {"a": 1})
        said = {"role": "assistant", "tool_calls": [{**call.to_dict(), "function": {"name": "f", "arguments": "{}"}}]}
        messages += [said, {"role": "tool", "tool_call_id": call.id, "content": "2"}]
        again = client.chat.completions.create(model="fake", messages=messages, max_tokens=1)
        assert again.usage.prompt_tokens > 0


def test_a_stream_that_is_given_up_frees_its_place(client: Any) -> None:
    stream = client.completions.create(model="fake", prompt="a", max_tokens=200, stream=True)
    next(iter(stream))
    stream.close()
    assert client.completions.create(model="fake", prompt="a").usage.completion_tokens == 16
