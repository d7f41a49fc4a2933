"""Files that come from anyone: what is read of them is regular, in its place and no larger than it may be."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

CONFIG_BYTES = 2**24
INDEX_BYTES = 2**26
TOKENIZER_BYTES = 2**28


def is_there(file: Path) -> bool:
    """Whether something has this name; a link that leads nowhere has not."""
    try:
        return file.exists()
    except OSError:
        return False  # a link to itself, a folder that must not be entered


def checked_size(file: Path, limit: int | None = None) -> int:
    """Bytes of a file that may be opened.

    A link must stay in the file's folder, or lead into `blobs` beside `snapshots`, as in Hugging Face's cache:
    a downloaded model must not make us read what lies elsewhere.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no regular file, a link that leads away, or larger than `limit` bytes.
    """
    if not is_there(file):
        raise FileNotFoundError(f"{file.parent} has no {file.name}")
    folder, real = file.parent.resolve(), file.resolve()
    if file.is_symlink() and not any(real.is_relative_to(root) for root in _roots(folder)):
        raise ValueError(f"{file} is a link to {str(real)!r}, outside of its folder: put the file itself there")
    try:
        told = real.stat()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(told.st_mode):
        raise ValueError(f"{file} is no regular file")
    if limit is not None and told.st_size > limit:
        raise ValueError(f"{file} has {told.st_size} bytes, more than the {limit} that such a file may have")
    return told.st_size


def _roots(folder: Path) -> list[Path]:
    for parent in folder.parents:
        if parent.name == "snapshots":
            return [folder, parent.parent / "blobs"]
    return [folder]


def open_checked(file: Path, limit: int | None = None) -> BinaryIO:
    """Opens a file for reading, as `checked_size` allows it. It raises as that does."""
    checked_size(file, limit)
    try:
        return os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb")  # a pipe put here meanwhile does not wait
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None


def read_json(file: Path, limit: int = CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object that a file holds, by the letter of RFC 8259, and no key twice.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is too large or holds no such object, or a key that cannot be printed.
    """
    with open_checked(file, limit) as opened:
        raw = opened.read(min(limit, os.fstat(opened.fileno()).st_size))
    return parse_json(raw, str(file))


def parse_json(raw: bytes, source: str) -> dict[str, Any]:
    """The same for bytes; `source` is what messages call them."""
    try:
        data = json.loads(
            raw.decode(), object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_float, parse_int=_int
        )
    except RecursionError:
        raise ValueError(f"{source} is not JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{source} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{source} holds no JSON object")
    return data


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands twice in one object")
    for name in found:
        if not name.isprintable():  # it would reach a terminal in a message
            raise ValueError(f"the key {name!r} cannot be printed")
    return found


def _constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number in JSON")


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number that fits a float")
    return number


def _int(text: str) -> int | float:
    number = int(text) if len(text) < 20 else 2**63
    return number if abs(number) < 2**63 else _float(text)  # tokenizers write 10^30 for a length without end
