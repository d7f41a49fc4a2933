"""A client of servers that stream, made to cost little: it often shares two cores with the server that it measures.

While the load runs it only notes what came and when; everything is read afterwards. A connection carries one request,
since some servers lose requests on connections that are used again.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from .serving_metrics import Trace

MOST_BYTES = 64 << 20
"""Of one answer."""
Pieces = list[tuple[float, bytes]]
"""What came and when, in order."""


@dataclass(slots=True)
class Exchange:
    """One request and the bytes that answered it."""

    sent: float = 0.0
    """When the connection was asked for."""
    pieces: Pieces = field(default_factory=list)
    error: str = ""
    detail: str = ""


class _Wire(asyncio.Protocol):
    """Sends the request, keeps what comes, and is done when the answer is whole or the other side hangs up."""

    def __init__(self, request: bytes, exchange: Exchange, done: asyncio.Future[None]) -> None:
        self._request, self._exchange, self._done = request, exchange, done
        self._size, self._tail, self._whole = 0, b"", -1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._exchange.pieces.append((time.perf_counter(), data))
        self._size += len(data)
        if self._whole < 0:
            self._whole = _expected(b"".join(piece for _, piece in self._exchange.pieces))
        self._tail = (self._tail + data)[-7:]
        if self._size > MOST_BYTES:
            self._exchange.error = "answer too long"
        if self._exchange.error or 0 < self._whole <= self._size or self._tail == b"\r\n0\r\n\r\n":
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self._exchange.error, self._exchange.detail = "connection lost", repr(exc)
        if not self._done.done():
            self._done.set_result(None)


def _expected(data: bytes) -> int:
    """Bytes of the whole answer; 0: nobody knows, -1: its head is not there yet."""
    head, found, _ = data.partition(b"\r\n\r\n")
    if not found:
        return -1
    length = _headers(head).get(b"content-length", b"")
    return len(head) + 4 + int(length) if length.isdigit() and len(length) < 12 else 0


def _headers(head: bytes) -> dict[bytes, bytes]:
    lines = (line.partition(b":") for line in head.split(b"\r\n")[1:])
    return {name.strip().lower(): value.strip() for name, _, value in lines}


class Client:
    """Sends to one server. url: its address; key: for the Authorization header, or empty."""

    def __init__(self, url: str, key: str = "", timeout: float = 300.0) -> None:
        parts = urlsplit(url)
        self._host, self._prefix = parts.hostname or "", parts.path.rstrip("/").removesuffix("/v1")
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._ssl else 80)
        self._timeout = timeout
        name = f"[{self._host}]" if ":" in self._host else self._host
        self._head = f"Host: {name}:{self._port}\r\nConnection: close\r\nContent-Type: application/json\r\n"
        self._head += f"Authorization: Bearer {key}\r\n" if key else ""

    async def exchange(self, method: str, path: str, body: bytes = b"") -> Exchange:
        """Sends one request and waits for the end of the answer. What goes wrong is in `error`."""
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._head}Content-Length: {len(body)}\r\n\r\n"
        loop, exchange = asyncio.get_running_loop(), Exchange(sent=time.perf_counter())
        done: asyncio.Future[None] = loop.create_future()
        transport = None
        try:
            async with asyncio.timeout(self._timeout):
                wire = _Wire(head.encode() + body, exchange, done)
                transport, _ = await loop.create_connection(lambda: wire, self._host, self._port, ssl=self._ssl)
                await done
        except TimeoutError:
            exchange.error, exchange.detail = "timeout", f"no end after {self._timeout:g} s"
        except OSError as error:
            exchange.error, exchange.detail = "no connection", str(error)
        finally:
            if transport is not None:
                transport.abort()
        return exchange


@dataclass(frozen=True, slots=True)
class Reply:
    """An HTTP answer. lines: (when it was there, without its end) of the body's lines. whole: the body ended as
    HTTP says that it ends."""

    status: int
    lines: list[tuple[float, bytes]]
    whole: bool

    @property
    def text(self) -> str:
        return b"\n".join(line for _, line in self.lines).decode("utf-8", "replace")


def read(pieces: Pieces) -> Reply | None:
    """The answer in these bytes, however they were cut; None where they do not begin as HTTP."""
    raw = b"".join(data for _, data in pieces)
    head, found, _ = raw.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    if not found or not raw.startswith(b"HTTP/1.") or len(words) < 2 or not words[1][:3].isdigit():
        return None
    start, headers = len(head) + 4, _headers(head)
    if headers.get(b"transfer-encoding", b"").lower() == b"chunked":
        spans, whole = _chunks(raw, start)
    else:
        spans, whole = [(start, len(raw))], _expected(raw) in (0, len(raw))
    return Reply(int(words[1][:3]), list(_lines(raw, spans, pieces)), whole)


def _chunks(raw: bytes, at: int) -> tuple[list[tuple[int, int]], bool]:
    """Where in `raw` the chunks' contents lie, and whether the last chunk came."""
    spans: list[tuple[int, int]] = []
    while (end := raw.find(b"\r\n", at)) >= 0:
        try:
            size = int(raw[at:end].partition(b";")[0], 16)
        except ValueError:
            return spans, False
        if size <= 0:
            return spans, size == 0 and raw.endswith(b"\r\n\r\n")
        spans.append((end + 2, min(end + 2 + size, len(raw))))
        at = end + 2 + size + 2
    return spans, False


def _lines(raw: bytes, spans: list[tuple[int, int]], pieces: Pieces) -> Iterator[tuple[float, bytes]]:
    """The lines of the body, each with the time at which its last byte came."""
    ends: list[int] = []
    for _, data in pieces:
        ends.append((ends[-1] if ends else 0) + len(data))
    line = b""
    for start, stop in spans:
        while start < stop:
            cut = raw.find(b"\n", start, stop)
            end = stop if cut < 0 else cut + 1
            line += raw[start:end]
            start = end
            if cut >= 0:
                yield pieces[bisect_right(ends, end - 1)][0], line.rstrip(b"\r\n")
                line = b""
    if line:
        yield pieces[-1][0], line


def trace(exchange: Exchange, *, prompt_tokens: int, wanted: int, due: float, exact: bool = True) -> Trace:
    """What one streamed completion was like. exact: fewer tokens than wanted are a failure."""
    known: dict[str, Any] = {"wanted": wanted, "due": due, "sent": exchange.sent}
    reply = read(exchange.pieces)
    if exchange.error or reply is None or reply.status != 200:
        error, detail = exchange.error or "no HTTP answer", exchange.detail
        if reply is not None and not exchange.error:
            error, detail = f"HTTP {reply.status}", reply.text[:300]
        return Trace(prompt_tokens, **known, error=error, detail=detail)
    chunks: list[tuple[float, int]] = []
    usage: dict[str, Any] = {}
    ended = error = detail = ""
    for when, event in _events(reply):
        if event is None:
            ended = "yes"
        elif not isinstance(event, dict):
            error, detail = "not JSON", str(event)[:300]
        elif event.get("error"):
            error, detail = "error in the stream", str(event["error"])[:300]
        else:
            usage = event.get("usage") or usage
            count = _new_tokens(event)
            chunks += [(when, count)] if count else []
    tokens = usage.get("completion_tokens") or sum(count for _, count in chunks)
    if not error:
        if not ended or not reply.whole:
            error = "cut stream"
        elif not chunks:
            error = "no tokens"
        elif tokens > wanted or (exact and tokens < wanted):
            error, detail = "wrong length", f"wanted {wanted} tokens, got {tokens}"
    prompt_tokens = usage.get("prompt_tokens") or prompt_tokens
    return Trace(prompt_tokens, **known, chunks=tuple(chunks), tokens=tokens, error=error, detail=detail)


def _events(reply: Reply) -> Iterator[tuple[float, Any]]:
    """The events of a stream; None for its end, a string for what is not JSON."""
    for when, line in reply.lines:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            yield when, None
            return
        try:
            yield when, json.loads(data)
        except ValueError:
            yield when, data.decode("utf-8", "replace")


def _new_tokens(event: dict[str, Any]) -> int:
    """As many as the server names ids; else 1 where there is text."""
    choices = event.get("choices") or [{}]
    ids = choices[0].get("token_ids")
    if ids is not None:
        return len(ids)
    return int(bool(choices[0].get("text") or (choices[0].get("delta") or {}).get("content")))
