"""The page: what is served, with which headers, and what a visitor sees in a headless Chromium."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from browser import Browser, find_browser
from fake_engine import EXPERTS, LAYERS, TOP_K, FakeEngine
from serving import KEY, Running, client_of, folder_of

from coterie.serve.page import FOLDER, TYPES, describe


def fake(**settings: float) -> FakeEngine:
    """An engine whose model has a shape."""
    engine = FakeEngine(**settings)  # pyright: ignore[reportArgumentType]
    config = SimpleNamespace(experts=(EXPERTS,) * LAYERS, moe=SimpleNamespace(top_k=TOP_K))
    engine.model = SimpleNamespace(config=config)
    return engine


def test_the_files_are_served_with_a_strict_policy_and_nothing_else_is() -> None:
    with client_of(fake()) as client:
        index = client.get("/")
        assert index.headers["content-type"] == "text/html; charset=utf-8"
        for name, kind in TYPES.items():
            found = client.get(f"/page/{name}")
            assert found.content == (FOLDER / name).read_bytes()
            assert found.headers["content-type"] == kind
            policy = found.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert found.headers["x-content-type-options"] == "nosniff"
        for name in ("..%2fpage.py", "%2e%2e/page.py", "../page.py", "style.css/..", "nothing.js", "about.json.js"):
            assert client.get(f"/page/{name}").status_code == 404


def test_all_files_of_the_folder_are_served_and_small() -> None:
    assert {file.name for file in FOLDER.iterdir()} == set(TYPES)
    for file in FOLDER.iterdir():
        assert file.read_text().count("\n") <= 330, file.name


def test_the_page_asks_nobody_else_and_makes_no_markup_of_text() -> None:
    for file in FOLDER.iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//[a-z0-9-]+\.[a-z]", text), file.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|\son[a-z]+=|style=", text)


def test_the_page_knows_the_model_as_far_as_it_can() -> None:
    assert describe(None) == {}
    assert describe(FakeEngine(), chat=False) == {"chat": False, "max_model_len": 256}  # pyright: ignore
    told = describe(fake(), chat=True)  # pyright: ignore[reportArgumentType]
    assert told == {"chat": True, "max_model_len": 256, "experts": [EXPERTS] * LAYERS, "top_k": TOP_K}


def test_the_page_needs_a_key_where_keys_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COTERIE_API_KEYS", KEY)
    with client_of(fake()) as client:
        for path in ("/", "/page/main.js", "/page/about.json"):
            refused = client.get(path)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"].startswith("Basic")  # so that a browser asks
            assert client.get(path, auth=("anyone", KEY)).status_code == 200


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium on this machine")
    with Browser(program, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


TOKENS = "document.querySelectorAll('.token').length"
DONE = "!document.getElementById('send').hidden && document.querySelector('.facts')?.textContent.includes('·')"


def lit(browser: Browser) -> int:
    """Pixels of the grid in the colour of the last token's experts."""
    return browser.run(
        "(() => { const g = document.getElementById('grid');"
        "const d = g.getContext('2d').getImageData(0, 0, g.width, g.height).data; let n = 0;"
        "for (let i = 0; i < d.length; i += 4) n += d[i] === 224 && d[i + 1] === 123 && d[i + 2] === 0;"
        "return n; })()"
    )


def ask(browser: Browser, text: str) -> None:
    browser.click("#prompt")
    browser.type(text)
    browser.press("Enter", 13, "\r")


def choose(browser: Browser, **settings: object) -> None:
    browser.run("document.getElementById('settings').open = true")
    for name, value in settings.items():
        browser.run(f"document.getElementById('{name}').value = {json.dumps(str(value))}")


@pytest.mark.dist
def test_an_answer_streams_and_its_tokens_show_their_experts(browser: Browser, tmp_path: Path) -> None:
    engine = fake(step_s=0.01)
    with Running(engine, folder_of(tmp_path / "model")) as server:
        browser.screen(1200, 800, still=True)
        browser.open(server.url, "document.getElementById('model').textContent === 'fake'")
        assert "4 experts in each of 2 layers" in browser.run("document.getElementById('shape').textContent")
        choose(browser, max_tokens=12, temperature=0, seed=3)
        ask(browser, "<b>the cat</b>")
        browser.wait(DONE)
        assert browser.run("document.querySelector('.turn.user .text').textContent") == "<b>the cat</b>"
        assert browser.run("document.querySelectorAll('.turn b').length") == 0
        assert "12 tokens" in browser.run("document.querySelector('.answer .facts').textContent")
        (_, _, params, _) = engine.submitted[-1]
        assert (params.max_tokens, params.temperature, params.seed, params.top_p) == (12, 0, 3, 1)
        browser.wait(f"{TOKENS} > 5")
        assert lit(browser) > 100

        browser.run("document.querySelector('.answer .text').focus()")
        browser.press("ArrowRight", 39)
        browser.press("ArrowRight", 39)
        token = engine.words[(len(engine.submitted[-1][1]) + 1 + 3) % len(engine.words)]
        shown = browser.run("[...document.querySelectorAll('#token-layers li')].map((item) => item.textContent)")
        layers = [sorted((token + layer + k) % EXPERTS for k in range(TOP_K)) for layer in range(LAYERS)]
        assert shown == [f"Layer {i}: {a}, {b}" for i, (a, b) in enumerate(layers)]
        assert browser.run("document.querySelector('.chosen').dataset.index") == "1"
        loads = browser.run("[...document.querySelectorAll('#loads figcaption')].map((c) => c.textContent)")
        assert len(loads) == LAYERS
        assert all("of 4" in load for load in loads)

        ask(browser, "and a dog")  # the conversation goes on with what was said
        browser.wait("document.querySelectorAll('.answer:not(.working)').length === 2")
        assert len(engine.submitted[-1][1]) > len(engine.submitted[0][1]) + 12
        assert browser.complaints == []


@pytest.mark.dist
def test_stop_ends_the_request_in_the_engine(browser: Browser, tmp_path: Path) -> None:
    engine = fake(step_s=0.02)
    with Running(engine, folder_of(tmp_path / "model", None)) as server:
        browser.open(server.url, "document.getElementById('model').textContent === 'fake'")
        assert browser.run("document.getElementById('chat').disabled")  # the model has no template
        assert not browser.run("document.getElementById('note').hidden")
        choose(browser, max_tokens=200)
        ask(browser, "the cat")
        browser.wait(f"{TOKENS} > 3")
        browser.click("#stop")
        browser.wait(DONE)
        assert "stopped" in browser.run("document.querySelector('.answer .facts').textContent")
        for _ in range(100):
            if engine.idle:
                break
            browser.run("new Promise((done) => setTimeout(done, 20))")
        assert engine.idle
        assert len(engine.aborted) == 1
        assert 3 < browser.run(TOKENS) < 200


@pytest.mark.dist
def test_a_refusal_is_shown_and_the_text_is_kept(browser: Browser, tmp_path: Path) -> None:
    engine = fake()
    with Running(engine, folder_of(tmp_path / "model", None)) as server:
        browser.open(server.url, "document.getElementById('model').textContent === 'fake'")
        choose(browser, max_tokens=250)
        ask(browser, "the cat " * 20)
        browser.wait("!document.getElementById('problem').hidden")
        assert "256" in browser.run("document.getElementById('problem').textContent")
        assert browser.run("document.getElementById('prompt').value").startswith("the cat")
        assert browser.run("document.querySelectorAll('.turn').length") == 0
        choose(browser, max_tokens=1, temperature=9)
        browser.run("document.getElementById('form').requestSubmit()")
        assert "Temperature" in browser.wait("document.getElementById('problem').textContent")
