"""The server's settings and limits, and the keys that open it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from ipaddress import ip_address
from pathlib import Path

KEYS_VARIABLE = "COTERIE_API_KEYS"
SHORTEST_KEY = 16  # characters: what is shorter can be guessed
_KEYS_BYTES = 1 << 16


@dataclass(frozen=True)
class ServerSettings:
    """Where the server listens, whom it serves, and how much of anything. ValueError for a setting that means
    nothing."""

    host: str = "127.0.0.1"
    """Address to listen at. One that others can reach needs keys."""
    port: int = 8000
    """0: any that is free."""
    model_name: str = ""
    """What clients call the model; empty: the name of its directory."""
    keys_file: Path | None = None
    """A file with one API key a line. The environment's COTERIE_API_KEYS takes them too, with commas between. A key
    is never given on the command line, where every user of the machine could read it."""
    open_without_keys: bool = False
    """Serve anyone who reaches an address that others can reach."""
    record: str = ""
    """A file for all steps' routes, from which placements are planned: every expert's load, and the choices of a few
    tokens. Written every five minutes and at the end, in place of routes that are there; empty: none is written."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that a request's Host header may have besides localhost and the address itself, where no keys are set:
    a web page must not reach this server through a name of its own."""

    max_body_bytes: int = 4 << 20
    """Of a request."""
    max_header_bytes: int = 16 << 10
    """Of all headers of a request."""
    max_json_depth: int = 64
    """Brackets within brackets."""
    header_timeout_s: float = 10.0
    """For a request's headers to arrive, from the connection's beginning or the request's before."""
    body_timeout_s: float = 30.0
    """For a request's body to arrive."""
    write_timeout_s: float = 60.0
    """For a client that does not read to go on reading."""
    keep_alive_s: float = 5.0
    """For the next request of a connection."""
    max_connections: int = 2048
    """At the same time."""
    max_requests: int = 1024
    """At the same time, waiting ones included."""

    max_prompts: int = 64
    """Of one request to /v1/completions."""
    max_choices: int = 128
    """Of one request: prompts times n or best_of."""
    max_prompt_characters: int = 1_000_000
    """Of all texts of a request; max_model_len bounds the tokens."""
    max_messages: int = 2048
    """Of one chat."""
    max_tools: int = 128
    """Of one chat."""
    request_timeout_s: float = 600.0
    """From a request's arrival to its last token."""
    prepare_timeout_s: float = 10.0
    """To turn a request's texts into tokens, and to compile its grammar."""
    template_timeout_s: float = 2.0
    """To render a chat with the checkpoint's template."""
    template_characters: int = 2_000_000
    """Of a rendered chat."""
    template_memory: int = 512 << 20
    """Bytes that rendering may take."""
    retry_after_s: int = 1
    """What a client is told to wait that comes when there is no room."""
    drain_s: float = 30.0
    """After a first SIGTERM: how long requests under way may take to end."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            least = 0 if field.name in ("port", "drain_s") else 1 if isinstance(value, int) else 1e-3
            most = 65535 if field.name == "port" else math.inf
            if not least <= value <= most or value == math.inf:
                raise ValueError(f"{field.name} is {value}: give a number of {least} or more")
        if not self.host or any(char.isspace() for char in self.host):
            raise ValueError(f"host {self.host!r} is no address: give one such as 127.0.0.1")

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether a name or an address means this machine, seen from itself."""
    if host.lower() == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def load_keys(settings: ServerSettings) -> list[str]:
    """The API keys, from the settings' file and the environment; []: none are set.

    Raises:
        ValueError: a key is short or has characters that a header cannot carry; a place is set and holds no key; or
            the address is one that others reach, without keys and without `open_without_keys`.
    """
    keys: list[str] = []
    if settings.keys_file is not None:
        keys += _of(_read(settings.keys_file).splitlines(), f"the keys' file {settings.keys_file}")
    if (told := os.environ.get(KEYS_VARIABLE)) is not None:
        keys += _of(told.split(","), f"the environment's {KEYS_VARIABLE}")
    if not keys and not settings.loopback and not settings.open_without_keys:
        raise ValueError(
            f"others can reach {settings.host}, and no API key is set: give --keys-file or {KEYS_VARIABLE}, or "
            "--open-without-keys to serve anyone"
        )
    return list(dict.fromkeys(keys))


def _read(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            raw = opened.read(_KEYS_BYTES + 1)
        if len(raw) > _KEYS_BYTES:
            raise ValueError(f"the keys' file {file} has more than {_KEYS_BYTES} bytes")
        return raw.decode()
    except UnicodeDecodeError:
        raise ValueError(f"the keys' file {file} is not text") from None
    except OSError as error:
        raise ValueError(f"the keys' file {file} cannot be read: {error.strerror}") from None


def _of(lines: list[str], place: str) -> list[str]:
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise ValueError(f"{place} holds no key")
    for number, key in enumerate(keys, 1):
        if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(
                f"key {number} of {place} is no key: give {SHORTEST_KEY} or more printable ASCII characters"
            )
    return keys
