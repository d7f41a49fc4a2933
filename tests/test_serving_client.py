"""The client against small servers that answer well, badly, slowly and not at all."""

import asyncio
import json
import threading
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.benchmarks import serving
from coterie.benchmarks.rows import read as read_rows
from coterie.benchmarks.serving_client import Client, read, trace
from coterie.benchmarks.serving_load import Load

uvicorn = pytest.importorskip("uvicorn", reason="the server of these tests is uvicorn's")


class Server:
    """Streams `max_tokens` tokens; what a request's `do` field says goes wrong does."""

    def __init__(self) -> None:
        self.seen: list[dict] = []
        self.keys: list[bytes] = []
        self.running = self.most = 0
        self.strict = False

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return
        self.keys.append(dict(scope["headers"]).get(b"authorization", b""))
        if scope["path"] == "/v1/models":
            await answer(send, 200, {"data": [{"id": "tiny"}]})
            return
        body = json.loads((await receive())["body"])
        self.seen.append(body)
        if self.strict and "return_token_ids" in body:
            await answer(send, 400, {"error": {"message": "return_token_ids is not known"}})
            return
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.stream(body, send)
        finally:
            self.running -= 1

    async def stream(self, body: dict, send) -> None:
        do = body.get("do", "") if body["max_tokens"] > 2 else ""  # the first request of all is for 2
        if do == "busy":
            await answer(send, 503, {"error": {"message": "no room"}})
            return
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
        )
        count = body["max_tokens"] - (do == "short")
        for number in range(count):
            await asyncio.sleep(0.001 if do != "hang" else 60)
            if do == "cut" and number == 2:
                raise ConnectionResetError
            if do == "refuse" and number == 1:
                await event(send, {"error": {"message": "the model fell over"}})
                return
            choice = {"index": 0, "text": "é" if number else ""}
            if "return_token_ids" in body:
                choice["token_ids"] = [7]
            await event(send, {"choices": [choice]})
        used = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}
        await event(send, {"choices": [], "usage": used})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def event(send, data: dict) -> None:
    line = f"data: {json.dumps(data)}\n\n".encode()
    await send({"type": "http.response.body", "body": line, "more_body": True})


async def answer(send, status: int, data: dict) -> None:
    body = json.dumps(data).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[str, Server]]:
    app = Server()
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", app
    server.should_exit = True
    server.force_exit = True
    thread.join(10)


@pytest.fixture
def server(running) -> tuple[str, Server]:
    running[1].__init__()
    return running


def settings(url: str, **more) -> Load:
    base = {"prompt": "8:2", "new": "5", "concurrency": (), "rate": (), "num": 6, "warmup": 1, "wait": 5.0}
    return Load(url, **(base | more))


def test_a_sweep_end_to_end(server, tmp_path, monkeypatch) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib")
    url, app = server
    monkeypatch.setenv(serving.KEY, "sesame")
    where = {"json": tmp_path / "rows.json", "png": tmp_path / "plot.png"}
    said: list[str] = []
    rows = serving.main(settings(url, concurrency=(1, 3), rate=(200.0,), **where), said.append)
    found = {(row.case, row.metric): row.value for row in rows}
    for case in ("closed c=1", "closed c=3", "poisson r=200"):
        assert found[case, "ok"] == found[case, "sent"] == 6
        wall = found[case, "wall"]
        assert found[case, "out_tok_s"] == pytest.approx(30 / wall)
        assert 0 < found[case, "ttft_p50"] < found[case, "e2e_p50"]
        assert found[case, "effective_2"] in (0, 1) or 0 < found[case, "effective_2"] < 1
        assert found[case, "client_cpu"] > 0
        # Four gaps of a millisecond and more after the first token.
        assert found[case, "tpot_p50"] >= 1
    assert read_rows(where["json"]) == rows
    assert where["png"].read_bytes().startswith(b"\x89PNG")
    assert len(app.seen) == 1 + 1 + 18, "the first answer, a warm-up and three runs"
    assert set(app.keys) == {b"Bearer sesame"}
    assert sum("6/6 ok" in line for line in said) == 3
    assert app.most >= 3


def test_a_closed_loop_has_so_many_on_their_way_and_no_more(server) -> None:
    url, app = server
    serving.main(settings(url, concurrency=(2,), num=10, model="m"), lambda line: None)
    assert app.most == 2


@pytest.mark.parametrize(
    ("do", "named"),
    [
        ("busy", "HTTP 503"),
        ("cut", "cut stream"),
        ("short", "wrong length"),
        ("refuse", "error in the stream"),
        ("hang", "timeout"),
    ],
)
def test_failures_are_named(server, do: str, named: str) -> None:
    url, _ = server
    load = settings(url, concurrency=(3,), num=3, warmup=0, extra=json.dumps({"do": do}), timeout=1.0)
    said: list[str] = []
    rows = serving.main(load, said.append)
    found = {row.metric: row.value for row in rows}
    assert found[f"failed: {named}"] == 3
    assert found["ok"] == found["goodput"] == found["effective_2"] == found["out_tok_s"] == 0
    assert any(named in line for line in said)


def test_a_strict_server_is_asked_without_extensions(server) -> None:
    url, app = server
    app.strict = True
    rows = serving.main(settings(url, concurrency=(1,), num=2), lambda line: None)
    found = {row.metric: row.value for row in rows}
    assert found["ok"] == 2
    assert "return_token_ids" not in app.seen[-1]


def test_no_server_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="no answer within"):
        serving.main(settings("http://127.0.0.1:9", model="m", wait=0.1), lambda line: None)


def raw_server(data: bytes, *, close: bool = True):
    """Answers whatever is asked with `data`, then hangs up or waits."""

    async def handle(reader, writer) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(data)
        if close:
            writer.close()

    return handle


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"220 mail.example ESMTP\r\n\r\n", "no HTTP answer"),
        (b"", "no HTTP answer"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n", "cut stream"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nabc\r\n", "cut stream"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\ndata: {nonsense", "not JSON"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\ndata: [DONE]\n\n", "no tokens"),
    ],
)
def test_what_is_no_completion_is_named(data: bytes, error: str) -> None:
    async def run():
        server = await asyncio.start_server(raw_server(data), "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            return await Client(f"http://127.0.0.1:{port}", timeout=5).exchange("POST", "/v1/completions", b"{}")

    seen = trace(asyncio.run(run()), prompt_tokens=1, wanted=1, due=0.0)
    assert seen.error == error


def test_an_answer_ends_where_its_length_says_even_if_the_server_holds_the_line() -> None:
    data = b'HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n{"data": null}'

    async def run():
        server = await asyncio.start_server(raw_server(data, close=False), "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            return await Client(f"http://127.0.0.1:{port}/v1", timeout=5).exchange("GET", "/v1/models")

    exchange = asyncio.run(run())
    reply = read(exchange.pieces)
    assert not exchange.error
    assert reply is not None
    assert (reply.status, reply.text, reply.whole) == (200, '{"data": null}', True)


TOKENS = [json.dumps({"choices": [{"text": f"w{k}", "token_ids": [k] * (1 + k % 3)}]}) for k in range(6)]
EVENTS = [f"data: {token}\n\n".encode() for token in TOKENS]
STREAM = b"".join(b"%x\r\n%s\r\n" % (len(line), line) for line in [*EVENTS, b"data: [DONE]\n\n"]) + b"0\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + STREAM


@given(st.lists(st.integers(1, len(ANSWER) - 1), max_size=40))
def test_an_answer_reads_the_same_however_it_is_cut(cuts: list[int]) -> None:
    ends = [0, *sorted(set(cuts)), len(ANSWER)]
    pieces = [(float(b), ANSWER[a:b]) for a, b in pairwise(ends)]  # each comes at its last byte
    reply = read(pieces)
    assert reply is not None
    assert reply.whole
    lines = [(when, line) for when, line in reply.lines if line]
    assert [line for _, line in lines] == [*(line.strip() for line in EVENTS), b"data: [DONE]"]
    for when, line in lines:
        end = ANSWER.index(line) + len(line) + 1  # its newline came with it, or later
        assert when == min(e for e in ends if e >= end)


@given(st.integers(0, len(ANSWER) - 1))
def test_a_cut_answer_is_never_taken_for_a_whole_one(length: int) -> None:
    reply = read([(0.0, ANSWER[:length])])
    assert reply is None or not reply.whole
