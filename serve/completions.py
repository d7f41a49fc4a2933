"""/v1/completions: prompts as text or tokens, several at once."""

from __future__ import annotations

from typing import Any, cast

from ..infer.outputs import TokenLogprob
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

    def logprob(self, choice: Choice, one: TokenLogprob) -> tuple[str, float, dict[str, float], int]:
        """The token's text, its logprob, the likeliest others', and where in the text it begins."""
        top = {self.token_text(token): max(LEAST, logprob) for token, logprob in one.top}
        text = self.token_text(one.token)
        if one.top:
            top.setdefault(text, max(LEAST, one.logprob))
        offset = choice.offset
        if self.tokenizer is not None:
            choice.stream = choice.stream or TextStream(self.tokenizer, choice.prompt.tokens[-_BEFORE:])
            choice.offset += len(choice.stream.push(one.token))
        return text, max(LEAST, one.logprob), top, offset


def _lists(logprobs: list[Any]) -> dict[str, Any]:
    tokens, values, tops, offsets = (list(column) for column in zip(*logprobs, strict=True))
    shown = tops if any(tops) else None
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": shown, "text_offset": offsets}
