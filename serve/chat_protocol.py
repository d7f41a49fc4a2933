"""The request of a chat and what is in it: messages, tools, calls of tools (see `protocol`)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from ..infer.request import MOST_LOGPROBS
from .errors import ApiError
from .protocol import NOTHING, Generation, Label, Strict


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _text_alone(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind in ("image_url", "input_audio", "file", "video_url", "audio_url"):
            raise ApiError(400, f"a message has a part of type {kind}: this model takes text", param="messages")
        return value

    @model_validator(mode="after")
    def _its_own(self) -> Self:
        if getattr(self, self.type) is None:
            raise ValueError(f"a part of type {self.type} needs {self.type}")
        return self


class FunctionCall(Strict):
    """The function that a tool call names."""

    name: Annotated[str, Field(max_length=256)]
    arguments: str


class ToolCall(Strict):
    """A call that an earlier answer made."""

    id: Label
    type: Literal["function"]
    function: FunctionCall
    index: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Taken and not used: who puts a streamed answer together may leave it in."""


class Message(Strict):
    """Of a chat."""

    refused: ClassVar = {"audio": NOTHING, "function_call": NOTHING, "annotations": (None, [])}
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=1024, fail_fast=True)] | None = None
    name: Label | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    """Extension: what the model thought before its answer; templates that know it show it."""
    tool_calls: Annotated[list[ToolCall], Field(max_length=128, fail_fast=True)] | None = None
    tool_call_id: Label | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.refusal)):
            raise ValueError(f"a message of role {self.role} needs content")
        return self


class FunctionDefinition(Strict):
    """What a tool is."""

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+$")]
    description: Annotated[str, Field(max_length=1 << 16)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """That the model may be told of."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Strict):
    """Of a tool."""

    name: Annotated[str, Field(min_length=1, max_length=64)]


class ToolChoice(Strict):
    """The one tool that must be called."""

    type: Literal["function"]
    function: FunctionName


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    refused: ClassVar = {
        "audio": NOTHING,
        "function_call": NOTHING,
        "functions": NOTHING,
        "metadata": NOTHING,
        "modalities": (None, ["text"]),
        "moderation": NOTHING,
        "prediction": NOTHING,
        "prompt_cache_options": NOTHING,
        "prompt_cache_retention": NOTHING,
        "reasoning_effort": NOTHING,
        "service_tier": (None, "auto", "default"),
        "store": (None, False),
        "verbosity": NOTHING,
        "web_search_options": NOTHING,
        "chat_template": NOTHING,
        "chat_template_kwargs": NOTHING,
    }
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    """false: one call at most."""
    prompt_cache_key: Label | None = None
    """Taken and not used."""
    safety_identifier: Label | None = None
    """Taken and not used."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise ApiError(400, "max_tokens and max_completion_tokens differ: give one", param="max_tokens")
        self._check_choice()
        return self

    def _check_choice(self) -> None:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ApiError(400, "tools has two functions of one name", param="tools")
        if not self.forced:
            return
        if not names:
            raise ApiError(400, "tool_choice forces a call, but there are no tools", param="tool_choice")
        if isinstance(self.tool_choice, ToolChoice) and self.tool_choice.function.name not in names:
            message = "tool_choice names a function that is not among the tools"
            raise ApiError(400, message, param="tool_choice")
        if self.formatted:
            message = "a forced call is a form of the text, and another one is asked for: give one"
            raise ApiError(400, message, param="tool_choice")
        for tool in self.tools or ():
            if (tool.function.parameters or {}).get("type", "object") != "object":
                message = f"the parameters of {tool.function.name} are a schema of no object"
                raise ApiError(400, message, param="tools")

    @property
    def forced(self) -> bool:
        """Whether the answer must be a call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, ToolChoice)
