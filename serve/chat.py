"""/v1/chat/completions: messages through the checkpoint's template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

from ..infer.outputs import TokenLogprob
from ..infer.stops import stop_ids
from .chat_protocol import ChatRequest, Message, ToolChoice
from .errors import ApiError
from .flight import Piece
from .shape import LEAST, Choice, Shape
from .tool_forms import Form, forced
from .tools import MOST_CALLS, Calls, Event, call_id, whole


def rendered(request: ChatRequest, template: str) -> dict[str, Any]:
    """What the template is told: messages as it expects them, and tools unless tool_choice is none."""
    messages = [_message(message, template) for message in request.messages]
    tools = [tool.model_dump(exclude_none=True) for tool in request.tools or ()]
    return {"messages": messages, "tools": tools if tools and request.tool_choice != "none" else None}


def _message(message: Message, template: str) -> dict[str, Any]:
    told = message.model_dump(exclude_none=True, exclude={"tool_calls", "content"})
    if message.role == "developer" and "developer" not in template:
        told["role"] = "system"  # OpenAI's later name for it, which most templates do not know
    content = message.content
    told["content"] = (
        content if isinstance(content, str) else "".join(p.text or p.refusal or "" for p in content or ())
    )
    if message.tool_calls:
        told["tool_calls"] = [_call(call.model_dump(exclude={"index"})) for call in message.tool_calls]
    return told


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """Templates expect arguments as an object; the API has them as JSON text."""
    try:
        arguments = json.loads(call["function"]["arguments"])
    except (ValueError, RecursionError):
        return call
    if isinstance(arguments, dict):
        call["function"]["arguments"] = arguments
    return call


def _pieces(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Of calls in a stream, one a call: its first one has its name."""
    told: dict[int, dict[str, Any]] = {}
    for event in events:
        if event.call is None or not (event.name or event.arguments):
            continue
        one = told.setdefault(event.call, {"index": event.call, "function": {"arguments": ""}})
        if event.name:
            one |= {"id": call_id(), "type": "function", "function": {"name": event.name, "arguments": ""}}
        one["function"]["arguments"] += event.arguments
    return list(told.values())


class ChatShape(Shape):
    """What /v1/chat/completions answers."""

    object, chunk_object = "chat.completion", "chat.completion.chunk"
    form: Form | None = None
    """How calls of tools are written; None: the text is not searched for any."""

    def look_for(self, form: Form | None) -> None:
        """Takes what is written in this form for calls of tools; None: nothing is looked for.

        Raises:
            ApiError: 400: a call is to be forced, and no form is known.
        """
        request = cast("ChatRequest", self.request)
        self.form = form
        if form is not None and self.tokenizer is not None:
            self.opening = next(iter(stop_ids(self.tokenizer, [form.open])), None)
        if request.forced and form is None:
            message = "tool_choice forces a call, but the model's chat template shows no form that is known here"
            raise ApiError(400, message, param="tool_choice", code="unsupported_parameter")

    def grammar(self) -> tuple[str, str] | None:
        """A forced call has one of its own."""
        request = cast("ChatRequest", self.request)
        if self.form is None or not request.forced:
            return super().grammar()
        one = request.tool_choice.function.name if isinstance(request.tool_choice, ToolChoice) else None
        functions = [tool.function for tool in request.tools or () if one in (None, tool.function.name)]
        schemas = {f.name: {"type": "object", **(f.parameters or {"additionalProperties": False})} for f in functions}
        several = one is None and request.parallel_tool_calls is not False
        return "tools", forced(self.form, schemas, several=several, token=self.opening)

    def _calls(self) -> Calls | None:
        request = cast("ChatRequest", self.request)
        if self.form is None:
            return None
        names = frozenset(tool.function.name for tool in request.tools or ())
        return Calls(self.form, names, 1 if request.parallel_tool_calls is False else MOST_CALLS)

    def part(self, index: int, choice: Choice, piece: Piece, logprobs: list[Any]) -> list[list[dict[str, Any]]]:
        """A choice's first chunk says its role, its last one how it ended."""
        delta = piece.delta
        chunks: list[list[dict[str, Any]]] = []
        if not choice.texts:
            choice.texts.append("")
            choice.calls = self._calls()
            first = self._part(index, {"role": "assistant", "content": ""})
            if self.request.return_token_ids:
                first["prompt_token_ids"] = list(choice.prompt.tokens)
            chunks.append([first])
        told, finish = self._told(choice, delta.text, delta.finish)
        extras = self.extras(delta.tokens, delta.routes)
        if told or logprobs or any(extras.values()):
            one = self._part(index, told)
            one["logprobs"] = {"content": logprobs, "refusal": None} if logprobs else None
            chunks.append([{**one, **extras}])
        if delta.finish:
            chunks.append([{**self._part(index, {}), "finish_reason": finish}])
        return chunks

    def _told(self, choice: Choice, text: str, finish: str | None) -> tuple[dict[str, Any], str | None]:
        """What a chunk says of a piece of text, and how the choice has ended."""
        calls = choice.calls
        if calls is None:
            return {"content": text} if text else {}, finish
        events = calls.push(text) + (calls.finish() if finish else [])
        content = "".join(event.content for event in events)
        told = _pieces(events)
        delta = {"content": content} if content else {}
        finish = "tool_calls" if finish == "stop" and calls.count else finish
        return {**delta, "tool_calls": told} if told else delta, finish

    def _part(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        """One choice of the answer."""
        content, calls, finish = "".join(choice.texts), self._calls(), choice.finish
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls is not None:
            content, found = whole(calls.push(content) + calls.finish())
            message["content"] = content
            if found:
                message |= {"content": content or None, "tool_calls": found}
                finish = "tool_calls" if finish == "stop" else finish
        return {
            "index": index,
            "message": message,
            "logprobs": {"content": choice.logprobs, "refusal": None} if choice.logprobs else None,
            "finish_reason": finish,
            **self.extras(choice.tokens, choice.routes),
        }

    def beside(self) -> dict[str, Any]:
        """The prompt's tokens, where they are wanted."""
        return {"prompt_token_ids": list(self.prompts[0].tokens)} if self.request.return_token_ids else {}

    def logprob(self, choice: Choice, one: TokenLogprob) -> dict[str, Any]:
        """The token with its text and bytes, and so the likeliest ones."""
        top = [self._one(token, logprob) for token, logprob in one.top]
        return {**self._one(one.token, one.logprob), "top_logprobs": top}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self.token_bytes(token)
        return {"token": self.token_text(token), "logprob": max(LEAST, logprob), "bytes": raw}
