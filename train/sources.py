"""Finds and reads the inputs of `prepare`: files are checked first, then cut into chunks that workers decode."""

from __future__ import annotations

import contextlib
import glob
import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

Split = Literal["file", "line", "blank"]
CHUNK = 1 << 20
HEAD = 1 << 13
BLANK = re.compile(rb"\n[ \t\r]*\n")
PACKED = {".zip", ".zst", ".xz", ".bz2", ".7z", ".tar", ".lz4", ".br"}


@dataclass(frozen=True)
class Source:
    """One input; `path` is None for standard input, `size` the bytes on disk."""

    path: Path | None
    kind: Literal["text", "jsonl", "parquet"]
    compressed: bool
    size: int

    @property
    def name(self) -> str:
        return "standard input" if self.path is None else str(self.path)


class Chunk(NamedTuple):
    """About a megabyte of input. `data` is bytes of a text or JSONL file that begin at line `first`, rows of a
    parquet file that begin at row `first`, or text files that are a document each."""

    kind: Literal["files", "text", "jsonl", "rows"]
    name: str
    first: int
    data: Any
    size: int


def find_sources(inputs: Iterable[str | Path], field: str, skip: Iterable[Path] = ()) -> list[Source]:
    """Expands files, folders, globs and "-" in a fixed order, and looks at the head of every file.

    Empty files are passed over inside folders and globs, and refused where they are named.

    Raises:
        FileNotFoundError: Nothing there.
        ValueError: Binary, empty or undecodable input, or a first row without the field.
    """
    skipped, found = {p.resolve() for p in skip}, {}
    for name in map(str, inputs):
        if name == "-":
            found["-"] = _look(None, field)
            continue
        paths, named = _expand(name)
        for path in paths:
            if path.resolve() in skipped or (not named and path.stat().st_size == 0):
                continue
            found[str(path.resolve())] = _look(path, field)
    if not found:
        raise ValueError(f"there is no text in {' '.join(map(str, inputs)) or 'no input'}: give files that hold some")
    return list(found.values())


def _expand(name: str) -> tuple[list[Path], bool]:
    """(files, whether the input names one file)."""
    path = Path(name)
    if path.is_dir():
        files = [p for p in path.rglob("*") if p.is_file()]
        files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        return sorted(files), False
    if path.exists():
        return [path], True
    if glob.has_magic(name):
        files = [Path(p) for p in sorted(glob.glob(name, recursive=True)) if Path(p).is_file()]
        if files:
            return files, False
        raise FileNotFoundError(f"no file matches {name}")
    raise FileNotFoundError(f"{name} does not exist: give files, folders, globs, or - for standard input")


def _look(path: Path | None, field: str) -> Source:
    """Reads the head of an input, decides what it is, and refuses what cannot be read."""
    name = "standard input" if path is None else str(path)
    with open_raw(path) as raw:
        head = raw.peek(HEAD)[:HEAD] if path is None else raw.read(HEAD)
        compressed = head[:2] == b"\x1f\x8b"
        if not head:
            raise ValueError(f"{name} is empty: give a file that holds text")
        if compressed and path is not None:
            raw.seek(0)
            head = _read(name, gzip.GzipFile(fileobj=raw), HEAD)
            if not head:
                raise ValueError(f"{name} is empty: give a file that holds text")
    suffixes = [] if path is None else [s.lower() for s in path.suffixes if s.lower() != ".gz"]
    suffix = suffixes[-1] if suffixes else ""
    size = 0 if path is None else path.stat().st_size
    if head[:4] == b"PAR1" and path is not None and not compressed:
        return _look_parquet(path, field, size)
    if compressed and path is None:
        raise ValueError("standard input is compressed: pipe it through gzip -d first")
    if suffix in PACKED:
        raise ValueError(f"{name} is packed in a way that prepare does not read: unpack it, or use gzip")
    if suffix in (".parquet", ".pq"):
        raise ValueError(f"{name} is not a parquet file: it does not begin with PAR1")
    # A pipe may hand out less than it will hold, and a file more than its head.
    whole = path is not None and len(head) < HEAD
    _refuse_binary(name, head, whole)
    rows = suffix in (".jsonl", ".ndjson", ".json") or (path is None and head.lstrip().startswith(b'{"'))
    if not rows:
        return Source(path, "text", compressed, size)
    if head.lstrip().startswith(b"["):
        raise ValueError(f"{name} is one JSON array: write one JSON object a line (JSONL) instead")
    first, newline, _ = head.lstrip().partition(b"\n")
    if newline or whole:
        row_text(first, field, f"the first row of {name}")
    return Source(path, "jsonl", compressed, size)


def _look_parquet(path: Path, field: str, size: int) -> Source:
    arrow, parquet = _pyarrow()
    try:
        schema = parquet.read_schema(path)
    except (arrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is a damaged parquet file: {str(error).splitlines()[0]}") from None
    if field not in schema.names:
        raise ValueError(f'{path} has no field "{field}": it has {", ".join(schema.names)}')
    kind = schema.field(field).type
    if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
        raise ValueError(f'field "{field}" of {path} is {kind}, not text: name another with the field option')
    return Source(path, "parquet", False, size)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ModuleNotFoundError('reading parquet needs pyarrow: pip install "coterie[train]"') from None
    return pyarrow, pyarrow.parquet


def _refuse_binary(name: str, head: bytes, whole: bool) -> None:
    if (zero := head.find(b"\0")) >= 0:
        raise ValueError(
            f"{name} looks binary (a zero byte at {zero}): prepare reads UTF-8 text, JSONL and parquet, also "
            "gzipped; a glob such as 'folder/**/*.txt' picks files"
        )
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        if whole or error.start < len(head) - 4:  # else the head's end cuts a character
            raise ValueError(_undecodable(name, error)) from None


def _undecodable(name: str, error: UnicodeDecodeError) -> str:
    return f"{name} is not UTF-8 text (byte 0x{error.object[error.start]:02x} at {error.start}): convert it first"


def open_raw(path: Path | None) -> contextlib.AbstractContextManager[Any]:
    """The bytes on disk, or standard input, which stays open because its head is only peeked at."""
    return contextlib.nullcontext(sys.stdin.buffer) if path is None else open(path, "rb")


def _read(name: str, stream: Any, size: int = -1) -> bytes:
    try:
        return stream.read(size)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise ValueError(f"{name} is a damaged gzip file") from None


def read_chunks(sources: Iterable[Source], field: str, split: Split) -> Iterator[Chunk]:
    """Cuts the sources into chunks, in order, holding one at a time. A document is never cut."""
    waiting: list[Source] = []
    for source in sources:
        whole_file = source.kind == "text" and split == "file"
        if whole_file and source.path is not None:
            waiting.append(source)
        if waiting and (not whole_file or sum(s.size for s in waiting) >= CHUNK):
            yield _files(waiting)
            waiting = []
        if source.kind == "parquet":
            yield from _parquet_chunks(source, field)
        elif whole_file and source.path is None:
            data = sys.stdin.buffer.read()
            yield Chunk("text", source.name, 1, data, len(data))
        elif not whole_file:
            yield from _byte_chunks(source, blank=source.kind == "text" and split == "blank")
    if waiting:
        yield _files(waiting)


def _files(sources: list[Source]) -> Chunk:
    return Chunk("files", sources[0].name, 1, sources, sum(s.size for s in sources))


def _byte_chunks(source: Source, blank: bool) -> Iterator[Chunk]:
    """Pieces of at least CHUNK bytes that end at a line's end, or at a blank line."""
    kind: Literal["text", "jsonl"] = "jsonl" if source.kind == "jsonl" else "text"
    with open_raw(source.path) as raw:
        stream = gzip.GzipFile(fileobj=raw) if source.compressed else raw
        line, done, parts = 1, 0, []
        while piece := _read(source.name, stream, CHUNK):
            # A blank line may lie across two pieces: the last two bytes of the earlier one are looked at again.
            tail = parts[-1][-2:] if blank and parts else b""
            cut = _last_cut(tail + piece, blank) - len(tail)
            if cut <= 0:
                parts.append(piece)
                continue
            data = b"".join([*parts, piece[:cut]])
            position = raw.tell() if source.path else done + len(data)
            yield Chunk(kind, source.name, line, data, position - done)
            line, done, parts = line + data.count(b"\n"), position, [piece[cut:]]
        if data := b"".join(parts):
            yield Chunk(kind, source.name, line, data, 0)


def _last_cut(data: bytes, blank: bool) -> int:
    """Where the last whole document ends; 0: nowhere."""
    if not blank:
        return data.rfind(b"\n") + 1
    return max((m.end() for m in BLANK.finditer(data)), default=0)


def _parquet_chunks(source: Source, field: str) -> Iterator[Chunk]:
    arrow, parquet = _pyarrow()
    try:
        with parquet.ParquetFile(source.path) as file:
            rows, first = max(1, file.metadata.num_rows), 0
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                texts = batch.column(0).to_pylist()
                yield Chunk("rows", source.name, first + 1, texts, source.size * len(texts) // rows)
                first += len(texts)
    except (arrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{source.name} is a damaged parquet file: {str(error).splitlines()[0]}") from None


def documents(chunk: Chunk, field: str, split: Split) -> Iterator[str]:
    """The texts of a chunk; those of white space alone are left out.

    Raises:
        ValueError: Text that is not UTF-8, a row that is not JSON or has no text in the field; with file and line.
    """
    return (text for text in _texts(chunk, field, split) if text.strip())


def _texts(chunk: Chunk, field: str, split: Split) -> Iterator[str]:
    if chunk.kind == "files":
        for source in chunk.data:
            with open_raw(source.path) as raw:
                data = _read(source.name, gzip.GzipFile(fileobj=raw) if source.compressed else raw)
            yield _decode(data, source.name)
    elif chunk.kind == "rows":
        for row, text in enumerate(chunk.data, chunk.first):
            if text is None:
                raise ValueError(f'row {row} of {chunk.name} has no text in field "{field}"')
            yield text
    elif chunk.kind == "jsonl":
        for line, row in enumerate(chunk.data.split(b"\n"), chunk.first):
            if row.strip():
                yield row_text(row, field, f"line {line} of {chunk.name}")
    else:
        text = _decode(chunk.data, chunk.name if chunk.first == 1 else f"{chunk.name}, from line {chunk.first}")
        if split == "line":
            yield from (line.rstrip("\r") for line in text.split("\n"))
        elif split == "blank":
            yield from (block.strip("\r\n") for block in re.split(r"\n(?:[ \t\r]*\n)+", text))
        else:
            yield text


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(_undecodable(name, error)) from None


def row_text(row: bytes, field: str, where: str) -> str:
    """The text in one JSON row."""
    try:
        value = json.loads(row)
    except UnicodeDecodeError as error:
        raise ValueError(_undecodable(where, error)) from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}): JSONL has one object a line") from None
    if not isinstance(value, dict):
        raise ValueError(f'{where} is a JSON {type(value).__name__}, not an object with a field "{field}"')
    if field not in value:
        raise ValueError(f'{where} has no field "{field}": it has {", ".join(map(str, value)) or "none"}')
    if not isinstance(value[field], str):
        raise ValueError(f'field "{field}" in {where} is {type(value[field]).__name__}, not text')
    text = value[field]
    if b"\\ud" in row or b"\\uD" in row:  # escapes can spell half a surrogate pair, which no UTF-8 text holds
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
