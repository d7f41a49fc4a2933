"""What deltas look like to a client, for both APIs: chunks of a stream, or one answer."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from ..infer.outputs import Delta, TokenLogprob
from ..models.tokenizer import TextStream, Tokenizer
from .flight import Piece, Prompt
from .protocol import Generation
from .sampling import grammar_of

LEAST = -9999.0  # a log probability of minus infinity is no JSON


@dataclass
class Choice:
    """One sequence so far."""

    prompt: Prompt
    tokens: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    routes: list[Any] = field(default_factory=list)
    finish: str | None = None
    generated: int = 0
    cached: int = 0
    stream: TextStream | None = None
    offset: int = 0
    """Characters before the next token."""
    begun: bool = False
    """Whether a delta has come."""
    calls: Any = None
    """What looks for calls of tools in the text; None: nothing does."""


class Shape:
    """One request's answer. Subclasses say what a choice looks like.

    Attributes:
        object, chunk_object: names of the answer and of a chunk.
    """

    object = chunk_object = ""
    opening: int | None = None
    """The special token that opens calls of tools: where there is one, the text has special tokens."""

    def __init__(
        self, id: str, model: str, fingerprint: str, request: Generation, tokenizer: Tokenizer | None
    ) -> None:
        self.id, self.created = id, int(time.time())
        self.model, self.fingerprint = model, fingerprint
        self.request, self.tokenizer = request, tokenizer
        self.choices: dict[int, Choice] = {}
        self.prompts: list[Prompt] = []
        self.n = request.n or 1

    def begin(self, prompts: list[Prompt]) -> None:
        """Says what is gone on with."""
        self.prompts = prompts
        for i in range(len(prompts) * self.n):
            self.choices[i] = Choice(prompts[i // self.n])

    def grammar(self) -> tuple[str, str] | None:
        """The form that the text must have: see `grammar_of`."""
        return grammar_of(self.request)

    def chunk(self, piece: Piece) -> list[dict[str, Any]]:
        """What a stream says about a delta; often nothing."""
        index, choice, new = self._take(piece)
        delta = piece.delta
        told = delta.text or delta.finish or new or (delta.tokens and (self.request.return_token_ids or delta.routes))
        return (
            [self._envelope(one, self.chunk_object) for one in self.part(index, choice, piece, new)] if told else []
        )

    def add(self, piece: Piece) -> None:
        """Keeps a delta for `answer`."""
        _, choice, new = self._take(piece)
        choice.tokens += piece.delta.tokens
        choice.texts.append(piece.delta.text)
        choice.logprobs += new
        choice.routes += piece.delta.routes

    def answer(self) -> dict[str, Any]:
        """All of it."""
        body = self._envelope([self.whole(i, choice) for i, choice in self.choices.items()], self.object)
        return {**body, "usage": self.usage(), **self.beside()}

    def part(self, index: int, choice: Choice, piece: Piece, logprobs: list[Any]) -> list[list[dict[str, Any]]]:
        """For each chunk its choices."""
        raise NotImplementedError

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        """One choice of the answer."""
        raise NotImplementedError

    def beside(self) -> dict[str, Any]:
        """What the answer has beside its choices."""
        return {}

    def before(self, choice: Choice, delta: Delta) -> list[Any]:
        """What is told of tokens before the first delta's: nothing, but where the prompt is part of the answer."""
        return []

    def logprob(self, choice: Choice, one: TokenLogprob) -> Any:
        """What is told of one token."""
        raise NotImplementedError

    def _take(self, piece: Piece) -> tuple[int, Choice, list[Any]]:
        delta = piece.delta
        index = piece.prompt * self.n + delta.key[1]
        choice = self.choices[index]
        choice.generated, choice.cached = max(choice.generated, delta.generated), max(choice.cached, delta.cached)
        choice.finish = delta.finish or choice.finish
        before = [] if choice.begun else self.before(choice, delta)
        choice.begun = True
        return index, choice, before + [self.logprob(choice, one) for one in delta.logprobs]

    def _envelope(self, choices: list[dict[str, Any]], kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    def last_chunk(self) -> dict[str, Any]:
        """The one of include_usage."""
        return {**self._envelope([], self.chunk_object), "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens of prompts and answers."""
        prompt = sum(len(one.tokens) for one in self.prompts)
        generated = sum(choice.generated for choice in self.choices.values())
        cached = sum(self.choices[i].cached for i in range(0, len(self.choices), self.n))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def extras(self, tokens: Any, routes: Any) -> dict[str, Any]:
        """The extensions' part of a choice."""
        own: dict[str, Any] = {"token_ids": list(tokens)} if self.request.return_token_ids else {}
        return {**own, "routes": routes} if self.request.routes else own

    def token_text(self, token: int) -> str:
        """A token by itself; of one that is a part of a character its bytes."""
        if self.tokenizer is None:
            return f"token_id:{token}"
        text = self.tokenizer.decode([token], skip_special=False)
        if "\ufffd" not in text:
            return text
        raw = self.token_bytes(token)
        return text if raw is None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def token_bytes(self, token: int) -> list[int] | None:
        """Of a token; None where they are not known."""
        if self.tokenizer is None:
            return None
        raw = self.tokenizer.token_bytes(token)
        return None if raw is None else list(raw)
