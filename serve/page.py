"""A page to try a model on: static files and what they must know of the model. Nothing is loaded from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse, Response

if TYPE_CHECKING:
    from ..infer.engine import Engine

FOLDER = Path(__file__).parent / "page"
TYPES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "main.js": "text/javascript; charset=utf-8",
    "api.js": "text/javascript; charset=utf-8",
    "answer.js": "text/javascript; charset=utf-8",
    "experts.js": "text/javascript; charset=utf-8",
}
"""All files there are; no other name is looked up."""

HEADERS = {
    # Scripts and styles of this server alone, no text turned into markup, no frame around the page.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def router(engine: Engine | None = None, *, chat: bool | None = None) -> APIRouter:
    """GET / and GET /page/{file}; they need a key where the server has keys.

    Args:
        engine: whose model the page talks to; None: `app.state.engine`, where there is one.
        chat: whether the model has a chat template; None: the page offers both ways.
    """
    files = {name: (FOLDER / name).read_bytes() for name in TYPES}
    routes = APIRouter(include_in_schema=False)

    @routes.get("/")
    def index() -> Response:
        return Response(files["index.html"], media_type=TYPES["index.html"], headers=HEADERS)

    @routes.get("/page/about.json")
    def about(request: Request) -> Response:
        return JSONResponse(describe(engine or getattr(request.app.state, "engine", None), chat), headers=HEADERS)

    @routes.get("/page/{file}")
    def file(file: str) -> Response:
        if file not in files:
            raise HTTPException(404, "the page has no such file")
        return Response(files[file], media_type=TYPES[file], headers=HEADERS)

    return routes


def describe(engine: Engine | None, chat: bool | None = None) -> dict[str, Any]:
    """The model's most tokens and the experts of each MoE layer, as far as they are known."""
    told: dict[str, Any] = {} if chat is None else {"chat": chat}
    if engine is None:
        return told
    told |= {"max_model_len": engine.max_model_len}
    if engine.model is not None:
        config = engine.model.config
        told |= {"experts": [count for count in config.experts if count], "top_k": config.moe.top_k}
    return told
