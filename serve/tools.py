"""Calls of tools in a text that comes piece by piece."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple, NoReturn

from .tool_forms import Form

MOST_CALLS = 128  # of one answer; more are dropped
MOST_HELD = 1 << 16  # characters that may wait until it is known whether they are a call
_MOST_SPACE = 1024  # characters of white space that may wait
_HEAD = re.compile(r'\{\s*"name"\s*:\s*"([^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*\{')


class Event(NamedTuple):
    """What a piece of the text turned out to be. The `raw` of all events is the text."""

    raw: str
    content: str = ""
    call: int | None = None
    """The number of the call that it belongs to."""
    name: str = ""
    """The call begins."""
    arguments: str = ""
    """More of its arguments, JSON."""


class Calls:
    """Finds calls in one text that comes in pieces; how it is cut changes nothing but the cuts of what is told.

    A call is told once its name and the beginning of its arguments are there; what never comes so far is content. So
    is a call of a tool that nobody offered. White space before a call, and after the last one, is dropped.
    """

    def __init__(self, form: Form, names: Collection[str], most: int = MOST_CALLS) -> None:
        """
        Args:
            names: of the tools.
            most: calls; more are dropped.
        """
        self._form, self._names, self._most = form, names, most
        self.count = 0
        self._raw, self._held = "", ""  # what is known to open a call, and what is not known yet
        self._state = self._text
        self._begin_object()

    def _begin_object(self) -> None:
        self._at, self._depth = 0, 0
        self._in_string = self._escaped = self._streaming = False

    def push(self, text: str) -> list[Event]:
        """What is certain with this piece."""
        self._held += text
        events: list[Event] = []
        while (found := self._state()) is not None:
            events += found
        return events

    def finish(self) -> list[Event]:
        """The rest, as nothing follows."""
        raw, self._raw, self._held = self._raw + self._held, "", ""
        if not raw:
            return []
        told = self._state in (self._object, self._after) and (self._streaming or self._state == self._after)
        dropped = told or (self.count and not raw.strip())
        return [Event(raw, call=self._index if told else None) if dropped else Event(raw, raw)]

    @property
    def _index(self) -> int | None:
        """Of the last call; None: it is one too many."""
        return self.count - 1 if self.count <= self._most else None

    def _text(self) -> list[Event] | None:
        """Before a call, or between two."""
        held, form = self._held, self._form
        if not form.open:
            held = held.lstrip()
            if not held:
                return None
            self._state = self._opened if held[0] == "{" else self._rest
            return []
        at = held.find(form.open)
        certain = held[: at if at >= 0 else len(held) - _overlap(held, form.open)]
        certain = certain.rstrip() if len(certain) < _MOST_SPACE or not certain.isspace() else certain
        self._held = held[len(certain) :]
        if at >= 0:
            self._raw, self._held = held[len(certain) : at] + form.open, held[at + len(form.open) :]
            self._state = self._opened
        elif not certain:
            return None
        return [Event(certain, certain)] if certain else []

    def _rest(self) -> list[Event] | None:
        """No call can follow."""
        held, self._held = self._held, ""
        return [Event(held, held)] if held else None

    def _opened(self) -> list[Event] | None:
        """After what opens a list of calls."""
        return self._expect(self._form.first, self._next) if self._form.first else self._next()

    def _next(self) -> list[Event] | None:
        """Before an object."""
        held = self._held.lstrip()
        if held[:1] == "{":
            self._raw, self._held = self._raw + self._held[: -len(held)], held
            self._begin_object()
            self._state = self._object
            return []
        return self._give_up(0) if held or len(self._held) > MOST_HELD else None

    def _expect(self, char: str, then: Any) -> list[Event] | None:
        held = self._held.lstrip()
        if held[:1] != char:
            return self._give_up(0) if held or len(self._held) > MOST_HELD else None
        self._raw += self._held[: len(self._held) - len(held) + 1]
        self._held, self._state = held[1:], then
        return []

    def _give_up(self, count: int) -> list[Event]:
        """It was no call, with the next `count` characters."""
        raw, self._raw, self._held = self._raw + self._held[:count], "", self._held[count:]
        self._state = self._text if self._form.open else self._rest
        return [Event(raw, raw)] if raw else []

    def _object(self) -> list[Event] | None:
        """Within a call. The scan goes on where it stopped."""
        begun = self._depth > 1 and self._streaming
        for at in range(self._at, len(self._held)):
            before, depth = self._depth, self._scan(self._held[at])
            if depth == 2 > before and not self._streaming and (head := _HEAD.fullmatch(self._held, 0, at + 1)):
                if head[1] in self._names:
                    return [self._begin(head[1], at)]
            elif begun and depth == 1:
                return [self._arguments(at + 1)]
            elif depth == 0:
                return self._closed(at + 1)
        self._at = len(self._held)
        if begun and self._held:
            return [self._arguments(len(self._held))]
        if not self._streaming and len(self._held) > MOST_HELD:
            return self._give_up(len(self._held))
        return None

    def _scan(self, char: str) -> int:
        """The depth after one character."""
        if self._escaped:
            self._escaped = False
        elif self._in_string:
            self._escaped, self._in_string = char == "\\", char != '"'
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
        else:
            self._in_string = char == '"'
        return self._depth

    def _begin(self, name: str, at: int) -> Event:
        self.count += 1
        raw = self._raw + self._held[:at]
        self._raw, self._held, self._at, self._streaming = "", self._held[at:], 1, True
        index = self._index
        return Event(raw) if index is None else Event(raw, call=index, name=name)

    def _arguments(self, end: int) -> Event:
        raw, self._held, self._at = self._held[:end], self._held[end:], 0
        index = self._index
        return Event(raw) if index is None else Event(raw, call=index, arguments=raw)

    def _closed(self, end: int) -> list[Event]:
        """The object is whole."""
        if self._streaming:
            raw, self._held = self._held[:end], self._held[end:]
            self._state = self._after
            return [Event(raw, call=self._index)]
        call = _call(self._held[:end], self._names)
        if call is None:
            return self._give_up(end)
        events = [self._begin(call[0], end)]
        self._state = self._after
        return events if events[0].call is None else [events[0]._replace(arguments=call[1])]

    def _after(self) -> list[Event] | None:
        """Behind a call: another one, or the end of its list."""
        held, form = self._held.lstrip(), self._form
        if not held or (held != form.end and form.end.startswith(held)):
            return None
        space = len(self._held) - len(held)
        if form.between and held[0] == form.between:
            raw, self._held, self._state = self._held[: space + 1], held[1:], self._next
            return [Event(raw, call=self._index)]
        if form.end and held.startswith(form.end):
            raw, self._held = self._held[: space + len(form.end)], held[len(form.end) :]
            self._state = self._text
            return [Event(raw, call=self._index)]
        self._state = self._text if form.open or held[0] == "{" else self._rest
        return []


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of a text could begin the mark."""
    return next((size for size in range(len(mark) - 1, 0, -1) if text.endswith(mark[:size])), 0)


def _call(text: str, names: Collection[str]) -> tuple[str, str] | None:
    """The name and the arguments of a whole object, whatever the order of its keys; None: it is no call."""
    told = _loads(text)
    if not isinstance(told, dict):
        return None
    arguments = told.get("arguments", told.get("parameters"))
    name = told.get("name")
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        return None
    return name, json.dumps(arguments, ensure_ascii=False)


def call_id() -> str:
    """Nine letters and digits: Mistral's templates take no other."""
    return secrets.token_hex(5)[:9]


def whole(events: Iterable[Event]) -> tuple[str, list[dict[str, Any]]]:
    """The content and the calls of a text that is all there. A call whose arguments are no JSON object is content."""
    events = list(events)
    told: dict[int, list[str]] = {}  # the name, the arguments
    for event in events:
        if event.call is not None:
            one = told.setdefault(event.call, ["", ""])
            one[0], one[1] = one[0] + event.name, one[1] + event.arguments
    good = {index: one for index, one in told.items() if isinstance(_loads(one[1]), dict)}
    bad = told.keys() - good.keys()
    content = "".join(event.raw if event.call in bad else event.content for event in events)
    calls = [
        {"id": call_id(), "type": "function", "function": {"name": name, "arguments": arguments}}
        for name, arguments in good.values()
    ]
    return content, calls


def _loads(text: str) -> Any:
    """What JSON says; None: it is none."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")
