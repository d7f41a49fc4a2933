"""How big a regular expression or a Lark grammar is once its repetitions are written out, before a library sees it.

A few characters such as `((a{100}){100}){100}` make a library that works on expressions take all memory there is, so
they are measured first. No torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from .request import RequestError

LONGEST_REGEX = 1 << 14  # characters; some expressions of length n take n^2
MOST_STATES = 1 << 16
DEEPEST = 64

_REPEAT = re.compile(r"\{(\d{1,9})?(,)?(\d{1,9})?\}")
_VERBOSE = re.compile(r"\(\?[a-zA-Z-]*x")
_PROPERTY = re.compile(r"[pPxuU]\{[^}]{0,64}\}")


def check_regex(pattern: str) -> int:
    """The pattern's size: its characters with every `{m,n}` repeated n times.

    Raises:
        RequestError: it is too long, too big or too deep; or it is written in verbose mode.
    """
    if len(pattern) > LONGEST_REGEX:
        raise RequestError(f"a regular expression of {len(pattern)} characters is over the {LONGEST_REGEX} allowed")
    if _VERBOSE.search(pattern):
        raise RequestError("a regular expression uses the flag x: write it without spaces and comments")
    sums, last, at = [0], 0, 0  # of each open group; of the last thing, which a repetition multiplies
    while at < len(pattern):
        char, repeat = pattern[at], _REPEAT.match(pattern, at)
        if repeat and repeat.end() - at > 2:
            times = max(_most(repeat), 1)
            sums[-1] += last * (times - 1)
            last, at = last * times, repeat.end()
            _check_size(sums[-1])
            continue
        if char == "(":
            sums.append(0)
            if len(sums) > DEEPEST:
                raise RequestError(f"a regular expression has over {DEEPEST} open groups: make it flatter")
        elif char == ")" and len(sums) > 1:
            last = sums.pop() + 1
            sums[-1] += last
        elif char not in "*+?":
            last = 1
            sums[-1] += 1
        at = _after(pattern, at)
    _check_size(sum(sums))
    return sum(sums)


def _most(repeat: re.Match[str]) -> int:
    """The n of {n}, {m,n}, {,n}; {m,} repeats m times and then loops."""
    low, comma, high = repeat.groups()
    return int(high or low or 1) if comma else int(low or 1)


def _after(pattern: str, at: int) -> int:
    """Past the character, escape or class at `at`."""
    if pattern[at] == "\\":
        escape = _PROPERTY.match(pattern, at + 1)
        return escape.end() if escape else at + 2
    if pattern[at] != "[":
        return at + 1
    depth = 0
    while at < len(pattern):
        char = pattern[at]
        if char == "[":
            depth += 1
            at += pattern[at + 1 : at + 2] == "^"
            at += pattern[at + 1 : at + 2] == "]"  # the first one in a class stands for itself
        elif char == "]":
            depth -= 1
            if not depth:
                return at + 1
        at += 2 if char == "\\" else 1
    return at


def _check_size(size: int) -> None:
    if size > MOST_STATES:
        raise RequestError(
            f"a regular expression has over {MOST_STATES} characters with its repetitions written out: "
            "repeat less, or nest repetitions less deeply"
        )


def check_schema(text: str) -> dict[str, Any]:
    """The JSON schema, of which every pattern has been checked. RequestError where it is none."""
    schema = load_json(text, "the JSON schema")
    if not isinstance(schema, dict):
        raise RequestError('the JSON schema is no object: give one such as {"type": "object"}')
    open_ = [schema]
    while open_:
        one = open_.pop()
        if isinstance(one, dict):
            if isinstance(pattern := one.get("pattern"), str):
                check_regex(pattern)
            if isinstance(patterns := one.get("patternProperties"), dict):
                for pattern in patterns:
                    check_regex(pattern)
            if "x-guidance" in one:
                raise RequestError("the JSON schema has the key x-guidance: options of the library cannot be set")
        open_ += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
    return schema


def load_json(text: str, name: str) -> Any:
    """JSON of at most DEEPEST levels, without NaN and infinities. RequestError where it is none."""
    deepest = depth = 0
    for char in re.sub(r'"(?:[^"\\]|\\.)*+"', "", text, flags=re.DOTALL):
        depth += (char in "[{") - (char in "]}")
        deepest = max(deepest, depth)
    if deepest > DEEPEST:
        raise RequestError(f"{name} has {deepest} levels, but at most {DEEPEST} are taken")
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name} is not JSON: {error}") from None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


_LARK = re.compile(
    r"""(?P<comment>//[^\n]*|\#[^\n]*)
    |(?P<text>"(?:[^"\\\n]|\\.)*+"i?)
    |(?P<regex>/(?!/)(?:[^/\\\n]|\\.)++/[a-z]*)
    |(?P<definition>^[ \t]*[!?]*[A-Za-z_][\w-]*(?:\.-?\d+)?(?:\[[^\]\n]*\])?[ \t]*:)
    |(?P<directive>%[A-Za-z]+)
    |(?P<name>[A-Za-z_][\w-]*)
    |(?P<repeat>\{[ \t]*\d*[ \t]*,?[ \t]*\d*[ \t]*\}|~[ \t]*\d+(?:[ \t]*\.\.[ \t]*\d+)?)
    |(?P<open>[(\[])|(?P<close>[)\]])
    |(?P<other>.|\n)""",
    re.VERBOSE | re.MULTILINE,
)
_DIRECTIVES = ("%import", "%ignore", "%json", "%llguidance")


def check_lark(text: str) -> None:
    """Checks every expression of a grammar, and the size of its terminals with those that they name written out.

    Raises:
        RequestError: one is too big, or a directive is not among import, ignore, json and llguidance.
    """
    bodies: dict[str, list[tuple[str, str]]] = {}
    body: list[tuple[str, str]] = []
    for kind, word in _words(text):
        if kind == "definition":
            name = re.sub(r"[\s!?:]|\..*|\[.*", "", word)
            body = bodies.setdefault(name, [])
        else:
            body.append((kind, word))
    sizes: dict[str, int] = {}
    for name in bodies:
        if name.isupper():
            _size(name, bodies, sizes, 0)


def _words(text: str) -> Iterator[tuple[str, str]]:
    at = 0
    while (found := _LARK.match(text, at)) is not None:
        kind, word, at = str(found.lastgroup), found.group(), found.end()
        if kind == "regex":
            check_regex(word[1 : word.rindex("/")])
        elif kind == "directive":
            if word not in _DIRECTIVES:
                raise RequestError(f"the grammar has {word[:40]}: only {', '.join(_DIRECTIVES)} are taken")
            if word == "%json":
                at = _after_json(text, at)
        if kind != "comment" and not word.isspace():
            yield kind, word


def _after_json(text: str, at: int) -> int:
    at += len(text[at:]) - len(text[at:].lstrip())
    try:
        end = json.JSONDecoder().raw_decode(text, at)[1]
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the grammar's %json is not followed by JSON: {error}") from None
    check_schema(text[at:end])
    return end


def _size(name: str, bodies: dict[str, list[tuple[str, str]]], sizes: dict[str, int], depth: int) -> int:
    """Of a terminal; one that names itself is the library's to refuse."""
    if name in sizes or name not in bodies:
        return sizes.get(name, 1)
    if depth > DEEPEST:
        raise RequestError(f"a terminal names others over {DEEPEST} deep: make them flatter")
    sizes[name] = 1
    sums, last = [0], 0
    for kind, word in bodies[name]:
        if kind == "repeat":
            times = max(map(int, re.findall(r"\d+", word)), default=1)
            sums[-1] += last * (max(times, 1) - 1)
            last *= max(times, 1)
        elif kind == "open":
            sums.append(0)
        elif kind == "close" and len(sums) > 1:
            last = sums.pop() + 1
            sums[-1] += last
        elif kind in ("text", "regex", "name"):
            last = _size(word, bodies, sizes, depth + 1) if kind == "name" else len(word)
            if kind == "regex":
                last = check_regex(word[1 : word.rindex("/")])
            sums[-1] += last
        _check_size(sum(sums))
    sizes[name] = sum(sums)
    return sizes[name]
