"""What clients write stays text: the name of a special token in a message does not become that token.

A mark that nobody can guess is put behind the first character of each such name before the template renders it, and
the rendered text is cut at the marks: no token reaches across a cut, and the template's own special tokens are whole.
A text without such names is rendered and encoded as if nothing of this were here.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from typing import Any

from ..models.tokenizer import Tokenizer

_DIGITS = 20  # templates that escape, trim or turn text to capitals leave digits alone


class Marks:
    """Of one tokenizer's special tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._names = [name for name in tokenizer.special_texts if len(name) > 1]
        self._beginnings = {name[:size] for name in self._names for size in range(1, len(name))}
        self._longest = max(map(len, self._names), default=1)

    def put(self, values: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """The values for a template with marks in all that a client wrote, and the mark."""
        mark = str(secrets.randbelow(10**_DIGITS)).zfill(_DIGITS)
        whole = "\0".join([*_texts(values["messages"]), *_texts(values["tools"])])
        names = sorted((name for name in self._names if name in whole), key=len, reverse=True)
        found = re.compile(f"(?s)(?=(?:{'|'.join(map(re.escape, names))}))(.)") if names else None

        def marked(value: Any) -> Any:
            if isinstance(value, str):
                return self._text(value if found is None else found.sub(rf"\g<1>{mark}", value), mark)
            if isinstance(value, dict):
                return {marked(key): marked(one) for key, one in value.items()}
            return [marked(one) for one in value] if isinstance(value, list) else value

        messages = [{**marked(one), "role": one["role"]} for one in values["messages"]]
        return {**values, "messages": messages, "tools": marked(values["tools"])}, mark

    def _text(self, text: str, mark: str) -> str:
        """A mark in a name's beginning that ends the text: what the template puts behind it could complete it."""
        end = text.rstrip()
        for size in range(min(self._longest, len(end)), 0, -1):
            if end[-size:] in self._beginnings:
                at = len(end) - size + 1
                return text[:at] + mark + text[at:]
        return text

    def encode(self, text: str, mark: str) -> list[int]:
        """The ids of a rendered text."""
        return self._tokenizer.encode_parts(text.split(mark))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for one in value:
            yield from _texts(one)
        if isinstance(value, dict):
            yield from _texts(list(value.values()))
