"""From a request's parameters to the engine's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..infer.request import SamplingParams
from .chat_protocol import ChatRequest
from .errors import ApiError
from .protocol import CompletionRequest, Generation

_COMPLETION_TOKENS = 16  # OpenAI's default for completions; a chat's is what the model has room for

_SAME = (
    "frequency_penalty",
    "presence_penalty",
    "n",
    "seed",
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "ignore_eos",
    "min_tokens",
)


def sampling(
    request: Generation, prompt_tokens: int, max_model_len: int, defaults: Mapping[str, Any]
) -> SamplingParams:
    """The settings of a request whose prompt has so many tokens, and defaults for what it does not name.

    Raises:
        ApiError: 400: prompt and answer have no room in the model.
        RequestError: a setting has no meaning.
    """
    told: dict[str, Any] = {name: getattr(request, name) for name in _SAME if getattr(request, name) is not None}
    if request.top_k is not None:
        told["top_k"] = max(0, request.top_k)
    if request.logit_bias is not None:
        told["logit_bias"] = tuple(request.logit_bias.items())
    if request.stop is not None:
        told["stop"] = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)
    if request.stop_token_ids is not None:
        told["stop_token_ids"] = tuple(request.stop_token_ids)
    most = request.max_tokens
    if isinstance(request, ChatRequest):
        most = most or request.max_completion_tokens
        told["logprobs"] = (request.top_logprobs or 0) if request.logprobs else None
    elif isinstance(request, CompletionRequest):
        told["logprobs"], told["best_of"] = request.logprobs, request.best_of
        told["prompt_logprobs"] = request.logprobs if request.echo else None
        # Of no tokens at all one is made, and not told.
        most = max(_COMPLETION_TOKENS, request.min_tokens or 0) if most is None else max(most, 1)
    room = max_model_len - prompt_tokens
    if room < (most or 1):
        message = f"{prompt_tokens} prompt tokens and {most or 1} of the answer pass the model's {max_model_len}"
        raise ApiError(400, f"{message}: shorten the prompt or max_tokens", code="context_length_exceeded")
    return SamplingParams(**{**defaults, **told, "max_tokens": most or room})


def grammar_of(request: Generation) -> tuple[str, str] | None:
    """The kind and the text of the grammar that a request asks for, as `infer.grammar.GrammarSpec` takes them."""
    form, own = request.response_format, request.structured_outputs
    if form is not None and form.type == "json_object":
        return "json_object", ""
    if form is not None and form.json_schema is not None:
        schema = form.json_schema.schema_
        return ("json_object", "") if schema is None else ("json_schema", json.dumps(schema))
    if own is None:
        return None
    if own.json_ is not None:
        return "json_schema", json.dumps(own.json_)
    if own.choice is not None:
        return "choice", json.dumps(own.choice)
    return ("regex", own.regex) if own.regex is not None else ("grammar", own.grammar or "")
