"""One address before several replicas: keys, limits and choices here, everything else there.

A request goes to another replica as long as nothing of an answer has been sent: where the first one had no room, was
stopping, or ended. Nothing that the engine does lasts longer than an answer, so computing one twice does no harm.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import aiohttp
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from yarl import URL

from ..infer.config import EngineConfig
from ..models.hub import resolve
from .app import add_health, as_ours
from .errors import ApiError, Send
from .limits import Bodies, Life, Limits
from .parse import parse_json
from .replicas import COMMAND, Replica, Replicas
from .routing import Ask, asked
from .run import listen, name_of, serve_app
from .security import IDENTITY, Guard, KeyRing, Receive, Scope, salt
from .settings import ServerSettings, load_keys
from .stream import event

_DEATHS = 2  # replicas that may end under one request: it may be what ends them
_OWN_HEADERS = frozenset({"connection", "keep-alive", "transfer-encoding", "content-length", "date", "server"})
_ROOMLESS = (429, 503)
_LATE = 5.0  # seconds after a deadline by which a replica must have said so
_SCRAPE_S = 5.0  # for a replica to tell its metrics
_LOST = ApiError(
    503, "the replica that computed this answer has ended: ask again", code="replica_lost", retry_after=1
)


class _Lost(Exception):
    """The replica ended before anything of its answer was sent.

    Attributes:
        begun: it had taken the request.
    """

    def __init__(self, begun: bool = True) -> None:
        super().__init__()
        self.begun = begun


class _Answer(NamedTuple):
    """One that is whole."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Balancer:
    """ASGI: hands requests to replicas and their answers back.

    Attributes:
        retried: requests that went on to another replica.
    """

    def __init__(self, replicas: Replicas, settings: ServerSettings) -> None:
        self._replicas, self._settings = replicas, settings
        self.retried = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        deadline = time.monotonic() + self._settings.request_timeout_s + _LATE
        body, ask = b"", Ask()
        if scope["method"] == "POST":
            try:
                body = await Request(scope, receive).body()
            except ClientDisconnect:
                return
            told = parse_json(body, self._settings.max_json_depth)
            own = told.get("cache_salt")
            ask = asked(scope["path"], told, salt(scope["identity"], own if isinstance(own, str) else None))
        work = asyncio.create_task(self._serve(scope, ask, body, deadline, send))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _serve(self, scope: Scope, ask: Ask, body: bytes, deadline: float, send: Send) -> None:
        router, tried, deaths = self._replicas.router, set(), 0
        refusal: _Answer | None = None
        while deaths < _DEATHS:
            ready = self._replicas.ready
            chosen = router.pick(ask, ready.keys() - tried)
            if chosen is None:
                break
            self.retried += bool(tried)
            tried.add(chosen)
            try:
                refusal = await self._try(ready[chosen], scope, body, deadline, send)
            except _Lost as lost:
                deaths += lost.begun
                continue
            finally:
                router.end(chosen, ask)
            if refusal is None:
                return
        if refusal is not None and deaths < _DEATHS:
            await _send(send, refusal)
            return
        message = (
            "no replica takes requests: ask later" if deaths < _DEATHS else "replicas have ended under this request"
        )
        raise ApiError(503, message, code="unavailable", retry_after=self._settings.retry_after_s)

    async def _try(self, one: Replica, scope: Scope, body: bytes, deadline: float, send: Send) -> _Answer | None:
        """None: the answer has been sent. An answer: it was refused for want of room. _Lost: it ended before."""
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                answer = await one.client.request(
                    scope["method"], _url(scope), data=body or None, headers=_asking(scope), allow_redirects=False
                )
        except TimeoutError:
            raise ApiError(504, "the request took longer than it may", code="deadline") from None
        except aiohttp.ClientConnectorError:
            raise _Lost(begun=False) from None
        except (aiohttp.ClientError, OSError):
            raise _Lost from None
        try:
            if answer.content_type == "text/event-stream":
                await _stream(answer, send)
                return None
            whole = _Answer(answer.status, _headers(answer), await _read(answer))
            if answer.status in _ROOMLESS:
                return whole
            await _send(send, whole)
            return None
        finally:
            answer.close()  # nothing happens to one that has come to its end


def _url(scope: Scope) -> URL:
    """Of a replica, which is asked for what the client asked for, byte for byte."""
    path, query = (scope[name].decode("latin-1") for name in ("raw_path", "query_string"))
    return URL.build(scheme="http", host="localhost", path=path, query_string=query, encoded=True)


def _asking(scope: Scope) -> dict[str, str]:
    """The headers for a replica: none of the client's."""
    headers = {IDENTITY.decode(): scope["identity"]}
    if scope["method"] in ("POST", "PUT", "PATCH"):
        headers["content-type"] = "application/json"
    return headers


def _headers(answer: aiohttp.ClientResponse) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in answer.raw_headers if name.decode("latin-1").lower() not in _OWN_HEADERS]


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send(send: Send, answer: _Answer) -> None:
    headers = [*answer.headers, (b"content-length", str(len(answer.body)).encode())]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


async def _stream(answer: aiohttp.ClientResponse, send: Send) -> None:
    """Events as they come, whole ones alone: after the last one there is room for an error."""
    await send({"type": "http.response.start", "status": answer.status, "headers": _headers(answer)})
    rest = b""
    try:
        async for piece in answer.content.iter_any():
            whole, end, rest = (rest + piece).rpartition(b"\n\n")
            if end:
                await send({"type": "http.response.body", "body": whole + end, "more_body": True})
    except (aiohttp.ClientError, OSError):
        rest = event(_LOST.body) + b"data: [DONE]\n\n"
    await send({"type": "http.response.body", "body": rest, "more_body": False})


async def _read(answer: aiohttp.ClientResponse) -> bytes:
    try:
        return await answer.read()
    except (aiohttp.ClientError, OSError):
        raise _Lost from None


async def _page(one: Replica) -> str:
    with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
        async with asyncio.timeout(_SCRAPE_S), one.client.get("http://localhost/metrics") as answer:
            return await answer.text()
    return ""


class Counts:
    """What the balancer itself tells Prometheus; it has what a registry has."""

    def __init__(self, balancer: Balancer, replicas: Replicas) -> None:
        self._balancer, self._replicas = balancer, replicas
        self._rejected: Counter[int] = Counter()

    def rejected(self, code: int) -> None:
        """A request was refused with this HTTP status, here or by a replica."""
        self._rejected[code] += 1

    def collect(self) -> Iterable[Metric]:
        ready = self._replicas.ready
        up = GaugeMetricFamily("coterie:replica_up", "Whether it takes requests.", labels=["replica"])
        load = GaugeMetricFamily(
            "coterie:replica_outstanding_tokens", "Of requests that have not ended.", labels=["replica"]
        )
        starts = CounterMetricFamily("coterie:replica_starts", "Times that it was started.", labels=["replica"])
        for one in self._replicas.members:
            label = [str(one.number)]
            up.add_metric(label, one.number in ready)
            load.add_metric(label, self._replicas.router.outstanding[one.number])
            starts.add_metric(label, one.starts)
        retried = CounterMetricFamily("coterie:requests_retried", "Requests that went on to another replica.")
        retried.add_metric([], self._balancer.retried)
        rejected = CounterMetricFamily("coterie:balancer_rejected", "Requests refused.", labels=["code"])
        for code, count in sorted(self._rejected.items()):
            rejected.add_metric([str(code)], count)
        return up, load, starts, retried, rejected


def merged(pages: dict[int, str]) -> str:
    """One page of several replicas' in Prometheus' text format: each sample has its replica as a label."""
    families: dict[str, list[str]] = {}
    lines: list[str] = []
    for number, page in pages.items():
        label = f'{{replica="{number}"'
        for line in page.splitlines():
            if line.startswith("# HELP "):
                lines = families.setdefault(line, [])
            elif line.startswith("#"):
                if not lines:
                    lines.append(line)
            else:
                name, brace, rest = line.partition("{")
                if brace:
                    lines.append(f"{name}{label},{rest}")
                else:
                    name, _, value = line.partition(" ")
                    lines.append(f"{name}{label}}} {value}")
    return "".join(f"{head}\n" + "".join(f"{line}\n" for line in lines) for head, lines in families.items())


def build(replicas: Replicas, settings: ServerSettings) -> FastAPI:
    """The application; its `state.life` stops it from taking requests. ValueError: see `load_keys`."""
    keys, life, balancer = KeyRing(load_keys(settings)), Life(settings), Balancer(replicas, settings)
    counts = Counts(balancer, replicas)
    app = FastAPI(title="coterie", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.life = life
    app.add_middleware(Bodies, settings=settings)
    app.add_middleware(Guard, settings=settings, keys=keys)
    app.add_middleware(Limits, settings=settings, life=life, reject=counts.rejected)
    app.add_exception_handler(HTTPException, as_ours)
    add_health(app, replicas, life)

    async def metrics() -> Response:
        """All replicas' and the balancer's own."""
        ready = replicas.ready
        pages = await asyncio.gather(*(_page(one) for one in ready.values()))
        told = {number: page for number, page in zip(ready, pages, strict=True) if page}
        own = generate_latest(counts)  # pyright: ignore[reportArgumentType]
        return Response(own + merged(told).encode(), headers={"content-type": CONTENT_TYPE_LATEST})

    app.add_api_route("/metrics", metrics, response_class=Response)
    app.mount("/", balancer)
    return app


def serve_replicas(
    model: Path, settings: ServerSettings, config: EngineConfig, count: int, command: Sequence[str] = COMMAND
) -> int:
    """Starts replicas of a model, and serves them at one address until a signal; see `run.serve`.

    Returns: the exit status: 0, or 1 where a replica ended before any served.

    Raises:
        ValueError: the settings are refused, or nothing can listen at the address.
    """
    settings = replace(settings, model_name=settings.model_name or name_of(model))
    with tempfile.TemporaryDirectory(prefix="coterie-") as folder:  # of mode 0700
        replicas = Replicas(resolve(model), settings, config, count, Path(folder), command)
        app = build(replicas, settings)
        return serve_app(replicas, app, settings, listen(settings))
