"""Connections of uvicorn with limits that it does not have: their number, and the time that a client may take."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError, encode
from .settings import ServerSettings


def _raw(error: ApiError) -> bytes:
    body = encode(error.body)
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    lines = [f"HTTP/1.1 {error.status} ", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode() + body


class Connection(H11Protocol):
    """One too many is told so and closed. One whose headers do not arrive in time is closed, and so is one that does
    not read what it asked for, which then counts as disconnected."""

    settings: ServerSettings
    _headers_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.settings.max_connections:
            after = self.settings.retry_after_s
            message = "too many connections are open"
            transport.write(_raw(ApiError(503, message, code="overloaded", retry_after=after, close=True)))
            transport.close()
            return
        self._await_headers()

    def _await_headers(self) -> None:
        if self._headers_timer is None:
            self._headers_timer = self.loop.call_later(self.settings.header_timeout_s, self._abort)

    def _abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        done = self.cycle is None or self.cycle.response_complete
        if done and not self.transport.is_closing():
            self._await_headers()  # the beginning of another request

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._headers_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.settings.write_timeout_s, self._abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()

    def send_400_response(self, msg: str) -> None:
        cast("Any", self.transport).write(_raw(ApiError(400, "this is no HTTP request", close=True)))
        self.transport.close()


def connection_class(settings: ServerSettings) -> type[H11Protocol]:
    """The class of a server's connections; uvicorn makes one for each."""
    return type("Connection", (Connection,), {"settings": settings})
