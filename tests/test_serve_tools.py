"""Calls of tools: found in texts however they are cut, told in OpenAI's shape, and forced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from engines import engine as real_engine
from fake_engine import FakeEngine
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import TEMPLATE, chat, client_of, events, folder_of

from coterie.infer.config import EngineConfig
from coterie.infer.engine import Engine
from coterie.models.tokenizer import Tokenizer, train_bpe
from coterie.serve.tool_forms import HERMES, LLAMA, MISTRAL, Form, form_of
from coterie.serve.tools import MOST_HELD, Calls, whole

SHOWN = {
    HERMES: '<tool_call></tool_call>:\\n<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args>}',
    MISTRAL: "{{ '[TOOL_CALLS][' }}{{ call.function | tojson }}{{ ']' }}",
    LLAMA: 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.',
}
ONE = '{"name": "f", "arguments": {"a": [1, "}<\\"]"], "b": {"é": null}}}'
TWO = '{"name":"g","arguments":{}}'
OTHER_ORDER = '{"parameters": {"x": 1}, "id": "123456789", "name": "f"}'
F, G = ("f", {"a": [1, '}<"]'], "b": {"é": None}}), ("g", {})
TEXTS: list[tuple[Form, str, str, list[tuple[str, Any]]]] = [
    (HERMES, f"<tool_call>\n{ONE}\n</tool_call>", "", [F]),
    (HERMES, f"Well. <tool_call>{TWO}</tool_call>\n<tool_call>{ONE}</tool_call>\n", "Well.", [G, F]),
    (HERMES, f"<tool_call>{OTHER_ORDER}</tool_call> done", " done", [("f", {"x": 1})]),
    (HERMES, "a <b> <tool_ca", "a <b> <tool_ca", []),
    (HERMES, f"<tool_call>no</tool_call> <tool_call>{TWO}</tool_call>", "<tool_call>no</tool_call>", [G]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1,}}</tool_call>', None, []),
    (HERMES, '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>', None, []),
    (HERMES, '<tool_call>{"name": "f", "arguments": "text"}</tool_call>', None, []),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', None, []),
    (HERMES, '<tool_call>{"name": "f", "argum', None, []),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "cut', None, []),
    (HERMES, f"<tool_call>\n{ONE}\n</tool", "", [F]),
    (MISTRAL, f"[TOOL_CALLS][{ONE}, {TWO}]", "", [F, G]),
    (MISTRAL, f"[TOOL_CALLS] [{OTHER_ORDER}]", "", [("f", {"x": 1})]),
    (MISTRAL, f'[TOOL_CALLS][{TWO[:-1]}, "id": "abc"}}, 5', " 5", [G]),
    (MISTRAL, "[TOOL_CALLS]{}", None, []),
    (LLAMA, f"\n{ONE}; {TWO}", "", [F, G]),
    (LLAMA, f"{OTHER_ORDER}\n{TWO}", "", [("f", {"x": 1}), G]),
    (LLAMA, f"Here: {TWO}", None, []),
    (LLAMA, '{"a": 1} ', None, []),
    (LLAMA, "{[" * 40, None, []),
]
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "g"}},
]


def _pairs(calls: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


def _found(form: Form, pieces: list[str], most: int = 128) -> list[Any]:
    calls = Calls(form, {"f", "g"}, most)
    return [event for piece in pieces for event in calls.push(piece)] + calls.finish()


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(TEXTS), st.sets(st.integers(0, 120)))
def test_a_text_says_the_same_however_it_is_cut(case: tuple[Form, str, str | None, Any], cuts: set[int]) -> None:
    form, text, content, calls = case
    ends = [*sorted(cuts), len(text)]
    found = _found(form, [text[a:b] for a, b in zip([0, *ends], ends, strict=False)])
    assert "".join(event.raw for event in found) == text
    said, made = whole(found)
    assert said == (text if content is None else content)
    assert _pairs(made) == calls
    told: dict[int, str] = {}
    for event in found:
        if event.call is not None:
            told[event.call] = told.get(event.call, "") + event.arguments
    if calls:
        assert [json.loads(one) for one in told.values()] == [arguments for _, arguments in calls]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([HERMES, MISTRAL, LLAMA]), st.lists(st.sampled_from([*' \n{}[],;:"\\', ONE, TWO, '"name"', "f",
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", '{"name": "f", "arguments": {'])))  # fmt: skip
def test_nothing_is_lost_of_any_text(form: Form, parts: list[str]) -> None:
    whole_, by_char = "".join(parts), _found(form, list("".join(parts)))
    assert "".join(event.raw for event in by_char) == whole_
    assert whole(by_char)[0] == whole(_found(form, [whole_]))[0]
    assert [e.name for e in by_char if e.name] == [e.name for e in _found(form, parts) if e.name]


def test_what_never_ends_is_not_held_for_ever() -> None:
    calls = Calls(HERMES, {"f"})
    told = [len(event.content) for _ in range(40) for event in calls.push('<tool_call>{"a": "' + "a" * 4096)]
    assert sum(told) > MOST_HELD
    assert len(calls._held) <= MOST_HELD + 4200
    assert Calls(HERMES, {"f"}).push(" " * 5000)
    many = _found(LLAMA, [";".join([TWO] * 200)])
    assert len(whole(many)[1]) == 128
    assert _pairs(whole(_found(HERMES, [f"<tool_call>{TWO}</tool_call>"] * 3, most=1))[1]) == [G]


@pytest.mark.parametrize("form", SHOWN)
def test_the_template_shows_the_form(form: Form) -> None:
    assert form_of(SHOWN[form]) == form
    for unknown in (TEMPLATE, "<tool_call>\n<function=f>", "[TOOL_CALLS]f[ARGS]{}"):
        assert form_of(unknown) is None


def _with_specials() -> Tokenizer:
    inner = train_bpe([json.dumps(TOOLS) * 4, "the cat sat on the mat"], 280)._inner
    inner.add_special_tokens(["[TOOL_CALLS]"])
    return Tokenizer(inner)


def _folder(path: Path, form: Form, template: str = TEMPLATE) -> Path:
    return folder_of(path, template + "{#" + SHOWN[form] + "#}")


def _answer(client: Any, stream: bool, **body: Any) -> tuple[str | None, list[tuple[str, Any]], str]:
    """Content, calls and how it ended, of either kind of answer."""
    told = chat(client, stream=stream, **{"tools": TOOLS, **body})
    assert told.status_code == 200, told.text
    if not stream:
        choice = told.json()["choices"][0]
        message = choice["message"]
        assert all(len(call["id"]) == 9 for call in message.get("tool_calls", ()))
        return message["content"], _pairs(message.get("tool_calls", [])), choice["finish_reason"]
    choices = [choice for chunk in events(told.text) for choice in chunk["choices"]]
    content, calls = "", dict[int, list[str]]()
    for delta in (choice["delta"] for choice in choices):
        content += delta.get("content", "")
        for piece in delta.get("tool_calls", ()):
            if "id" in piece:
                assert piece["index"] not in calls
                calls[piece["index"]] = [piece["function"]["name"], ""]
            calls[piece["index"]][1] += piece["function"]["arguments"]
    assert list(calls) == list(range(len(calls)))
    return content or None, [(name, json.loads(text)) for name, text in calls.values()], choices[-1]["finish_reason"]


@pytest.mark.parametrize("form", SHOWN)
@pytest.mark.parametrize("stream", [False, True])
def test_answers_have_calls(tmp_path: Path, form: Form, stream: bool) -> None:
    served = FakeEngine(_with_specials(), max_model_len=2048)
    text = next(text for one, text, _, calls in TEXTS if one == form and len(calls) == 2 and F in calls)
    served.script = served.tokenizer.encode(text)
    with client_of(served, _folder(tmp_path, form)) as client:
        content, calls, finish = _answer(client, stream)
        assert (content, finish) == ("Well." if form == HERMES else None, "tool_calls")
        assert sorted(calls) == sorted([F, G])
        assert _answer(client, stream, parallel_tool_calls=False)[1] == calls[:1]
        assert not _answer(client, stream, tool_choice="none")[1]
        assert _answer(client, stream, max_tokens=3)[1:] == ([], "length")
        served.script = served.tokenizer.encode("no call")
        assert _answer(client, stream) == ("no call", [], "stop")


def test_arguments_are_streamed_as_they_come(tmp_path: Path) -> None:
    served = FakeEngine(_with_specials(), max_model_len=2048)
    served.script = served.tokenizer.encode(f"<tool_call>{ONE}</tool_call>")
    with client_of(served, _folder(tmp_path, HERMES)) as client:
        chunks = events(chat(client, tools=TOOLS, stream=True).text)
    deltas = [piece for c in chunks for choice in c["choices"] for piece in choice["delta"].get("tool_calls", ())]
    assert len(deltas) > 5
    assert [delta.get("type") for delta in deltas] == ["function"] + [None] * (len(deltas) - 1)


SCHEMA = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/word"}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
    "$defs": {"word": {"enum": ["cat", "mat"]}},
}
FORCED = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}, *TOOLS[1:]]


@pytest.mark.parametrize("form", SHOWN)
def test_a_random_model_is_forced_to_call(tmp_path: Path, form: Form) -> None:
    pytest.importorskip("llguidance")
    served = Engine(real_engine().model, _with_specials(), EngineConfig(budget=64, max_model_len=160))
    own: dict[str, Any] = {"tools": FORCED, "temperature": 1.5, "max_tokens": 100}
    named = {"type": "function", "function": {"name": "f"}}
    short = _folder(tmp_path, form, "{{ messages[0].content }}")
    with client_of(served, short, model_name="fake") as client:  # type: ignore[arg-type]
        for seed in range(4):
            for stream in (False, True):
                told = {**own, "seed": seed, "tool_choice": named}
                content, calls, finish = _answer(client, stream, **told)
                assert (content, finish) == (None, "tool_calls")
                assert [name for name, _ in calls] == ["f"]
                assert calls[0][1]["a"] in ("cat", "mat")
                told = {**own, "seed": seed, "tool_choice": "required", "parallel_tool_calls": False}
                assert len(_answer(client, stream, **told)[1]) == 1
        content, calls, finish = _answer(client, False, **{**own, "tool_choice": "required", "max_tokens": 9})
        assert (bool(content), calls, finish) == (True, [], "length")  # cut off, it is no call
    assert served.core.pool.used == 0


def test_what_cannot_be_forced_is_refused(tmp_path: Path) -> None:
    named = {"type": "function", "function": {"name": "nobody"}}
    array = [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": TOOLS, "tool_choice": named}, "not among the tools"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice: give"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "give one"),
        ({"tools": array, "tool_choice": "required"}, "schema of no object"),
        ({"tools": TOOLS + TOOLS}, "two functions of one name"),
    ]
    with client_of(FakeEngine(), _folder(tmp_path / "a", HERMES)) as client:
        for body, words in cases:
            told = chat(client, **body)
            assert (told.status_code, words in told.json()["error"]["message"]) == (400, True), told.text
    with client_of(FakeEngine(), folder_of(tmp_path / "b")) as client:
        told = chat(client, tools=TOOLS, tool_choice="required")
        assert told.json()["error"]["code"] == "unsupported_parameter"
