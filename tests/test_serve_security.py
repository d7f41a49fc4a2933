"""Keys, the names a server is called by, what it says of itself and what it never says."""

from __future__ import annotations

import ast
import base64
import json
import logging
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from serving import KEY, chat, client_of, complete, folder_of

from coterie.serve.app import build
from coterie.serve.security import KeyRing, salt
from coterie.serve.settings import KEYS_VARIABLE, ServerSettings, load_keys

OTHER = "another-key-of-them-2"
ROOT = Path(__file__).resolve().parent.parent


def _bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def _basic(key: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(f"someone:{key}".encode()).decode()}


def test_every_route_but_health_needs_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEYS_VARIABLE, f"{KEY},{OTHER}")
    engine = FakeEngine()
    with client_of(engine) as client:
        paths = {getattr(route, "path", "") for route in client.app.routes} | {"/openapi.json", "/page/main.js", "/x"}
        paths |= {"/", "/metrics", "/v1/models", "/page/about.json", "/page/{file}"}
        assert {"/v1/completions", "/v1/chat/completions", "/health"} <= paths
        for path in paths:
            for method in ("GET", "POST"):
                answer = client.request(method, path.replace("{file}", "main.js"), json={"model": "fake"})
                open_path = path.startswith("/health")
                assert (answer.status_code != 401) == open_path, path
                assert open_path or answer.headers["www-authenticate"].startswith("Basic")
        for bad in ({}, _bearer("x"), _bearer(KEY[:-1]), _bearer(KEY + "a"), _bearer(""), {"authorization": KEY}):
            assert client.get("/v1/models", headers=bad).status_code == 401
        bad_basic = ({"authorization": "Basic !!"}, _basic("x"), {"authorization": "Basic"})
        assert {client.get("/v1/models", headers=bad).status_code for bad in bad_basic} == {401}
        for good in (_bearer(KEY), _bearer(OTHER), _basic(KEY), {"authorization": f"bearer  {KEY} "}):
            assert client.get("/v1/models", headers=good).status_code == 200
        assert not engine.submitted


def test_keys_do_not_share_cached_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEYS_VARIABLE, f"{KEY},{OTHER}")
    engine = FakeEngine()
    with client_of(engine) as client:
        for key in (KEY, OTHER, KEY):
            for own in ({}, {"cache_salt": "s"}):
                client.headers.update(_bearer(key))
                assert complete(client, max_tokens=1, **own).status_code == 200
    salts = [salt for *_, salt in engine.submitted]
    assert len(set(salts)) == 4
    assert salts[:2] == salts[4:]
    assert KEY not in str(salts)
    assert salt("a", None) != salt("", "a")


def test_a_ring_tells_whose_key_it_is_and_keeps_none() -> None:
    ring = KeyRing([KEY, OTHER])
    one, two = (ring.identify(f"Bearer {key}".encode()) for key in (KEY, OTHER))
    assert one is not None
    assert one != two
    assert ring.identify(f"Bearer {KEY}{'a' * 5000}".encode()) is None
    assert KEY not in str(vars(ring))
    assert ring.identify(None) is None
    assert not KeyRing([])


def test_where_keys_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    file = tmp_path / "keys"
    file.write_text(f"# ours\n{KEY}\n\n{OTHER}\n")
    assert load_keys(ServerSettings(keys_file=file)) == [KEY, OTHER]
    monkeypatch.setenv(KEYS_VARIABLE, KEY)
    assert load_keys(ServerSettings(keys_file=file)) == [KEY, OTHER]
    for text in ("short", "has a space in it ok", "ключ-которого-здесь-нет", "\n#\n"):
        file.write_text(text)
        with pytest.raises(ValueError, match="key") as caught:
            load_keys(ServerSettings(keys_file=file))
        assert text.strip() not in str(caught.value) or not text.strip("#\n")
    monkeypatch.setenv(KEYS_VARIABLE, " , ")
    with pytest.raises(ValueError, match="holds no key"):
        load_keys(ServerSettings())
    with pytest.raises(ValueError, match="cannot be read"):
        load_keys(ServerSettings(keys_file=tmp_path / "none"))


@pytest.mark.parametrize(
    ("host", "refused"),
    [("127.0.0.1", False), ("localhost", False), ("::1", False), ("127.1.2.3", False)]
    + [(host, True) for host in ("0.0.0.0", "::", "192.168.1.5", "example.com")],
)
def test_an_open_address_needs_keys(host: str, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    if refused:
        with pytest.raises(ValueError, match="no API key is set"):
            build(FakeEngine(), ServerSettings(host=host))
    else:
        build(FakeEngine(), ServerSettings(host=host))
    build(FakeEngine(), ServerSettings(host=host, open_without_keys=True))
    monkeypatch.setenv(KEYS_VARIABLE, KEY)
    build(FakeEngine(), ServerSettings(host=host))


def test_without_keys_a_page_of_another_name_gets_nothing() -> None:
    with client_of(FakeEngine(), allowed_hosts=("box.local",)) as client:
        for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "[::2]:80"):
            assert client.get("/v1/models", headers={"host": host}).status_code == 421
        for host in ("localhost:8000", "127.0.0.1", "[::1]:8000", "box.local:80", "LOCALHOST"):
            assert client.get("/v1/models", headers={"host": host}).status_code == 200
        answer = client.options("/v1/completions", headers={"origin": "http://evil.example"})
        assert "access-control-allow-origin" not in answer.headers


def test_keys_and_prompts_are_not_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv(KEYS_VARIABLE, KEY)
    secret = "nobody may read this"
    engine = FakeEngine()
    caplog.set_level(logging.DEBUG)
    with client_of(engine, folder_of(tmp_path)) as client:
        client.headers.update(_bearer(KEY))
        for error in (None, RuntimeError(secret), ValueError(f"{secret} in /home/someone")):
            engine.refuse = error
            for stream in (False, True):
                answers = [complete(client, prompt=secret, stream=stream), chat(client, secret, stream=stream)]
                assert all(answer.status_code == (200 if error is None else 500) for answer in answers)
                assert error is None or all(secret not in answer.text for answer in answers)
        complete(client, prompt=[secret], other=secret)
    records = [record.getMessage() + str(record.exc_text) for record in caplog.records if record.name == "coterie"]
    assert any("RuntimeError" in record for record in records)
    assert not any(secret in record or KEY in record for record in records)


def test_errors_can_be_shown(tmp_path: Path) -> None:
    with client_of(FakeEngine(), folder_of(tmp_path)) as client:
        for name in ("a\nb", "\x1b[2J", "\ud800".encode("utf-8", "replace").decode(), "x" * 5000):
            answer = complete(client, **{name: 1})
            message = answer.json()["error"]["message"]
            assert message.isprintable()
            assert len(message) <= 500


def test_no_route_runs_code_or_unpickles() -> None:
    """`test_floors.py` knows pickle, eval and torch.load; here is what else a server must not have."""
    banned = {"marshal", "shelve", "importlib", "runpy", "code", "multiprocessing"}
    for file in [*(ROOT / "serve").glob("*.py"), *(ROOT / "infer").glob("*.py"), *ROOT.glob("cli*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & banned, file.name
            if isinstance(node, ast.keyword):
                assert node.arg not in ("trust_remote_code", "shell"), file.name
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("from_pretrained", "system", "popen"), file.name


def test_the_schema_lists_every_parameter_and_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEYS_VARIABLE, KEY)
    with client_of(FakeEngine()) as client:
        schema = client.get("/openapi.json", headers=_bearer(KEY)).json()
    assert KEY not in json.dumps(schema)
    listed = schema["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "tools", "response_format", "routes"} <= set(listed)
    assert "chat_template" not in listed
