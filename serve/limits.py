"""What a request may cost before anything looks at what it says: headers, its body's size and pace, places."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, MutableMapping
from typing import Any

from .errors import ApiError, Send, send_error, told
from .security import App, Receive, Scope
from .settings import ServerSettings

Reject = Callable[[int], None]


class Life:
    """Whether the server takes requests, and how many are under way."""

    def __init__(self, settings: ServerSettings) -> None:
        self.draining = False
        self.active = 0
        self._settings = settings

    def enter(self) -> None:
        """Takes a place. ApiError 503 or 429: there is none."""
        after = self._settings.retry_after_s
        if self.draining:
            message = "the server is stopping: ask another one, or later"
            raise ApiError(503, message, code="unavailable", retry_after=after, close=True)
        if self.active >= self._settings.max_requests:
            raise ApiError(429, "too many requests are under way", code="overloaded", retry_after=after, close=True)
        self.active += 1

    def leave(self) -> None:
        """Gives it back."""
        self.active -= 1


class Limits:
    """ASGI, the outermost: bounds headers and the number of requests, and turns whatever is raised into an answer.

    Only POST takes a place: health and metrics can be asked for while none is left.
    """

    def __init__(self, app: App, settings: ServerSettings, life: Life, reject: Reject) -> None:
        self.app, self._settings, self._life, self._reject = app, settings, life, reject

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = False

        async def watched(message: MutableMapping[str, Any]) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = [*message.get("headers", ()), (b"x-content-type-options", b"nosniff")]
                if message["status"] >= 400:
                    self._reject(message["status"])
            await send(message)

        place = False
        try:
            self._check_headers(scope)
            if scope["method"] == "POST":
                self._life.enter()
                place = True
            await self.app(scope, receive, watched)
        except Exception as error:
            problem = told(error, self._settings.retry_after_s)
            if not begun:  # else the connection ends in the middle, which a client notices
                await send_error(watched, problem)
        finally:
            if place:
                self._life.leave()

    def _check_headers(self, scope: Scope) -> None:
        size = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        size += len(scope.get("raw_path") or b"") + len(scope["query_string"])
        if size > self._settings.max_header_bytes:
            message = f"the headers have {size} bytes, but at most {self._settings.max_header_bytes} are taken"
            raise ApiError(431, message, close=True)


class Bodies:
    """ASGI: a body is JSON, no larger than it may be, and arrives in time."""

    def __init__(self, app: App, settings: ServerSettings) -> None:
        self.app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self.app(scope, receive, send)
            return
        self._check(dict(scope["headers"]))
        end = time.monotonic() + self._settings.body_timeout_s
        size, whole = 0, False

        async def bounded() -> MutableMapping[str, Any]:
            nonlocal size, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout(max(0.0, end - time.monotonic())):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, "the request's body did not arrive in time", close=True) from None
            size += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if size > self._settings.max_body_bytes:
                raise self._too_large()
            return message

        await self.app(scope, bounded, send)

    def _check(self, headers: dict[bytes, bytes]) -> None:
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json":
            raise ApiError(415, "give a body of content-type application/json", close=True)
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise ApiError(415, "give a body without content-encoding", close=True)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._settings.max_body_bytes:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has over {self._settings.max_body_bytes} bytes", close=True)
