"""The process that renders chat templates: it knows jinja2 and nothing of the server, and may be killed at any time.

It runs as a script. Both ways a message is 4 bytes of length, big-endian, and JSON. The first one it reads has the
template's source and the limits; each one after it a chat.
"""

from __future__ import annotations

import datetime
import json
import resource
import struct
import sys
from typing import Any, BinaryIO


def _read(source: BinaryIO) -> dict[str, Any] | None:
    head = source.read(4)
    return json.loads(source.read(struct.unpack(">I", head)[0])) if len(head) == 4 else None


def _write(target: BinaryIO, message: dict[str, Any]) -> None:
    raw = json.dumps(message).encode()
    target.write(struct.pack(">I", len(raw)) + raw)
    target.flush()


def _environment() -> Any:
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %} marks what a model has said, for training; here it is its text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Refused(Exception):
        """The template itself says that it cannot render this."""

    def refuse(message: Any) -> None:
        raise Refused(str(message)[:300])

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **settings: Any) -> str:
        known = {name: settings[name] for name in ("separators", "sort_keys") if name in settings}
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **known)

    extensions = ["jinja2.ext.loopcontrols", Generation]
    found = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    found.filters["tojson"] = to_json
    found.globals["raise_exception"] = refuse
    found.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return found


def _render(template: Any, values: dict[str, Any], most: int) -> dict[str, Any]:
    pieces, length = [], 0
    try:
        for piece in template.generate(**values):
            length += len(piece)
            if length > most:
                return {"error": f"the chat has over {most} characters when rendered"}
            pieces.append(piece)
    except MemoryError:
        return {"error": "the chat needs too much memory to render"}
    except RecursionError:
        return {"error": "the chat template nests too deeply"}
    except Exception as error:
        return {
            "error": f"the chat template does not take these messages: {str(error)[:300] or type(error).__name__}"
        }
    return {"text": "".join(pieces)}


def main() -> None:
    """Serves until its input ends."""
    source, target = sys.stdin.buffer, sys.stdout.buffer
    first = _read(source)
    if first is None:
        return
    environment = _environment()
    resource.setrlimit(resource.RLIMIT_AS, (first["memory"], first["memory"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        template = environment.from_string(first["source"])
    except Exception as error:
        _write(target, {"error": f"{type(error).__name__}: {str(error)[:300]}"})
        return
    _write(target, {"text": ""})
    while (values := _read(source)) is not None:
        _write(target, _render(template, values, first["characters"]))


if __name__ == "__main__":
    main()
