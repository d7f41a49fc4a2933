"""Turns text, JSONL and parquet into megatron-core's .bin/.idx token files, and trains a byte-level BPE if asked."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from numpy.typing import NDArray

from ..models.tokenizer import Tokenizer, train_bpe
from .sources import CHUNK, Chunk, Source, Split, documents, find_sources, read_chunks
from .token_files import quiet_megatron

# A vocabulary learns enough from this much text; of more, every n-th chunk is read.
VOCABULARY_BYTES = 1 << 30
LONG = 8 << 20
PIECE = 1 << 20
BREAK = re.compile(r"(?<=\S\n)(?=\S)")


class Prepared(NamedTuple):
    """What `prepare` wrote."""

    prefix: Path
    documents: int
    tokens: int
    bytes: int
    """Of UTF-8 text."""
    vocab_size: int


class Encoded(NamedTuple):
    """The tokens of one chunk's documents, end-of-document tokens included."""

    ids: NDArray[Any]
    lengths: list[int]
    bytes: int


def outputs(prefix: str | Path) -> tuple[Path, Path, Path]:
    """PREFIX.tokenizer.json, PREFIX.bin and PREFIX.idx."""
    return Path(f"{prefix}.tokenizer.json"), Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    tokenizer: str | Path | None = None,
    train_vocab: int | None = None,
    field: str = "text",
    split: Split = "file",
    workers: int = 1,
    force: bool = False,
    quiet: bool = False,
) -> Prepared:
    """Writes OUTPUT.bin, OUTPUT.idx and OUTPUT.tokenizer.json; the same for any number of workers.

    Every document ends with the tokenizer's end-of-document token; a special token that a text spells out is text.
    Memory is bounded by the workers, the longest document and 100 bytes a document. A failure leaves nothing behind.

    Args:
        inputs: Files, folders, globs, or "-" for standard input; text, JSONL and parquet by name, gzip by content.
        output: The prefix.
        tokenizer: A tokenizer.json to encode with.
        train_vocab: Instead of that, train a byte-level BPE of this many tokens on the input.
        field: The field of JSONL and parquet rows that holds the text.
        split: A document of a text file is the whole "file", a "line", or a part between "blank" lines.
        workers: Processes that tokenize.
        force: Overwrite the outputs.
        quiet: No progress and no summary on standard error.

    Raises:
        FileNotFoundError: An input, or the tokenizer, does not exist.
        FileExistsError: An output exists, and not `force`.
        ValueError: Binary, empty or undecodable input, no such field, contradicting options.
    """
    _check(output, tokenizer, train_vocab, split, workers, force)
    output = Path(output)
    sources = find_sources(inputs, field, skip=outputs(output))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as name, _named(output):
        folder = Path(name)
        if train_vocab is not None:
            sources = [_spool(s, folder / "input") for s in sources]
            tokenizer = folder / "tokenizer.json"
            _train_vocabulary(_Input(sources, field, split), train_vocab, quiet).save(tokenizer)
        drafts = [folder / "new.tokenizer.json", folder / "new.bin", folder / "new.idx"]
        result = _write(_Input(sources, field, split), Path(tokenizer or ""), output, drafts, workers, quiet)
        for draft, final in zip(drafts, outputs(output), strict=True):
            os.replace(draft, final)
    if not quiet:
        print(_summary(result), file=sys.stderr)
    return result


def _summary(done: Prepared) -> str:
    return (
        f"{done.prefix}.bin: {done.documents:,} documents, {done.tokens:,} tokens of {done.vocab_size:,} kinds, "
        f"{done.bytes / done.tokens:.2f} bytes a token"
    )


def _check(
    output: str | Path, tokenizer: str | Path | None, train_vocab: int | None, split: str, workers: int, force: bool
) -> None:
    if (tokenizer is None) == (train_vocab is None):
        given = "both" if tokenizer is not None else "neither"
        raise ValueError(f"{given} of tokenizer and train_vocab were given: give the one or the other")
    if tokenizer is not None and not Path(tokenizer).exists():
        raise FileNotFoundError(f"the tokenizer {tokenizer} does not exist: give a tokenizer.json, or train_vocab")
    if split not in ("file", "line", "blank"):
        raise ValueError(f'split "{split}" is not one of file, line, blank')
    if workers < 1:
        raise ValueError(f"{workers} workers cannot work: give 1 or more")
    for path in outputs(output):
        if path.is_dir():
            raise ValueError(f"the output {path} is a folder: give another prefix")
        if path.exists() and not force:
            raise FileExistsError(f"{path} exists: give another output, or force to overwrite it")


class _Input(NamedTuple):
    sources: list[Source]
    field: str
    split: Split

    @property
    def size(self) -> int:
        return sum(s.size for s in self.sources)

    def chunks(self) -> Iterator[Chunk]:
        return read_chunks(self.sources, self.field, self.split)


@contextlib.contextmanager
def _named(output: Path) -> Iterator[None]:
    """A failed write (a full disk) does not say to which file: say it."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno:
            raise OSError(error.errno, f"could not write {output}.bin: {os.strerror(error.errno)}") from None
        raise


def _spool(source: Source, path: Path) -> Source:
    """Standard input in a file, because training a vocabulary and encoding each read it."""
    if source.path is not None:
        return source
    with path.open("wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    return Source(path, source.kind, False, path.stat().st_size)


@contextlib.contextmanager
def _progress(title: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A line with bytes, speed and time left on a person's terminal; nothing elsewhere."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(title, total=total or None)
        yield lambda size: bar.advance(task, size)


def _train_vocabulary(given: _Input, vocab_size: int, quiet: bool) -> Tokenizer:
    stride = 1 + given.size // VOCABULARY_BYTES
    with _progress("reading for the vocabulary", given.size, quiet) as advance:

        def texts() -> Iterator[str]:
            for number, chunk in enumerate(given.chunks()):
                if number % stride == 0:
                    yield from documents(chunk, given.field, given.split)
                advance(chunk.size)

        return train_bpe(texts(), vocab_size)


def _write(given: _Input, tokenizer: Path, output: Path, drafts: list[Path], workers: int, quiet: bool) -> Prepared:
    """Writes the three drafts."""
    indexed_dataset = quiet_megatron("indexed_dataset")
    Tokenizer(tokenizer).save(drafts[0])
    loaded = _load(str(drafts[0]))
    kind = indexed_dataset.DType.optimal_dtype(loaded.vocab_size)
    builder = indexed_dataset.IndexedDatasetBuilder(str(drafts[1]), dtype=kind)
    size = tokens = 0
    encode = functools.partial(encode_chunk, field=given.field, split=given.split, tokenizer=str(drafts[0]))
    if given.size and given.size < 4 * CHUNK:
        workers = 1  # starting processes would take longer
    with _progress("tokenizing", given.size, quiet) as advance, builder.data_file:
        for chunk_size, encoded in _encode_all(given.chunks(), encode, workers):
            if encoded.lengths:
                first = len(builder.sequence_lengths)
                builder.add_document(encoded.ids, encoded.lengths)
                # That is one document of many sequences to the builder; ours are a document each.
                builder.document_indices[-1:] = range(first + 1, len(builder.sequence_lengths) + 1)
            tokens, size = tokens + len(encoded.ids), size + encoded.bytes
            advance(chunk_size)
        if not tokens:
            raise ValueError(f"there is no text in {given.sources[0].name}: give files that hold some")
        builder.finalize(str(drafts[2]))
    return Prepared(output, len(builder.sequence_lengths), tokens, size, loaded.vocab_size)


def _encode_all(
    chunks: Iterator[Chunk], encode: Callable[[Chunk], Encoded], workers: int
) -> Iterator[tuple[int, Encoded]]:
    """(size of the chunk, its tokens), in order; at most two chunks a worker are held."""
    if workers == 1:
        yield from ((chunk.size, encode(chunk)) for chunk in chunks)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    waiting: deque[tuple[int, Future[Encoded]]] = deque()
    try:
        for chunk in chunks:
            waiting.append((chunk.size, pool.submit(encode, chunk)))
            if len(waiting) >= 2 * workers:
                size, future = waiting.popleft()
                yield size, future.result()
        while waiting:
            size, future = waiting.popleft()
            yield size, future.result()
    except BrokenProcessPool:
        raise OSError("a tokenizing process died, most likely for want of memory: give fewer workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """One thread a process; leaves Ctrl-C to the parent, and does not outlive it."""

    def follow() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=follow, daemon=True).start()


@functools.lru_cache(maxsize=1)
def _load(tokenizer: str) -> Tokenizer:
    """The tokenizer that goes beside the output, which is the one that training will read, told to take a special
    token that a text spells out for text: else a document about `<|endoftext|>` would end in its middle."""
    inner = tokenizers.Tokenizer.from_file(tokenizer)
    inner.encode_special_tokens = True
    return Tokenizer(inner)


def encode_chunk(chunk: Chunk, *, field: str, split: Split, tokenizer: str) -> Encoded:
    """Decodes and tokenizes the documents of one chunk; runs in a worker."""
    loaded = _load(tokenizer)
    parts, lengths, size, length = [np.empty(0, np.int32)], [], 0, 0
    for group in _groups(documents(chunk, field, split)):
        flat: list[int] = []
        encoded = loaded.encode_batch([piece for piece, _ in group])
        for ids, (piece, last) in zip(encoded, group, strict=True):
            flat += ids
            length, size = length + len(ids) + last, size + len(piece.encode())
            if last:
                flat.append(loaded.eos_id)
                lengths.append(length)
                length = 0
        parts.append(np.asarray(flat, np.int32))
    return Encoded(np.concatenate(parts), lengths, size)


def _groups(texts: Iterator[str]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces of about PIECE characters in all, each with whether it ends its document."""
    group, size = [], 0
    for text in texts:
        pieces = list(_pieces(text))
        for number, piece in enumerate(pieces, 1):
            group.append((piece, number == len(pieces)))
            size += len(piece)
            if size >= PIECE:
                yield group
                group, size = [], 0
    if group:
        yield group


def _pieces(text: str) -> Iterator[str]:
    """A very long text cut after lines, where no usual splitter of words looks across; short ones whole."""
    start = 0
    while len(text) - start > LONG:
        found = BREAK.search(text, start + PIECE)
        if found is None:
            break
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]
