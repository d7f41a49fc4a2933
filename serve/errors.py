"""What a client is told when something is wrong: a sentence in OpenAI's shape, nothing of the server's inside."""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ..infer.request import EngineDead, QueueFull, RequestError, SamplingParams

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_log = logging.getLogger("coterie")
_SETTINGS = frozenset(SamplingParams.__dataclass_fields__)
_LONGEST = 500  # characters of a message
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is refused or has failed.

    Attributes:
        status: of HTTP.
        message: one sentence that may be shown to the client.
        param: the parameter that is wrong.
        code: a word for programs.
        retry_after: seconds after which the same request may be served.
        close: end the connection too, as the body was not read.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        close: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, brief(message), param, code
        self.retry_after, self.close = retry_after, close

    @property
    def body(self) -> dict[str, Any]:
        """{"error": {...}}."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Those that belong to the status."""
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if self.status == 401:
            headers["www-authenticate"] = 'Basic realm="coterie", charset="UTF-8"'
        if self.close:
            headers["connection"] = "close"
        return headers


def brief(message: str) -> str:
    """On one line and not long, in characters that can be printed and sent."""
    line = " ".join(message.split())
    line = line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."
    return "".join(char if char.isprintable() else "\ufffd" for char in line)


def encode(body: Any) -> bytes:
    """JSON, UTF-8. No number in it is NaN or infinite: a bug would be told here, not by the client's parser."""
    return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(errors="replace")


def told(error: BaseException, retry_after: int = 1) -> ApiError:
    """What to say about an exception. Nothing is said about one that nobody expected: its kind and place are logged,
    but not its message, which may hold a prompt."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        word = str(error).split(" ", 1)[0]  # its messages begin with the setting's name where there is one
        return ApiError(400, str(error), param=word if word in _SETTINGS else None)
    if isinstance(error, QueueFull):
        return ApiError(429, f"too many requests wait: {error}", code="queue_full", retry_after=retry_after)
    if isinstance(error, EngineDead):
        return ApiError(503, str(error), code="unavailable", retry_after=retry_after)
    places = "".join(traceback.format_tb(error.__traceback__))
    _log.error("a request failed with %s at\n%s", type(error).__name__, places)
    return ApiError(500, "the server failed at this request; other requests go on", code="internal_error")


async def send_error(send: Send, error: ApiError) -> None:
    """The whole response."""
    body = encode(error.body)
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
