"""Responses: server-sent events, or one JSON body; both end early when the client does."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response

from .errors import ApiError, Send, encode, send_error, told
from .flight import ClientGone, Flight
from .security import Receive, Scope
from .shape import Shape

_EVENTS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


def event(body: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + encode(body) + b"\n\n"


class Answer(Response):
    """What a flight brings, streamed or whole; the flight is over when this is.

    The status is sent with the first piece: what fails before has a status of its own.
    """

    def __init__(self, flight: Flight, shape: Shape) -> None:
        super().__init__()
        self._flight, self._shape = flight, shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = self._shape.request
        async with self._flight as flight:
            flight.watch(receive)
            try:
                if request.stream:
                    await self._stream(flight, send)
                else:
                    await self._whole(flight, send)
            except ClientGone:
                return

    async def _whole(self, flight: Flight, send: Send) -> None:
        try:
            async for pieces in flight:
                for piece in pieces:
                    self._shape.add(piece)
            body = encode(self._shape.answer())
        except ClientGone:
            raise
        except Exception as error:
            await send_error(send, told(error))
            return
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, flight: Flight, send: Send) -> None:
        begun = False
        try:
            async for events in self._events(flight):
                if not begun:
                    await send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
                    begun = True
                await send({"type": "http.response.body", "body": events, "more_body": True})
        except ClientGone:
            raise
        except Exception as error:
            problem = told(error)
            if not begun:
                await send_error(send, problem)
                return
            await send({"type": "http.response.body", "body": _failed(problem), "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    async def _events(self, flight: Flight) -> AsyncIterator[bytes]:
        options = self._shape.request.stream_options
        usage = options is not None and bool(options.include_usage)
        async for pieces in flight:
            chunks = [chunk for piece in pieces for chunk in self._shape.chunk(piece)]
            if chunks:
                yield b"".join(event({**chunk, "usage": None} if usage else chunk) for chunk in chunks)
        if usage:
            yield event(self._shape.last_chunk())


def _failed(error: ApiError) -> bytes:
    return event(error.body)
