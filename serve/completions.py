"""/v1/completions: prompts as text or tokens, several at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from ..infer.outputs import Delta, TokenLogprob
from ..models.tokenizer import TextStream
from .flight import Piece
from .protocol import CompletionRequest
from .shape import LEAST, Choice, Shape

_BEFORE = 16  # tokens of the prompt that can decide how the text begins


def prompts_of(request: CompletionRequest) -> list[str] | list[list[int]]:
    """The prompts of a request, one or several."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [cast("list[int]", prompt)]
    return cast("list[str] | list[list[int]]", prompt)


class CompletionShape(Shape):
    """What /v1/completions answers."""

    object = chunk_object = "text_completion"

    def chunk(self, piece: Piece) -> list[dict[str, Any]]:
        """See `Shape`."""
        return super().chunk(self._heard(piece))

    def add(self, piece: Piece) -> None:
        """See `Shape`."""
        super().add(self._heard(piece))

    def _heard(self, piece: Piece) -> Piece:
        """With max_tokens 0 what was generated is not told."""
        if self.request.max_tokens != 0 or piece.delta.finish not in (None, "stop", "length"):
            return piece
        finish = None if piece.delta.finish is None else "length"
        nothing = {"text": "", "tokens": (), "logprobs": (), "routes": (), "finish": finish, "generated": 0}
        return piece._replace(delta=replace(piece.delta, **nothing))

    def part(self, index: int, choice: Choice, piece: Piece, logprobs: list[Any]) -> list[list[dict[str, Any]]]:
        """One chunk, of one choice. With echo the first one begins with the prompt."""
        delta = piece.delta
        text = delta.text if choice.texts else self._echo(choice) + delta.text
        one = {
            "index": index,
            "text": text,
            "logprobs": _lists(logprobs) if logprobs else None,
            "finish_reason": delta.finish,
            **self.extras(delta.tokens, delta.routes),
        }
        if not choice.texts and self.request.return_token_ids:
            one["prompt_token_ids"] = list(choice.prompt.tokens)
        choice.texts[:] = [""]  # it has begun
        return [[one]]

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        """One choice of the answer."""
        ids = {"prompt_token_ids": list(choice.prompt.tokens)} if self.request.return_token_ids else {}
        return {
            "index": index,
            "text": self._echo(choice) + "".join(choice.texts),
            "logprobs": _lists(choice.logprobs) if choice.logprobs else None,
            "finish_reason": choice.finish,
            **self.extras(choice.tokens, choice.routes),
            **ids,
        }

    def _echo(self, choice: Choice) -> str:
        request = cast("CompletionRequest", self.request)
        if not request.echo:
            return ""
        if choice.prompt.text is not None or self.tokenizer is None:
            return choice.prompt.text or ""
        return self.tokenizer.decode(choice.prompt.tokens, skip_special=False)

    def before(self, choice: Choice, delta: Delta) -> list[Any]:
        """The prompt's tokens, where it is echoed with logprobs: nothing says how likely the first one is."""
        request, tokens = cast("CompletionRequest", self.request), choice.prompt.tokens
        if not request.echo or request.logprobs is None:
            return []
        stream = None
        if self.tokenizer is not None:  # as the echo: special tokens have a text where the prompt was sent as tokens
            stream = TextStream(self.tokenizer, skip_special=choice.prompt.text is not None)
        found: list[Any] = []
        for token, one in zip(tokens, (None, *delta.prompt_logprobs), strict=False):
            text, offset = self.token_text(token), choice.offset
            choice.offset += 0 if stream is None else len(stream.push(token))
            found.append((text, None, None, offset) if one is None else (*self._told(text, one), offset))
        choice.offset = len(self._echo(choice))
        return found

    def logprob(self, choice: Choice, one: TokenLogprob) -> tuple[str, float, dict[str, float], int]:
        """The token's text, its logprob, the likeliest others', and where in the text it begins."""
        text, offset = self.token_text(one.token), choice.offset
        if self.tokenizer is not None:
            choice.stream = choice.stream or TextStream(self.tokenizer, choice.prompt.tokens[-_BEFORE:])
            choice.offset += len(choice.stream.push(one.token))
        return *self._told(text, one), offset

    def _told(self, text: str, one: TokenLogprob) -> tuple[str, float, dict[str, float]]:
        top = {self.token_text(token): max(LEAST, logprob) for token, logprob in one.top}
        if one.top:
            top.setdefault(text, max(LEAST, one.logprob))
        return text, max(LEAST, one.logprob), top


def _lists(logprobs: list[Any]) -> dict[str, Any]:
    tokens, values, tops, offsets = (list(column) for column in zip(*logprobs, strict=True))
    shown = None if {} in tops else tops
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": shown, "text_offset": offsets}
