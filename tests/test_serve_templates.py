"""Chat templates: what they are told, and what a hostile one cannot do."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from serving import TEMPLATE, chat, client_of, folder_of

from coterie.serve.chat import rendered
from coterie.serve.chat_protocol import ChatRequest
from coterie.serve.errors import ApiError
from coterie.serve.settings import KEYS_VARIABLE, ServerSettings
from coterie.serve.templates import load_templates

USER = [{"role": "user", "content": "a <b> é"}]


def _render(folder: Path, values: dict[str, Any] | None = None, **settings: Any) -> str:
    async def run() -> str:
        templates = load_templates(folder, ServerSettings(**settings))
        try:
            return await templates.render(values or {"messages": USER, "tools": None})
        finally:
            await templates.close()

    return asyncio.run(run())


def test_text_tokens_and_tools(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "{{ bos_token }}" + TEMPLATE, bos_token={"content": "<s>"}, eos_token="</s>")
    assert _render(folder) == "<s><user>a <b> é\n<assistant>"
    tools = [{"type": "function", "function": {"name": "f", "description": "<é>"}}]
    assert f"<tools>{json.dumps(tools, ensure_ascii=False)}\n" in _render(folder, {"messages": USER, "tools": tools})


def test_where_templates_come_from(tmp_path: Path) -> None:
    one = folder_of(tmp_path / "one", None, chat_template="one {{ eos_token }}", eos_token="E")
    assert _render(one) == "one E"
    both = folder_of(tmp_path / "both", "file", chat_template="config")
    assert _render(both) == "file"
    named = [{"name": "tool_use", "template": "with"}, {"name": "default", "template": "without"}]
    several = folder_of(tmp_path / "several", None, chat_template=named)
    assert _render(several) == "without"
    assert _render(several, {"messages": USER, "tools": [{}]}) == "with"
    with pytest.raises(ApiError, match="no chat template"):
        load_templates(None, ServerSettings()).source(False)
    with pytest.raises(ValueError, match="neither a text nor a list"):
        load_templates(folder_of(tmp_path / "bad", None, chat_template=5), ServerSettings())
    large = folder_of(tmp_path / "large", "a" * (1 << 20) + "a")
    with pytest.raises(ValueError, match="more than"):
        load_templates(large, ServerSettings())
    away = folder_of(tmp_path / "away", None)
    (away / "chat_template.jinja").symlink_to(tmp_path / "both" / "chat_template.jinja")
    with pytest.raises(ValueError, match="outside"):
        load_templates(away, ServerSettings())


def test_the_usual_extensions_of_templates(tmp_path: Path) -> None:
    source = (
        "{%- for i in range(9) -%}{%- if i == 2 -%}{% break %}{%- endif -%}{{ i }}{%- endfor -%}"
        "{% generation %}said{% endgeneration %}{{ strftime_now('%Y')|length }}{{ {'b': 1}|tojson(indent=1) }}"
    )
    assert _render(folder_of(tmp_path, source)) == '01said4{\n "b": 1\n}'


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe"),
        ("{{ self.__init__.__globals__ }}", "unsafe"),
        ("{{ none.x.y }}", "does not take these messages"),
        ("{{ 'a' * 3000000 }}", "over 2000000 characters"),
        ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "over 2000000 characters"),
        ("{{ 'a' * 9000000000 }}", "too much memory"),
        (
            "{% set x = namespace(t='aaaaaaaa') %}{% for i in range(40) %}{% set x.t = x.t ~ x.t %}{% endfor %}",
            "memory|took over",
        ),
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "took over"),
        ("{{ range(999999999)|length }}", "does not take these messages"),
        ("{{ open('/etc/passwd') }}", "undefined"),
        ("{% include '/etc/passwd' %}", "does not take these messages"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "nests too deeply"),
    ],
)
def test_a_template_that_does_harm_is_refused(tmp_path: Path, source: str, words: str) -> None:
    start = time.monotonic()
    with pytest.raises(ApiError, match=words) as caught:
        _render(folder_of(tmp_path, source), template_timeout_s=0.5)
    assert caught.value.status == 400
    assert "/site-packages" not in caught.value.message
    assert time.monotonic() - start < 5


def test_a_damaged_template_is_told_of(tmp_path: Path) -> None:
    with client_of(FakeEngine(), folder_of(tmp_path, "{% if %}")) as client:
        answer = chat(client)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "chat_template")
        assert client.get("/health").status_code == 200


def test_a_killed_process_is_replaced_and_others_are_served(tmp_path: Path) -> None:
    source = "{% if messages[0].content == 'slow' %}{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}"
    folder = folder_of(tmp_path, source + "{% endfor %}{% endif %}a{{ messages|length }}")
    with client_of(FakeEngine(), folder, template_timeout_s=0.3) as client:
        for _ in range(2):
            assert chat(client, "slow", max_tokens=1).status_code == 400
            assert chat(client, "fast", max_tokens=1).status_code == 200
        worker = client.app.state.service.templates._workers["default"]
        os.kill(worker._process.pid, 9)
        codes = [chat(client, "fast", max_tokens=1).status_code for _ in range(3)]
        assert codes[1:] == [200, 200]


def test_the_process_does_not_know_the_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEYS_VARIABLE, "a-key-that-must-not-pass")

    async def environment() -> bytes:
        templates = load_templates(folder_of(tmp_path), ServerSettings())
        await templates.start()
        process = templates._workers["default"]._process
        assert process is not None
        raw = Path(f"/proc/{process.pid}/environ").read_bytes()
        await templates.close()
        return raw

    assert b"must-not-pass" not in asyncio.run(environment())


def test_messages_as_templates_expect_them() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": "d"},
        {"role": "assistant", "tool_calls": [call], "reasoning_content": "r"},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "x"}]},
    ]
    request = ChatRequest.model_validate({"model": "m", "messages": messages})
    told = rendered(request, TEMPLATE)["messages"]
    assert [message["role"] for message in told] == ["system", "assistant", "tool"]
    assert told[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert told[1]["content"] == ""
    assert told[2]["content"] == "x"
    assert rendered(request, "developer")["messages"][0]["role"] == "developer"
