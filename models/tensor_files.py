"""A model directory's tensors: one `model.safetensors`, or several files and an index, as Hugging Face has it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .files import INDEX_BYTES, is_there, open_checked, parse_json, read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FILE_BYTES = 5 * 10**9
"""A model of more bytes is cut into files of at most so many; a larger tensor has a file of its own."""

KINDS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Types of weights, in safetensors' words."""
WORDS = KINDS | {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
"""All types that a file may hold."""
_DTYPES = {kind: dtype for dtype, kind in WORDS.items()}

HEADER_BYTES = 2**24
"""The most that a file may say of its tensors: some 150,000 of them."""
MOST_AXES, MOST_SIZE = 16, 2**40


class Head(NamedTuple):
    """What a file says of a tensor before its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def has_weights(folder: Path) -> bool:
    """Whether the folder holds a model's tensors, in either form."""
    return (folder / INDEX).exists() or (folder / WEIGHTS).exists()


def split_names(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """File names, and which tensors each takes, in the order given. `sizes`: bytes of every tensor."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": names for i, names in enumerate(groups, 1)}


class StoredTensors:
    """All tensors of a directory, read from its memory-mapped files when they are asked for.

    Raises:
        FileNotFoundError: there are none, or a file of the index is missing.
        ValueError: a file is damaged or no regular one, an index is none, leads out of the directory or does not say
            what its files hold.
    """

    def __init__(self, folder: Path) -> None:
        self.source = folder / (INDEX if is_there(folder / INDEX) else WEIGHTS)
        self._files: dict[str, Any] = {}
        listed = _indexed(self.source) if self.source.name == INDEX else {self.source: None}
        for file, expected in listed.items():
            opened, names = _open(file)
            self._files |= dict.fromkeys(names, opened)
            if expected is not None and expected != set(names):
                name = min(expected ^ set(names))
                told = f"has {name!r} in {file.name}, which lacks it" if name in expected else f"lacks {name}"
                raise ValueError(f"{self.source} does not say what {file.name} holds: it {told}")

    def names(self) -> list[str]:
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The stored type.

        Raises:
            ValueError: PyTorch has none for it.
        """
        kind = self._files[name].get_slice(name).get_dtype()
        if kind not in _DTYPES:
            raise ValueError(f"{self.source} stores {name} as {kind}, which is no type of a weight")
        return _DTYPES[kind]

    def read(self, name: str, box: tuple[slice, ...]) -> Tensor:
        """A box of one tensor, on the CPU; no more of the file is read.

        Raises:
            ValueError: there is a NaN or an infinity in it.
        """
        found = self._files[name].get_slice(name)[box] if box else self._files[name].get_tensor(name)
        if not all_finite(found):
            raise ValueError(f"{self.source}: {name} holds a NaN or an infinity, no number that a weight can be")
        return found


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is a NaN or an infinity: one pass without a copy (`isfinite` makes two more tensors)."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    wide = tensor if tensor.dtype in KINDS else tensor.float()
    return all(math.isfinite(end) for end in torch.stack(torch.aminmax(wide)).tolist())


def _indexed(index: Path) -> dict[Path, set[str]]:
    """The files of an index, and the tensors that each must hold."""
    places = read_json(index, INDEX_BYTES).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} is damaged or no index of safetensors files: it has no weight_map")
    found: dict[Path, set[str]] = {}
    for name, place in places.items():
        # An index comes with a downloaded model: it must not make us open what lies elsewhere.
        if not isinstance(place, str) or not re.fullmatch(r"[\w.-]+\.safetensors", place):
            raise ValueError(f"{index} names {place!r}, expected a .safetensors file beside it")
        found.setdefault(index.parent / place, set()).add(name)
    return dict(sorted(found.items()))


def _open(file: Path) -> tuple[Any, list[str]]:
    """A safetensors file and its tensors' names. The library checks that its header fits its data."""
    heads = _header(file)
    try:
        opened = safe_open(str(file), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or no safetensors file: {error}") from None
    for name in opened.keys():  # noqa: SIM118 (it is no dict)
        shape = heads[name]["shape"]
        if len(shape) > MOST_AXES or any(size > MOST_SIZE for size in shape):
            raise ValueError(f"{file} is damaged: {name} has a shape that no tensor can have")
    return opened, list(opened.keys())


def _header(file: Path) -> dict[str, Any]:
    """What the file says of its tensors; of two entries with one name the library would quietly take the last."""
    with open_checked(file) as opened:
        size, rest = int.from_bytes(opened.read(8), "little"), os.fstat(opened.fileno()).st_size - 8
        if not 2 <= size <= min(rest, HEADER_BYTES):
            most = min(max(rest, 0), HEADER_BYTES)
            raise ValueError(f"{file} is damaged: its header claims {size} bytes, and it can have {most} at most")
        return parse_json(opened.read(size), f"{file} is damaged: its header")


class Drafts:
    """New files of a directory, written out of sight, then put in place: a reader never sees half a file.

    The first trouble is kept until `publish`, because other ranks are waiting in collectives meanwhile.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._trouble: Exception | None = None
        self._hidden: Path | None = None
        self._map: dict[str, str] = {}
        self._bytes = 0
        self._file: BinaryIO | None = None
        self._name = ""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(folder / ".partial", ignore_errors=True)  # of a save that was killed
            (folder / ".partial").mkdir()
            self._hidden = folder / ".partial"
        except OSError as error:
            self._trouble = error

    def text(self, name: str, content: str) -> None:
        """Adds a text file."""
        self.data(name, content.encode())

    def data(self, name: str, content: bytes) -> None:
        """Adds a small file."""
        self._attempt(name, lambda file: file.write_bytes(content))

    def begin(self, name: str, heads: Mapping[str, Head]) -> None:
        """Begins a safetensors file; its tensors follow by `append`, in this order."""
        self._close()
        self._map |= dict.fromkeys(heads, name)
        self._bytes += sum(head.bytes for head in heads.values())
        self._attempt(name, lambda file: self._open(file, heads))

    def append(self, piece: Tensor) -> None:
        """Adds the file's next bytes: a whole tensor or, along its first axis, a part."""
        if self._file is not None:
            file = self._file
            raw = piece.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            self._attempt(self._name, lambda _: file.write(raw.data))

    def _open(self, file: Path, heads: Mapping[str, Head]) -> None:
        table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, head in heads.items():
            start, end = end, end + head.bytes
            table[name] = {"dtype": KINDS[head.dtype], "shape": list(head.shape), "data_offsets": [start, end]}
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file, self._name = file.open("wb"), file.name
        self._file.write(len(text).to_bytes(8, "little") + text)

    def _close(self) -> None:
        """Ends a file that was begun: what it still holds back may be what does not fit on the disk."""
        if self._file is not None:
            file, self._file = self._file, None
            self._attempt(self._name, lambda _: (file.flush(), os.fsync(file.fileno())))
            with contextlib.suppress(OSError):
                file.close()

    def publish(self) -> None:
        """Puts the files in place, or raises the first trouble and leaves the directory as it was."""
        try:
            self._close()
            files = sorted(set(self._map.values()))
            if files != [WEIGHTS]:
                index = {"metadata": {"total_size": self._bytes}, "weight_map": self._map}
                self.text(INDEX, json.dumps(index, indent=2) + "\n")
            if self._trouble is not None:
                raise self._trouble
            self._replace(files)
        finally:
            self.discard()

    def discard(self) -> None:
        """Takes the drafts away; the directory stays as it was."""
        self._close()
        if self._hidden is not None:
            shutil.rmtree(self._hidden, ignore_errors=True)

    def _replace(self, files: list[str]) -> None:
        hidden, folder = self._hidden, self._folder
        assert hidden is not None  # else there was trouble
        # Without its index a set of files is no model: nobody reads a mixture of old ones and new.
        (folder / INDEX).unlink(missing_ok=True)
        others = [file.name for file in hidden.iterdir() if file.name not in (*files, INDEX)]
        for name in [*others, *files, *([INDEX] if files != [WEIGHTS] else [])]:
            os.replace(hidden / name, folder / name)
        for old in (folder / WEIGHTS, *folder.glob("model-?????-of-?????.safetensors")):
            if old.name not in files:
                old.unlink(missing_ok=True)

    def _attempt(self, name: str, write: Any) -> None:
        if self._trouble is not None or self._hidden is None:
            return
        try:
            write(self._hidden / name)
        except OSError as error:
            self._trouble = OSError(f"{self._folder / name} could not be written: {error.strerror or error}")
        except Exception as error:
            self._trouble = error


def write_tensors(
    drafts: Drafts | None,
    heads: Mapping[str, Head],
    pieces: Callable[[str], Iterable[Tensor]],
    file_bytes: int = FILE_BYTES,
) -> None:
    """Writes tensors into as many files as they need, one at a time.

    Args:
        drafts: None: nothing is written, but every piece is asked for, as ranks that gather together must.
        heads: all tensors, in order.
        pieces: gives a tensor's parts along its first axis, on the CPU, of any type.
        file_bytes: the most that one file may take.
    """
    for file, names in split_names({name: head.bytes for name, head in heads.items()}, file_bytes).items():
        names.sort(key=lambda name: -heads[name].dtype.itemsize)  # so that each lies at a multiple of its own width
        if drafts is not None:
            drafts.begin(file, {name: heads[name] for name in names})
        for name in names:
            for piece in pieces(name):
                if drafts is not None:
                    drafts.append(piece.to(heads[name].dtype))
