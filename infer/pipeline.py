"""One model in this process: prompts in, texts out, through the same engine that serves."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from ..models.gpt import GPT
from ..models.tokenizer import Tokenizer
from .config import EngineConfig
from .engine import Engine
from .open_model import open_model
from .outputs import Delta, TokenLogprob
from .request import FinishReason, Key, QueueFull, SamplingParams

Prompt = str | Sequence[int]
BUDGET = 2048  # tokens a step
_WAIT = 0.005  # seconds, where the engine's own thread runs the steps or the queue is full


@dataclass(frozen=True)
class Generated:
    """What one sequence gave."""

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason
    stop: str | int | None
    """The stop string or stop token that ended it."""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Of the prompt's tokens from the second on."""


class GenerationError(ValueError):
    """A sequence ended before its time; the message says why."""


class Pipeline:
    """Generates from prompts in the caller's own thread. Several threads may call it: each moves all.

    Attributes:
        engine: what does the work.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._lock = threading.Lock()

    def __call__(self, prompts: Prompt | Sequence[Prompt], **settings: Any) -> list[Generated]:
        """Goes on with each prompt.

        Args:
            prompts: a text, token ids, or a list of either. An empty text starts a new document.
            settings: fields of `SamplingParams`, of which max_tokens may be called max_new_tokens. What is not named
                is as the model's generation_config.json says (`EngineConfig.generation_config`).

        Returns: for each prompt in order its `n` sequences.

        Raises:
            RequestError: a prompt or setting that cannot be served.
            GenerationError: a sequence failed.
        """
        params = sampling_params(settings, self.engine.defaults)
        ids = [self._encode(prompt) for prompt in _listed(prompts)]
        if not ids:
            raise ValueError("there is no prompt: give a text, token ids, or a list of either")
        box: dict[Key, list[Delta]] = {}
        names: list[str] = []
        try:
            for prompt in ids:
                names.append(self._submit(prompt, params, box))
            while sum(bool(parts[-1].finish) for parts in list(box.values())) < params.n * len(ids):
                self._move()
        except BaseException:
            self._abort(names)
            raise
        return [_generated(box[name, i], len(p)) for name, p in zip(names, ids, strict=True) for i in range(params.n)]

    def _submit(self, prompt: list[int], params: SamplingParams, box: dict[Key, list[Delta]]) -> str:
        """Waits while the queue is full."""
        while True:
            try:
                return self.engine.submit(prompt, params, lambda delta: box.setdefault(delta.key, []).append(delta))
            except QueueFull:
                self._move()

    def stream(self, prompt: Prompt, **settings: Any) -> Iterator[str]:
        """Pieces of the text that goes on with one prompt, as they come; see `__call__`. This call itself refuses,
        before any piece is asked for."""
        params = sampling_params(settings, self.engine.defaults)
        if params.n > 1:
            raise ValueError(f"n {params.n} texts cannot be one stream: ask for 1")
        box: deque[Delta] = deque()
        name = self.engine.submit(self._encode(prompt), params, box.append)
        return self._pieces(name, box)

    def _pieces(self, name: str, box: deque[Delta]) -> Iterator[str]:
        ended = False
        try:
            while not ended:
                while not box:
                    self._move()
                delta = box.popleft()
                ended = delta.finish is not None
                _check(delta)
                if delta.text:
                    yield delta.text
        finally:
            if not ended:
                self._abort([name])

    def _move(self) -> None:
        if self.engine.running:
            time.sleep(_WAIT)
            return
        with self._lock:
            self.engine.step()

    def _abort(self, names: Sequence[str]) -> None:
        for name in names:
            self.engine.abort(name)
        if names and not self.engine.running and self.engine.alive:
            with self._lock:
                self.engine.step()

    def _encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            raise FileNotFoundError("the model has no tokenizer.json, so text cannot be read: give token ids")
        return encode(tokenizer, prompt)

    def close(self) -> None:
        """Ends what is under way, and takes nothing more."""
        self.engine.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def pipeline(model: str | Path | GPT | Engine, *, tokenizer: Tokenizer | None = None, **settings: Any) -> Pipeline:
    """Opens a model to generate with: `pipe = coterie.pipeline(MODEL); pipe(["def "], max_new_tokens=64)`.

    Args:
        model: a model or run directory, hf://org/name[@revision], a model, or an engine.
        tokenizer: of a model that is given itself.
        settings: fields of `EngineConfig`.

    Raises:
        FileNotFoundError, ValueError: see `open_model` and `Engine`.
    """
    if isinstance(model, Engine):
        return Pipeline(model)
    # Nobody waits for single tokens here.
    config = EngineConfig(**{"budget": BUDGET, **_known(settings, EngineConfig)})
    if isinstance(model, GPT):
        return Pipeline(Engine(model, tokenizer, config))
    return Pipeline(Engine.open(model, config))


def stream_text(path: str | Path, prompt: str, *, device: str | None = None, **settings: Any) -> Iterator[str]:
    """Pieces of the text that goes on with one prompt, from a model that is opened for it alone.

    An empty prompt starts a new document. This call itself refuses, before any piece is asked for.

    Args:
        path, device: see `open_model`.
        settings: see `Pipeline`.

    Raises:
        FileNotFoundError, ValueError: as `open_model` and `Pipeline`; or the model has no tokenizer.
    """
    params = sampling_params(settings)
    model, tokenizer = open_model(path, device=device)
    if tokenizer is None:
        raise FileNotFoundError(f"{path} has no tokenizer.json beside its model, so text cannot be read")
    ids = encode(tokenizer, prompt)
    length = min(len(ids) + params.max_tokens, model.config.max_positions)
    config = EngineConfig(max_model_len=length, max_sequences=1, budget=BUDGET)
    return Pipeline(Engine(model, tokenizer, config)).stream(ids, **settings)


def sampling_params(settings: dict[str, Any], defaults: Mapping[str, Any] | None = None) -> SamplingParams:
    """Of keyword arguments, and defaults for what they do not name; raises ValueError for one that is not known."""
    settings = dict(settings)
    if "max_new_tokens" in settings:
        if "max_tokens" in settings:
            raise ValueError("max_tokens and max_new_tokens are one setting: give one of them")
        settings["max_tokens"] = settings.pop("max_new_tokens")
    if isinstance(settings.get("stop"), str):
        settings["stop"] = (settings["stop"],)
    return SamplingParams(**{**(defaults or {}), **_known(settings, SamplingParams)})


def encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A prompt's tokens; the end of a document where it has none. ValueError: it is no text."""
    try:
        prompt.encode()
    except UnicodeEncodeError:  # how Python hands over bytes of a command line that are no UTF-8
        raise ValueError("the prompt is not UTF-8 text: change its encoding") from None
    return tokenizer.encode_prompt(prompt) or [tokenizer.eos_id]


def _known(settings: dict[str, Any], kind: Any) -> dict[str, Any]:
    names = {one.name for one in fields(kind)}
    for name in settings:
        if name not in names:
            raise ValueError(f"{name} is no setting: {', '.join(sorted(names))} are")
    return settings


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _check(delta: Delta) -> None:
    if delta.finish == "error":
        raise GenerationError(delta.error or "the sequence failed")


def _generated(parts: list[Delta], prompt_tokens: int) -> Generated:
    last = parts[-1]
    _check(last)
    assert last.finish is not None
    return Generated(
        "".join(part.text for part in parts),
        tuple(token for part in parts for token in part.tokens),
        prompt_tokens,
        last.finish,
        last.stop,
        tuple(one for part in parts for one in part.logprobs),
        parts[0].prompt_logprobs,
    )
