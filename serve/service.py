"""One request from its body to its answer: checked, turned into tokens off the event loop, handed to the engine."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request

from ..infer.outputs import Sink
from ..infer.request import SamplingParams
from .chat import ChatShape, rendered
from .chat_protocol import ChatRequest
from .completions import CompletionShape, prompts_of
from .errors import ApiError
from .flight import Flight, Hub, Prompt
from .parse import check, parse_json
from .plain import Marks
from .protocol import CompletionRequest, Generation
from .sampling import sampling
from .security import salt
from .settings import ServerSettings
from .shape import Shape
from .stream import Answer
from .templates import ChatTemplates
from .tool_forms import form_of

Value = TypeVar("Value")
_FIXED = ("dtype", "kv_dtype", "device", "draft")  # of the engine's report: what may change an answer


class Service:
    """What the routes call.

    Attributes:
        name: of the model, as clients call it.
        created: seconds since 1970 at which it began to serve.
    """

    def __init__(self, engine: Any, settings: ServerSettings, templates: ChatTemplates, metrics: Any) -> None:
        self.engine, self.settings, self.templates, self.metrics = engine, settings, templates, metrics
        self.name, self.created = engine.name, int(time.time())
        report = engine.report()
        told = "\0".join([self.name, *(str(report.get(name)) for name in _FIXED)])
        self.fingerprint = "fp_" + hashlib.sha256(told.encode()).hexdigest()[:12]
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="coterie-prepare")
        self._hub: Hub | None = None
        self._marks: Marks | None = None

    def close(self) -> None:
        """Ends its threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def completions(self, request: Request) -> Answer:
        """POST /v1/completions."""
        arrival = time.monotonic()
        body = check(CompletionRequest, await self._body(request))
        self._check_model(body)
        prompts = prompts_of(body)
        if len(prompts) > self.settings.max_prompts:
            message = f"prompt has {len(prompts)} prompts, but at most {self.settings.max_prompts} are taken"
            raise ApiError(400, message, param="prompt")
        if len(prompts) * (body.best_of or body.n or 1) > self.settings.max_choices:
            message = f"prompts times n or best_of is over {self.settings.max_choices}"
            raise ApiError(400, message, param="n")
        if isinstance(prompts[0], str):
            texts = [one for one in prompts if isinstance(one, str)]
            tokens = await self._encode(texts, self._prompt_ids)
            ready = [Prompt(ids, text) for ids, text in zip(tokens, texts, strict=True)]
        else:
            ready = [Prompt(one) for one in prompts if not isinstance(one, str)]
        id = f"cmpl-{secrets.token_hex(12)}"
        return await self._answer(request, body, ready, CompletionShape(*self._shape_of(id, body)), arrival)

    async def chat(self, request: Request) -> Answer:
        """POST /v1/chat/completions."""
        arrival = time.monotonic()
        body = check(ChatRequest, await self._body(request))
        self._check_model(body)
        for name, most in (("messages", self.settings.max_messages), ("tools", self.settings.max_tools)):
            if len(getattr(body, name) or ()) > most:
                raise ApiError(400, f"{name} has over {most} entries", param=name)
        if (body.n or 1) > self.settings.max_choices:
            raise ApiError(400, f"n is over {self.settings.max_choices}", param="n")
        tools = bool(body.tools) and body.tool_choice != "none"
        source = self.templates.source(tools)
        values = rendered(body, source)
        self._check_length(sum(len(one["content"]) for one in values["messages"]), "messages")
        tokens = await self._chat_ids(values)
        id = f"chatcmpl-{secrets.token_hex(12)}"
        shape = ChatShape(*self._shape_of(id, body))
        shape.look_for(form_of(source) if tools else None)
        return await self._answer(request, body, [Prompt(tokens)], shape, arrival)

    async def _chat_ids(self, values: dict[str, Any]) -> list[int]:
        """The tokens of a chat; see `plain`."""
        tokenizer = self._tokenizer("messages")
        self._marks = marks = self._marks or Marks(tokenizer)
        marked, mark = await self._off_loop(lambda: marks.put(values), "messages")
        text = await self.templates.render(marked)
        (ids,) = await self._encode([text], lambda text: marks.encode(text, mark), "messages")
        return ids

    async def _body(self, request: Request) -> dict[str, Any]:
        return parse_json(await request.body(), self.settings.max_json_depth)

    def _check_model(self, body: Generation) -> None:
        if body.model != self.name:
            message = f"there is no model {body.model[:80]!r} here, but {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _shape_of(self, id: str, body: Generation) -> tuple[Any, ...]:
        return id, self.name, self.fingerprint, body, self.engine.tokenizer

    def _check_length(self, characters: int, param: str) -> None:
        if characters > self.settings.max_prompt_characters:
            message = f"{param} has {characters} characters, over {self.settings.max_prompt_characters}"
            raise ApiError(400, message, param=param, code="context_length_exceeded")

    def _tokenizer(self, param: str) -> Any:
        if self.engine.tokenizer is None:
            raise ApiError(400, "this model has no tokenizer: give a prompt of token ids", param=param)
        return self.engine.tokenizer

    def _prompt_ids(self, text: str) -> list[int]:
        tokenizer = self._tokenizer("prompt")
        return tokenizer.encode_prompt(text) or [tokenizer.eos_id]

    async def _encode(
        self, texts: Sequence[str], encode: Callable[[str], list[int]], param: str = "prompt"
    ) -> list[list[int]]:
        self._tokenizer(param)
        self._check_length(sum(map(len, texts)), param)
        return await self._off_loop(lambda: [encode(text) for text in texts], param)

    async def _off_loop(self, work: Callable[[], Value], param: str) -> Value:
        try:
            async with asyncio.timeout(self.settings.prepare_timeout_s):
                return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except TimeoutError:
            raise ApiError(503, f"{param} took too long to prepare", param=param, retry_after=1) from None

    async def _grammar(self, body: Generation, wanted: tuple[str, str] | None) -> Any:
        if wanted is None:
            return None
        param = "response_format" if body.response_format else "tools"
        param = "structured_outputs" if body.structured_outputs else param
        tokenizer = self._tokenizer(param)

        def compile() -> Any:
            from ..infer.grammar import GrammarSpec, compile_grammar

            spec = GrammarSpec(wanted[0], wanted[1])  # type: ignore[arg-type]
            return compile_grammar(spec, tokenizer, eos_ids=self.engine.eos_ids, vocabulary=self.engine.vocabulary)

        return await self._off_loop(compile, param)

    async def _answer(
        self, request: Request, body: Generation, prompts: list[Prompt], shape: Shape, arrival: float
    ) -> Answer:
        deadline = arrival + self.settings.request_timeout_s
        room, defaults = self.engine.max_model_len, self.engine.defaults
        params = [sampling(body, len(prompt.tokens), room, defaults) for prompt in prompts]
        if shape.opening is not None:
            params = [replace(one, skip_special_tokens=False) for one in params]
        grammar = await self._grammar(body, shape.grammar())
        shape.begin(prompts)
        if self._hub is None:
            self._hub = Hub()
        flight = Flight(self._hub, self.engine, self.metrics, shape.id, (arrival, deadline))
        own = salt(request.scope.get("identity", ""), body.cache_salt)
        try:
            for number, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
                submit = partial(self._submit, prompt, one, own, deadline, grammar, bool(body.routes))
                await flight.submit(number, prompt, submit, one.n)
        except BaseException:
            flight.abort()
            raise
        return Answer(flight, shape)

    def _submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        salt: str,
        deadline: float,
        grammar: Any,
        routes: bool,
        sink: Sink,
        id: str,
    ) -> str:
        return self.engine.submit(
            prompt.tokens, params, sink, id=id, salt=salt, deadline=deadline, grammar=grammar, routes=routes
        )
