"""Who may come in: keys, and the names under which the server may be called."""

from __future__ import annotations

import base64
import binascii
import hashlib
import secrets
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from .errors import ApiError, Send, send_error
from .settings import ServerSettings, is_loopback

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready"})
_LONGEST_KEY = 1024  # bytes: no more are hashed


class KeyRing:
    """The digests of the keys; the keys themselves are not kept."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def identify(self, authorization: bytes | None) -> str | None:
        """Whose key a header carries, as a name that tells nothing of the key; None: nobody's.

        Takes the same time whichever key it is, and whether it is one.

        Args:
            authorization: the header: `Bearer KEY`, or `Basic` with the key as the password.
        """
        key = _key_of(authorization or b"")
        digest = hashlib.sha256(key[:_LONGEST_KEY]).digest()
        found = None
        for known in self._digests:
            if secrets.compare_digest(digest, known):
                found = known
        if found is None or not 0 < len(key) <= _LONGEST_KEY:
            return None
        return hashlib.sha256(b"coterie identity" + found).hexdigest()


def _key_of(header: bytes) -> bytes:
    scheme, _, rest = header.strip().partition(b" ")
    if scheme.lower() == b"bearer":
        return rest.strip()
    if scheme.lower() != b"basic":
        return b""
    try:
        return base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


IDENTITY = b"coterie-identity"


class Inside:
    """ASGI, instead of `Guard` behind a balancer of ours, which has checked the key and says whose it is. Only at a
    socket that nobody else can open."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["identity"] = dict(scope["headers"]).get(IDENTITY, b"").decode("latin-1")
        await self.app(scope, receive, send)


def salt(identity: str, cache_salt: str | None) -> str:
    """What separates the prefix cache's blocks: equal only for the same key and the same salt of the request."""
    return f"{identity}\0{cache_salt or ''}"


class Guard:
    """ASGI: nothing but /health without a key where keys are set, before anything of the body is read.

    Without keys a request must call the server by the address it listens at: else a web page could let its own name
    lead to this machine and talk to the server from a visitor's browser (DNS rebinding). `scope["identity"]` then
    says who it is.
    """

    def __init__(self, app: App, settings: ServerSettings, keys: KeyRing) -> None:
        self.app, self._keys = app, keys
        self._any_host = bool(keys) or not settings.loopback
        self._hosts = {settings.host.lower(), *(host.lower() for host in settings.allowed_hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        error = self._refused(scope)
        if error is None:
            await self.app(scope, receive, send)
        else:
            await send_error(send, error)

    def _refused(self, scope: Scope) -> ApiError | None:
        scope["identity"] = ""
        headers = dict(scope["headers"])  # of a header that stands twice the last counts, here and for all below
        if not self._any_host and not self._known(headers.get(b"host", b"")):
            return ApiError(421, "this server is not called by that name: see allowed_hosts", close=True)
        if not self._keys or scope["path"] in OPEN_PATHS:
            return None
        identity = self._keys.identify(headers.get(b"authorization"))
        if identity is None:
            message = "give an API key: Authorization: Bearer KEY, or Basic with the key as the password"
            return ApiError(401, message, code="invalid_api_key", close=True)
        scope["identity"] = identity
        return None

    def _known(self, header: bytes) -> bool:
        host = header.decode("latin-1").lower()
        if host.startswith("["):
            host = host[1:].partition("]")[0]
        elif host.count(":") == 1:
            host = host.partition(":")[0]
        return host in self._hosts or is_loopback(host)
