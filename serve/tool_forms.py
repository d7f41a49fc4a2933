"""The forms in which models write calls of tools: as chat templates show them, and as grammars that force one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Form:
    """How a call is written: `open`, `first`, objects with `between` in between, `end`."""

    open: str
    """"": the text itself begins with a call."""
    first: str
    between: str
    end: str
    key: str
    """What the arguments are called; both names are read in every form."""
    space: str = ""
    """Written after `open` and before `end`; any white space is read."""


HERMES = Form("<tool_call>", "", "", "</tool_call>", "arguments", "\n")
MISTRAL = Form("[TOOL_CALLS]", "[", ",", "]", "arguments")
LLAMA = Form("", "", ";", "", "parameters")

_HERMES = re.compile(r'<tool_call>(?:\s|\\n)*\{+\\*"(?:name|arguments)\\*"')
_LLAMA = re.compile(r'\\*"name\\*": function name, \\*"parameters\\*"')


def form_of(template: str) -> Form | None:
    """The form that a chat template shows to its model; None: none that is known."""
    if _HERMES.search(template):
        return HERMES
    if "[TOOL_CALLS]" in template and "[ARGS]" not in template and "[CALL_ID]" not in template:
        return MISTRAL
    return LLAMA if _LLAMA.search(template) else None


def forced(form: Form, tools: Mapping[str, dict[str, Any]], *, several: bool, token: int | None) -> str:
    """A grammar, as `GrammarSpec` takes one of tools: one call or more, and nothing else.

    Args:
        tools: what may be called, and the JSON schema of its arguments, of type object.
        several: whether there may be more than one call.
        token: where `form.open` is one special token, its id.
    """
    heads = [json.dumps(f'{{"name": "{name}", "{form.key}": ') for name in tools]
    calls = " | ".join(f'{head} arguments_{number} "}}"' for number, head in enumerate(heads))
    opening = f"<[{token}]>" if token is not None else _text(form.open)
    before, after = _text(form.space), _text(form.space + form.end)
    before += f'" "? {_text(form.first)}' if form.first else ""  # some templates show a space there
    if form.between or not several:
        more = f" ({_text(form.between + ' ')} call)*" if several else ""
        start = f"{opening} {before} call{more} {after}"
    else:
        start = f'block ("\\n" block)*\nblock: {opening} {before} call {after}'
    return json.dumps({"rules": f"start: {start}\ncall: {calls}", "arguments": list(tools.values())})


def _text(text: str) -> str:
    return json.dumps(text) if text else ""
