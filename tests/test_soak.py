"""The soak: its client, its judge, and 20 seconds of all of it."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import pytest

from coterie.benchmarks.soak import Soak, main
from coterie.benchmarks.soak_client import Reply, Rudeness, ask, samples
from coterie.benchmarks.soak_load import bad, free, known, make_model


def test_wrong_answers_are_found(tmp_path: Path) -> None:
    make_model(tmp_path / "m")
    cases = known(tmp_path / "m", 1)
    assert {case.kind for case in cases} == {"plain", "stream", "twice", "long", "chat", "seeded", "stop"}
    soak = Soak(0, cases, random.Random(0))
    plain = next(case for case in cases if case.kind == "plain")
    stream = next(case for case in cases if case.kind == "stream")
    bodies = ['{"choices": [{"index": 0, "text": "other", "finish_reason": "length"}]}', "{}", "", "data: [DONE]\n\n"]
    for body in bodies:
        soak._judge(plain, Reply(200, {}, body.encode(), whole=True))
        soak._judge(stream, Reply(200, {}, body.encode(), whole=True))
    assert soak.seen == {"wrong": 8}
    assert len(soak.wrong) == 8


def test_every_bad_request_is_json_or_bytes_and_every_free_one_is_served() -> None:
    luck = random.Random(0)
    assert len({bad(luck).body for _ in range(300)}) > 15
    kinds = {free(luck).kind for _ in range(50)}
    assert kinds == {"sampled", "choice", "schema", "logprobs"}
    assert all(json.loads(free(luck).body)["model"] == "soak" for _ in range(20))


def test_the_client_reads_bodies_of_both_kinds_and_breaks_off() -> None:
    async def serve() -> None:
        seen: list[bytes] = []

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                request = await reader.readuntil(b"\r\n\r\n")
                if b"POST" in request:
                    seen.append(await reader.readexactly(4))
                    writer.write(
                        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
                    )
                else:
                    writer.write(b"HTTP/1.1 429 No\r\ncontent-length: 2\r\nRetry-After: 1\r\n\r\nno")
                await writer.drain()
            except (asyncio.IncompleteReadError, ConnectionError):
                seen.append(b"broken")
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        whole = await ask(port, "POST", "/", b"body")
        assert (whole.status, whole.body, whole.whole) == (200, b"abcde", True)
        refused = await ask(port, "GET", "/")
        assert (refused.status, refused.body, refused.headers["retry-after"]) == (429, b"no", "1")
        cut = await ask(port, "POST", "/", b"body", rude=Rudeness(read=1))
        assert (cut.body, cut.whole) == (b"abc", False)
        assert (await ask(port, "POST", "/", b"body", rude=Rudeness(send=0.5))).status == 0
        await asyncio.sleep(0.1)
        assert seen == [b"body", b"body", b"broken"]
        server.close()
        assert (await ask(port, "GET", "/")).status == 0

    asyncio.run(serve())


def test_samples_are_summed_over_labels() -> None:
    text = '# HELP a b\na{x="1",y="{}"} 2.0\na{x="2",y=" "} 3\nvllm:b_total 1e3\n'
    assert samples(text) == {"a": 5.0, "vllm:b_total": 1000.0}


@pytest.mark.slow
@pytest.mark.dist
def test_a_short_soak_is_clean(tmp_path: Path) -> None:
    rows = {row.metric: row.value for row in main(tmp_path / "soak.json", quick=True)}
    assert rows["right answers"] > 100
    assert rows["clients that broke off"] > 20
    assert rows["bad requests refused"] > 10
    assert rows["preemptions"] > 0
    assert rows["wrong answers"] == rows["failed requests"] == rows["most blocks leaked at a quiet point"] == 0
    assert (tmp_path / "soak.json").exists()
