"""A request's body, from bytes to a checked model: nothing deep, no number that is none, no parameter that is not
known."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from .errors import ApiError

Model = TypeVar("Model", bound=BaseModel)

# The end of the string is optional and nothing is given back: one that does not end costs no second look.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_BRACKETS = b"[]{}"
_ALL_ELSE = bytes(byte for byte in range(256) if byte not in _BRACKETS)
_SQUARE = bytes.maketrans(b"{}", b"[]")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

_HINTS = {
    "prompt": "give a text, token ids, or a list of either",
    "stop": "give a string or a list of strings",
    "messages": "give a list of messages, each with a role and a content",
    "tool_choice": 'give "none", "auto", "required" or {"type": "function", "function": {"name": ...}}',
    "response_format": "give an object whose type is text, json_object or json_schema",
    "logit_bias": "give token ids and a bias of -100 to 100 for each",
}


def is_deep(raw: bytes, most: int) -> bool:
    """Whether brackets lie within more than `most` others, or do not pair; in time linear in the text."""
    brackets = _STRING.sub(b"", raw).translate(_SQUARE, _ALL_ELSE)
    for _ in range(most):  # each round takes the innermost pairs
        if not brackets:
            return False
        brackets = brackets.replace(b"[]", b"")
    return bool(brackets)


def parse_json(raw: bytes, depth: int) -> dict[str, Any]:
    """The object that a body holds.

    Args:
        raw: UTF-8.
        depth: of brackets at most.

    Raises:
        ApiError: 400: too deep, not JSON, not an object; a number that is NaN or infinite; a lone surrogate.
    """
    if is_deep(raw, depth):
        raise ApiError(400, f"the body is not JSON, or has brackets within more than {depth} others")
    try:
        text = raw.decode()
        value = json.loads(text, parse_constant=_constant, parse_float=_float)
        if _SURROGATE.search(raw):
            json.dumps(value, ensure_ascii=False).encode()
    except ApiError:
        raise
    except UnicodeEncodeError:
        raise ApiError(400, "the body has half of a surrogate pair, which is no character") from None
    except (ValueError, RecursionError) as error:
        at = f" at character {error.pos}: {error.msg}" if isinstance(error, json.JSONDecodeError) else ""
        raise ApiError(400, f"the body is not JSON{at}") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is a JSON {_kind(value)}: give an object")
    return value


def _constant(word: str) -> NoReturn:
    raise ApiError(400, f"the body has the number {word}: give finite numbers")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ApiError(400, "the body has a number that is too large: give finite numbers")
    return value


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    return {str: "string", list: "array"}.get(type(value), "number")


def check(kind: type[Model], value: dict[str, Any]) -> Model:
    """The request that an object means. ApiError 400 names the parameter that is wrong."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _told(error) from None


def _told(error: ValidationError) -> ApiError:
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    first = problems[0]
    param = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "missing":
        return ApiError(400, f"{_path(first['loc'])} is missing", param=param, code="missing_required_parameter")
    if param is None:
        return ApiError(400, first["msg"])
    several = sum(problem["loc"][:1] == first["loc"][:1] for problem in problems) > 1
    where = param if several else _path(first["loc"])
    what = _HINTS.get(param, first["msg"]) if several else first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{where}: {what}", param=param, code="invalid_value")


def _path(place: tuple[int | str, ...]) -> str:
    names = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in place]
    return "".join(names).lstrip(".")[:80]
