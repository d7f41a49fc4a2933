"""/v1/chat/completions: messages through the checkpoint's template."""

from __future__ import annotations

import json
from typing import Any

from ..infer.outputs import TokenLogprob
from .flight import Piece
from .protocol import ChatRequest, Message
from .shape import LEAST, Choice, Shape


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
        told["tool_calls"] = [_call(call.model_dump()) for call in message.tool_calls]
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


class ChatShape(Shape):
    """What /v1/chat/completions answers."""

    object, chunk_object = "chat.completion", "chat.completion.chunk"

    def part(self, index: int, choice: Choice, piece: Piece, logprobs: list[Any]) -> list[list[dict[str, Any]]]:
        """A choice's first chunk says its role, its last one how it ended."""
        delta = piece.delta
        chunks: list[list[dict[str, Any]]] = []
        if not choice.texts:
            choice.texts.append("")
            first = self._part(index, {"role": "assistant", "content": ""})
            if self.request.return_token_ids:
                first["prompt_token_ids"] = list(choice.prompt.tokens)
            chunks.append([first])
        if delta.text or delta.tokens:
            one = self._part(index, {"content": delta.text} if delta.text else {})
            one["logprobs"] = {"content": logprobs, "refusal": None} if logprobs else None
            chunks.append([{**one, **self.extras(delta.tokens, delta.routes)}])
        if delta.finish:
            chunks.append([{**self._part(index, {}), "finish_reason": delta.finish}])
        return chunks

    def _part(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        """One choice of the answer."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": "".join(choice.texts), "refusal": None},
            "logprobs": {"content": choice.logprobs, "refusal": None} if choice.logprobs else None,
            "finish_reason": choice.finish,
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
