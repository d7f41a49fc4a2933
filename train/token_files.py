"""Token files, PREFIX.bin and PREFIX.idx as megatron-core has them: what they hold, without reading all of them."""

from __future__ import annotations

import importlib
import logging
import struct
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

HEADER = b"MMIDIDX\x00\x00"
TYPES: dict[int, type[Any]] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
SCAN_BYTES = 1 << 29


class TokenFiles(NamedTuple):
    """A pair of files. `lengths` is memory-mapped: tokens of each sequence (a document, when `prepare` wrote it)."""

    prefix: str
    type: type[Any]
    lengths: NDArray[np.int32]
    tokens: int


def quiet_megatron(name: str) -> ModuleType:
    """`megatron.core.datasets.NAME`, without the advice that megatron logs and warns about on import.

    Raises:
        ModuleNotFoundError: megatron-core is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module(f"megatron.core.datasets.{name}")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("megatron"):
            raise
        raise ModuleNotFoundError('token files need megatron-core: pip install "coterie[train]"') from None
    logging.getLogger("megatron").setLevel(logging.ERROR)
    return module


def open_token_files(prefix: str | Path) -> TokenFiles:
    """Reads the index, and compares it with the size of the .bin file.

    Raises:
        FileNotFoundError: One of the two files, or both, are missing.
        ValueError: A file is empty, cut, or not in this format.
    """
    prefix = str(prefix)
    data, index = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    if prefix.endswith((".bin", ".idx")) and Path(prefix).is_file():
        raise ValueError(f"{prefix} is one of two files: give their common prefix {prefix[:-4]}")
    if not data.is_file() and not index.is_file():
        raise FileNotFoundError(f"there is no {data} and no {index}: write them with `coterie prepare`")
    for missing, other in ((data, index), (index, data)):
        if not missing.is_file():
            raise FileNotFoundError(f"{missing} is missing, though {other} is there: both are needed")
    kind, lengths, last = _read_index(index)
    tokens = 0 if not len(lengths) else last // kind().itemsize + int(lengths[-1])
    if tokens == 0:
        raise ValueError(f"{prefix} holds no tokens: prepare it from files with text")
    if data.stat().st_size != tokens * kind().itemsize:
        raise ValueError(
            f"{data} has {data.stat().st_size:,} bytes but {index} tells of {tokens * kind().itemsize:,}: "
            "one of them is cut or of another data set, so prepare them again"
        )
    return TokenFiles(prefix, kind, lengths, tokens)


def _read_index(index: Path) -> tuple[type[Any], NDArray[np.int32], int]:
    """(type of a token, length of each sequence, byte offset of the last one).

    The layout: 9 bytes of magic, version u64 = 1, type u8, sequences u64, documents u64, then i32 lengths, i64 byte
    offsets, i64 document bounds.
    """
    start = 34
    with index.open("rb") as file:
        head = file.read(start)
    if len(head) < start or head[:9] != HEADER or head[9:17] != struct.pack("<Q", 1):
        raise ValueError(f"{index} is not the index of token files: write one with `coterie prepare`")
    code, sequences, documents = struct.unpack("<BQQ", head[17:])
    if code not in TYPES:
        raise ValueError(f"{index} tells of a type of token (code {code}) that is not an integer")
    if index.stat().st_size < start + 12 * sequences + 8 * documents:
        raise ValueError(f"{index} is cut: prepare it again")
    if not sequences:
        return TYPES[code], np.empty(0, np.int32), 0
    lengths = np.memmap(index, np.int32, "r", offset=start, shape=(sequences,))
    pointers = np.memmap(index, np.int64, "r", offset=start + 4 * sequences, shape=(sequences,))
    return TYPES[code], lengths, int(pointers[-1])


def read_tokens(prefix: str | Path) -> NDArray[np.int64]:
    """All token ids, documents one after the other."""
    files = open_token_files(prefix)
    return np.fromfile(f"{prefix}.bin", dtype=files.type).astype(np.int64)


def largest_token(files: TokenFiles, limit: int = SCAN_BYTES) -> int:
    """The largest id of all tokens; of evenly spread blocks where there are more than `limit` bytes of them."""
    data = np.memmap(f"{files.prefix}.bin", files.type, "r")
    block = 1 << 20
    starts = range(0, len(data), block)
    stride = max(1, -(-data.nbytes // limit))
    return max(int(data[start : start + block].max()) for start in starts[::stride])
