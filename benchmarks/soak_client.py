"""A client that may misbehave: it sends what it likes, reads as much as it likes, and goes away when it likes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import time
from dataclasses import dataclass, field
from typing import Any

_SAMPLE = re.compile(r"^([a-zA-Z_:]+)(?:\{(.*)\})? (\S+)$")


@dataclass
class Reply:
    """What came back.

    Attributes:
        status: of HTTP; 0: the connection ended before.
        seconds: from the connection's beginning to the last byte.
        whole: the body came to its end.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    seconds: float = 0.0
    whole: bool = False

    def json(self) -> dict[str, Any]:
        return json.loads(self.body)

    def events(self) -> list[dict[str, Any]]:
        """The chunks of a stream that came whole; ValueError where it did not."""
        lines = [line[6:] for line in self.body.decode().split("\n") if line.startswith("data: ")]
        if not lines or lines[-1] != "[DONE]":
            raise ValueError("the stream has no end")
        return [json.loads(line) for line in lines[:-1]]


@dataclass(frozen=True)
class Rudeness:
    """How a client breaks off.

    Attributes:
        send: this share of the body is sent, and then the connection is cut.
        read: so many bytes of the answer are read, and then it is cut.
        after_s: seconds after which it is cut in any case.
    """

    send: float = 1.0
    read: int | None = None
    after_s: float | None = None

    @classmethod
    def draw(cls, luck: random.Random) -> Rudeness:
        """One at random, so that cuts fall into the queue, the prompt, the answer and its end."""
        kind = luck.randrange(4)
        if kind == 0:
            return cls(send=luck.random())
        if kind == 1:
            return cls(after_s=luck.uniform(0.0, 0.05))
        return cls(read=luck.choice((0, 100, 400, 1500, 6000)))


async def ask(
    port: int,
    method: str,
    path: str,
    body: bytes = b"",
    *,
    rude: Rudeness | None = None,
    timeout_s: float = 120.0,
) -> Reply:
    """One request on a connection of its own. A refused or broken connection is a Reply of status 0 or not whole."""
    reply, started = Reply(), time.perf_counter()
    patience = timeout_s if rude is None or rude.after_s is None else rude.after_s
    with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError, ValueError):
        async with asyncio.timeout(patience):
            await _exchange(port, method, path, body, rude or Rudeness(), reply)
    reply.seconds = time.perf_counter() - started
    return reply


async def _exchange(port: int, method: str, path: str, body: bytes, rude: Rudeness, reply: Reply) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n"
        if body:
            head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        writer.write(head.encode() + b"\r\n" + body[: int(len(body) * rude.send)])
        await writer.drain()
        if rude.send == 1.0:
            await _read(reader, reply, rude.read)
    finally:
        # No goodbye: a reset is what a killed client leaves behind.
        if rude != Rudeness():
            writer.transport.abort()
        writer.close()


async def _read(reader: asyncio.StreamReader, reply: Reply, most: int | None) -> None:
    if most == 0:
        return
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    reply.status = int(head[0].split(" ")[1])
    pairs = (line.partition(":") for line in head[1:] if line)
    reply.headers = {name.lower(): value.strip() for name, _, value in pairs}
    chunked = reply.headers.get("transfer-encoding") == "chunked"
    length = int(reply.headers.get("content-length", 0))
    while most is None or len(reply.body) < most:
        if chunked:
            size = int((await reader.readline()) or b"x", 16)
            reply.body += (await reader.readexactly(size + 2))[:-2]
            reply.whole = size == 0
        else:
            reply.body += await reader.readexactly(length)
            reply.whole = True
        if reply.whole:
            return


def samples(text: str) -> dict[str, float]:
    """Prometheus' text as name -> value, summed over the labels."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if match := _SAMPLE.match(line):
            found[match[1]] = found.get(match[1], 0.0) + float(match[3])
    return found
