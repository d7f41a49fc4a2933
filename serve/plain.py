"""What clients write stays text: the name of a special token in a message does not become that token.

A mark that nobody can guess is put into each such name before the template renders it, and the rendered text is cut
at the marks: no token reaches across a cut, and the template's own special tokens are whole. A text without such
names is rendered and encoded as if nothing of this were here.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from typing import Any

from ..models.tokenizer import Tokenizer

_DIGITS = 20  # templates that escape, trim or turn text to capitals leave digits alone


class Marks:
    """Of one tokenizer's special tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        texts = sorted((text for text in tokenizer.special_texts if len(text) > 1), key=len, reverse=True)
        names = "|".join(map(re.escape, texts))
        self._tokenizer = tokenizer
        self._begins = re.compile(f"(?s)(?=(?:{names}))(.)") if texts else None
        self._beginnings = {text[:size] for text in texts for size in range(1, len(text))}
        self._longest = max(map(len, texts), default=1)

    def put(self, values: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """The values for a template with marks in all that a client wrote, and the mark."""
        mark = str(secrets.randbelow(10**_DIGITS)).zfill(_DIGITS)
        if self._begins is None:
            return values, mark
        messages = [{**self._marked(one, mark), "role": one["role"]} for one in values["messages"]]
        return {**values, "messages": messages, "tools": self._marked(values["tools"], mark)}, mark

    def _marked(self, value: Any, mark: str) -> Any:
        if isinstance(value, str):
            return self._text(value, mark)
        if isinstance(value, dict):
            return {self._text(key, mark): self._marked(one, mark) for key, one in value.items()}
        return [self._marked(one, mark) for one in value] if isinstance(value, list) else value

    def _text(self, text: str, mark: str) -> str:
        """A mark behind the first character of each name, and of a name's beginning that ends the text: what the
        template puts behind it could complete it."""
        assert self._begins is not None
        text = self._begins.sub(rf"\g<1>{mark}", text)
        end = text.rstrip()
        for size in range(min(self._longest, len(end)), 0, -1):
            if end[-size:] in self._beginnings:
                at = len(end) - size + 1
                return text[:at] + mark + text[at:]
        return text

    def encode(self, text: str, mark: str) -> list[int]:
        """The ids of a rendered text."""
        parts: Sequence[str] = text.split(mark)
        return self._tokenizer.encode_parts(parts)
