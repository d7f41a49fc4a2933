"""Chat templates: from the checkpoint alone, rendered in a process of their own that is killed when it takes long."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import struct
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path
from typing import Any

from ..models.files import is_there, open_checked, read_json
from .errors import ApiError
from .settings import KEYS_VARIABLE, ServerSettings

_SOURCE_BYTES = 1 << 20
_START_S = 10.0  # a process may take that long to be there
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_WORKER = Path(__file__).with_name("template_worker.py")


class ChatTemplates:
    """The templates of one checkpoint.

    Attributes:
        sources: by name: "default", and what else there is, such as "tool_use".
        special: texts of the special tokens, as templates name them.
    """

    def __init__(self, sources: dict[str, str], special: dict[str, str], settings: ServerSettings) -> None:
        self.sources, self.special = sources, special
        self._workers = {name: Worker(source, settings) for name, source in sources.items()}

    def source(self, tools: bool) -> str:
        """The template for a chat with or without tools. ApiError 400: the checkpoint has none."""
        if not self.sources:
            message = "this model has no chat template (chat_template.jinja): use /v1/completions"
            raise ApiError(400, message, code="no_chat_template")
        return self.sources[self._name(tools)]

    def _name(self, tools: bool) -> str:
        return "tool_use" if tools and "tool_use" in self.sources else next(iter(self.sources))

    async def render(self, values: dict[str, Any]) -> str:
        """The text of a chat. ApiError 400: the template does not take it, or it costs too much."""
        worker = self._workers[self._name(bool(values.get("tools")))]
        return await worker.render({**self.special, **values, "add_generation_prompt": True})

    async def start(self) -> None:
        """Starts what the first chat needs, so that it need not wait."""
        for name in list(self._workers)[:1]:
            with contextlib.suppress(ApiError):
                await self._workers[name].warm()

    async def close(self) -> None:
        """Ends the processes."""
        for worker in self._workers.values():
            await worker.kill()


def load_templates(folder: Path | None, settings: ServerSettings) -> ChatTemplates:
    """What chat_template.jinja, or else tokenizer_config.json, of a model directory says.

    Raises:
        ValueError: a file is damaged, too large, or leads out of the directory.
    """
    if folder is None:
        return ChatTemplates({}, {}, settings)
    config = folder / "tokenizer_config.json"
    told = read_json(config) if is_there(config) else {}
    special = {name: _text(told.get(name)) for name in _SPECIAL}
    own = folder / "chat_template.jinja"
    found: Any = told.get("chat_template")
    if is_there(own):
        with open_checked(own, _SOURCE_BYTES) as file:
            found = file.read().decode(errors="replace")
    if isinstance(found, list):
        pairs = [(one.get("name"), one.get("template")) for one in found if isinstance(one, dict)]
        found = dict(sorted(pairs, key=lambda pair: pair[0] != "default")) if pairs else None
    sources = {"default": found} if isinstance(found, str) else found or {}
    if not isinstance(sources, dict) or not all(isinstance(x, str) for pair in sources.items() for x in pair):
        raise ValueError(f"{config} has a chat_template that is neither a text nor a list of named texts")
    if sum(map(len, sources.values())) > _SOURCE_BYTES:
        raise ValueError(f"{config} has chat templates of over {_SOURCE_BYTES} characters")
    return ChatTemplates(sources, {name: text for name, text in special.items() if text is not None}, settings)


def _text(token: Any) -> str | None:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


class Worker:
    """One process with one template; a chat at a time. What takes too long is killed, and the next chat gets another
    process."""

    def __init__(self, source: str, settings: ServerSettings) -> None:
        self._first = {
            "source": source,
            "memory": settings.template_memory,
            "characters": settings.template_characters,
        }
        self._seconds = settings.template_timeout_s
        self._most = settings.template_characters * 12 + 4096  # JSON may write a character with 12 bytes
        self._process: Process | None = None
        self._lock = asyncio.Lock()

    async def render(self, values: dict[str, Any]) -> str:
        """One chat's text. ApiError: 400: it cannot be rendered; 500: the template cannot be used at all."""
        async with self._lock:
            process = await self._alive()
            try:
                async with asyncio.timeout(self._seconds):
                    answer = await self._ask(process, values)
            except TimeoutError:
                await self.kill()
                raise ApiError(400, f"rendering the chat took over {self._seconds:g} s", param="messages") from None
            except (OSError, EOFError):
                await self.kill()
                raise ApiError(400, "rendering the chat took too much memory", param="messages") from None
            except BaseException:
                await self.kill()  # half an answer may be under way
                raise
        if "error" in answer:
            raise ApiError(400, answer["error"], param="messages")
        return answer["text"]

    async def warm(self) -> None:
        """Has the process ready."""
        async with self._lock:
            await self._alive()

    async def _alive(self) -> Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        environment = {name: value for name, value in os.environ.items() if name != KEYS_VARIABLE}
        command = (sys.executable, "-P", str(_WORKER))
        process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, env=environment)
        self._process = process
        try:
            async with asyncio.timeout(_START_S):
                answer = await self._ask(process, self._first)
        except BaseException as error:
            await self.kill()
            if not isinstance(error, TimeoutError | OSError | EOFError):
                raise
            raise ApiError(500, "the chat template's process does not start", code="chat_template") from None
        if "error" in answer:
            await self.kill()
            raise ApiError(500, "the model's chat template is damaged", code="chat_template")
        return process

    async def _ask(self, process: Process, message: dict[str, Any]) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        raw = json.dumps(message).encode()
        process.stdin.write(struct.pack(">I", len(raw)) + raw)
        await process.stdin.drain()
        length = struct.unpack(">I", await process.stdout.readexactly(4))[0]
        if length > self._most:
            raise EOFError
        return json.loads(await process.stdout.readexactly(length))

    async def kill(self) -> None:
        """Ends the process, whatever it does."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
