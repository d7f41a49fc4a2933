"""The requests that OpenAI's API and its usual extensions have, as pydantic models.

Types are strict: true is no number, "1" is no number, 1.0 is no count. A parameter that is documented but not served
is refused by its name, unless it has the value that changes nothing; so is one that nobody knows.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ..infer.request import LONGEST_STOP, MOST_BIASES, MOST_LOGPROBS, MOST_SAMPLES, MOST_STOP_IDS, MOST_STOPS
from .errors import ApiError

Token = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Token], Field(fail_fast=True)]
Text = Annotated[list[str], Field(fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Label = Annotated[str, Field(max_length=512)]
NOTHING: tuple[Any, ...] = (None,)


def _biases(value: Any) -> Any:
    """JSON has no numbers for keys."""
    if not isinstance(value, dict):
        return value
    if len(value) > MOST_BIASES:
        raise ValueError(f"has {len(value)} entries, but at most {MOST_BIASES} are taken")
    return {
        int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key: value[key] for key in value
    }


Biases = Annotated[
    dict[Annotated[int, Field(ge=0, lt=2**31)], Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_biases)
]


class Strict(BaseModel):
    """Refuses unknown names before it looks at any value, so that a million of them cost nothing."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Documented names that are not served, and the values of each that are as good as none."""

    @model_validator(mode="before")
    @classmethod
    def _known_names(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        known = {field.alias or name for name, field in cls.model_fields.items()}
        for name in value:
            if name in cls.refused:
                if value[name] not in cls.refused[name]:
                    raise ApiError(400, f"{name} is not served here", param=name, code="unsupported_parameter")
            elif name not in known:
                shown = str(name)[:80]
                raise ApiError(400, f"unknown parameter {shown!r}", param=shown, code="unknown_parameter")
        return {name: value[name] for name in value if name not in cls.refused}


class StreamOptions(Strict):
    """Of a streamed answer."""

    refused: ClassVar = {"include_obfuscation": (None, False)}
    include_usage: bool | None = None
    """End with a chunk that counts the tokens."""


class JsonSchema(Strict):
    """Of a response_format."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: Annotated[str, Field(max_length=4096)] | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None
    """Whether or not, the text follows the schema."""


class ResponseFormat(Strict):
    """What form the text must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("json_schema belongs to the type json_schema, and to no other")
        return self


class StructuredOutputs(Strict):
    """An extension of vLLM's: one of these."""

    json_: Annotated[dict[str, Any] | None, Field(alias="json")] = None
    regex: Annotated[str, Field(min_length=1, max_length=1 << 16)] | None = None
    grammar: Annotated[str, Field(min_length=1, max_length=1 << 16)] | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=1024, fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(one is not None for one in (self.json_, self.regex, self.grammar, self.choice)) != 1:
            raise ValueError("give one of json, regex, grammar and choice")
        return self


class Generation(Strict):
    """What both APIs take. null means the default everywhere."""

    model: Annotated[str, Field(max_length=512)]
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Biases | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_SAMPLES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    user: Label | None = None
    """Taken and not used."""

    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    """Extension: 0 and -1 mean all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Extension."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    """Extension."""
    ignore_eos: bool | None = None
    """Extension."""
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Extension."""
    stop_token_ids: Annotated[list[Token], Field(max_length=MOST_STOP_IDS, fail_fast=True)] | None = None
    """Extension."""
    return_token_ids: bool | None = None
    """Extension: choices carry token_ids, and the prompt's as prompt_token_ids."""
    routes: bool | None = None
    """Extension: choices carry for each token and MoE layer the experts that computed it."""
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """Extension: cached prompts are shared only between requests of one key and one salt."""
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    """Extension."""

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is for stream: true alone", param="stream_options")
        told = self.response_format
        if self.structured_outputs is not None and told is not None and told.type != "text":
            message = "structured_outputs and response_format say both what form the text has: give one"
            raise ApiError(400, message, param="structured_outputs")
        return self

    @property
    def formatted(self) -> bool:
        """Whether the text must have a form."""
        told = self.response_format
        return self.structured_outputs is not None or (told is not None and told.type != "text")


class CompletionRequest(Generation):
    """POST /v1/completions."""

    refused: ClassVar = {"suffix": (None, "")}
    prompt: (
        str
        | Annotated[list[str], Field(fail_fast=True, min_length=1)]
        | Annotated[list[Token], Field(fail_fast=True, min_length=1)]
        | Annotated[
            list[Annotated[list[Token], Field(fail_fast=True, min_length=1)]], Field(fail_fast=True, min_length=1)
        ]
    )
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """0: nothing but the echo."""
    best_of: Annotated[int, Field(ge=1, le=MOST_SAMPLES)] | None = None
    echo: bool | None = None
    """The prompt's text before the answer's; with logprobs, its tokens' before theirs."""
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        n = self.n or 1
        if self.best_of is not None and self.best_of < n:
            raise ApiError(400, f"best_of {self.best_of} is under n {n}", param="best_of")
        if self.stream and (self.best_of or n) > n:
            raise ApiError(
                400, "best_of over n cannot be streamed: which are best is known at the end", param="best_of"
            )
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens 0 leaves nothing to answer without echo: true", param="max_tokens")
        return self


class ErrorDetail(BaseModel):
    """Of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What every refusal and failure looks like."""

    error: ErrorDetail
