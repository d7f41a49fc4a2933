"""The application: routes, limits around them, and what they share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ..infer.recording import Recording
from .chat_protocol import ChatRequest
from .errors import ApiError, encode
from .limits import Bodies, Life, Limits
from .metrics import Metrics
from .page import router
from .protocol import CompletionRequest, ErrorBody
from .security import Guard, Inside, KeyRing
from .service import Service
from .settings import ServerSettings, load_keys
from .templates import load_templates

_REFUSALS = (400, 401, 404, 408, 413, 415, 421, 429, 431, 500, 503, 504)
_MESSAGES = {404: "there is nothing at this path", 405: "this path does not take that method"}
_POSTS = {"/v1/completions": CompletionRequest, "/v1/chat/completions": ChatRequest}


def build(
    engine: Any,
    settings: ServerSettings,
    folder: Path | None = None,
    *,
    keys: KeyRing | None = None,
    inside: bool = False,
) -> FastAPI:
    """The application of a running engine.

    Its `state` has `service` and `life`, by which a server stops taking requests.

    Args:
        engine: an `infer.engine.Engine`, or what has the same methods; who calls starts and stops it.
        settings: limits, keys and names.
        folder: the model's directory, of which the chat template is taken; None: there is none.
        keys: who may come in; None: those that the settings and the environment name.
        inside: a balancer stands before it and has checked keys and names.

    Raises:
        ValueError: others could reach it without a key, template files are damaged, or routes cannot be recorded.
    """
    keys = KeyRing([] if inside else load_keys(settings)) if keys is None else keys
    templates = load_templates(folder, settings)
    engine.name = settings.model_name or engine.name
    recording = Recording(engine, settings.record) if settings.record else None
    metrics = Metrics(engine, recording)
    service, life = Service(engine, settings, templates, metrics), Life(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await templates.start()
        yield
        await templates.close()
        for one in filter(None, (service, metrics, recording)):
            one.close()

    app = FastAPI(title="coterie", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service, app.state.life = service, life
    app.add_middleware(Bodies, settings=settings)
    if inside:
        app.add_middleware(Inside)
    else:
        app.add_middleware(Guard, settings=settings, keys=keys)
    app.add_middleware(Limits, settings=settings, life=life, reject=metrics.rejected)
    app.add_exception_handler(HTTPException, as_ours)
    add_health(app, engine, life)
    _add_routes(app, service)
    app.openapi = lambda: _described(app)
    return app


def _json(body: Any, status: int = 200) -> Response:
    return Response(encode(body), status, media_type="application/json")


def as_ours(_: Request, error: Exception) -> Response:
    """An unknown route or method, in OpenAI's shape."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    message = _MESSAGES.get(status, "refused")
    found = ApiError(status, message)
    allowed = getattr(error, "headers", None) or {}
    return Response(encode(found.body), status, {**found.headers, **allowed}, media_type="application/json")


def add_health(app: FastAPI, engine: Any, life: Life) -> None:
    """The routes that tell whether an engine, or what has its `alive` and `failure`, serves."""

    async def live() -> Response:
        """Whether the process should go on: 503 once the engine has failed."""
        return _json({"status": "ok"}) if engine.failure is None else _json({"status": "failed"}, 503)

    async def ready() -> Response:
        """Whether requests are taken: 503 while stopping and after a failure."""
        if engine.alive and not life.draining:
            return _json({"status": "ok"})
        return _json({"status": "not ready" if engine.failure is None else "failed"}, 503)

    own: dict[int | str, dict[str, Any]] = {503: {"description": "It does not."}}
    app.add_api_route("/health/live", live, response_class=Response, responses=own)
    app.add_api_route("/health/ready", ready, response_class=Response, responses=own)
    app.add_api_route("/health", ready, response_class=Response, responses=own)


def _add_routes(app: FastAPI, service: Service) -> None:
    async def completions(request: Request) -> Response:
        """Go on with prompts."""
        return await service.completions(request)

    async def chat(request: Request) -> Response:
        """Answer a chat."""
        return await service.chat(request)

    async def models() -> Response:
        """The one model that is served."""
        return _json({"object": "list", "data": [_model(service)]})

    async def model(name: str) -> Response:
        """The same, by its name."""
        if name != service.name:
            raise ApiError(404, f"there is no model {name[:80]!r} here", param="model", code="model_not_found")
        return _json(_model(service))

    async def metrics() -> Response:
        """For Prometheus."""
        body, kind = service.metrics.render()
        return Response(body, headers={"content-type": kind})

    errors: dict[int | str, dict[str, Any]] = {status: {"model": ErrorBody} for status in _REFUSALS}
    for path, post in (("/v1/completions", completions), ("/v1/chat/completions", chat)):
        app.add_api_route(path, post, methods=["POST"], response_class=Response, responses=errors)
    for path, get in (("/v1/models", models), ("/v1/models/{name:path}", model), ("/metrics", metrics)):
        app.add_api_route(path, get, response_class=Response, responses=errors)
    app.include_router(router(service.engine, chat=bool(service.templates.sources)))


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "coterie",
        "max_model_len": service.engine.max_model_len,
    }


def _described(app: FastAPI) -> dict[str, Any]:
    """OpenAPI, with the bodies that the routes read themselves."""
    if app.openapi_schema:
        return app.openapi_schema
    schema = FastAPI.openapi(app)
    kinds: list[Any] = [(kind, "validation") for kind in _POSTS.values()]
    _, defined = models_json_schema(kinds, ref_template="#/components/schemas/{model}")
    schema.setdefault("components", {}).setdefault("schemas", {}).update(defined["$defs"])
    for path, kind in _POSTS.items():
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
        post = schema["paths"][path]["post"]
        post["requestBody"] = {"required": True, "content": content}
        post["responses"]["200"]["content"] = {"application/json": {}, "text/event-stream": {}}
    return schema
