"""The tensors of a model directory, read box by box. A file is trusted in nothing.

The library `safetensors` checks a file's header; the numbers are then read straight to where they belong, so that
nothing is held twice and no page of a file counts as ours, as it would if the file were mapped.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .files import INDEX_BYTES, is_there, open_checked, parse_json, read_json
from .tensor_files import INDEX, KINDS, WEIGHTS, WORDS

HEADER_BYTES = 2**24
"""The most that a file may say of its tensors: some 150,000 of them."""
MOST_AXES, MOST_SIZE = 16, 2**40
PIECE, READERS = 2**24, 2
"""Bytes that a thread reads at a time, or one row if that is more; while one waits for the disk another writes to
memory that is touched for the first time, which takes as long."""

_DTYPES = {kind: dtype for dtype, kind in WORDS.items()}


class _Place(NamedTuple):
    """Where one tensor is stored."""

    file: Path
    handle: int
    kind: str
    shape: tuple[int, ...]
    start: int
    """Of its first byte in the file."""


class _Part(NamedTuple):
    """What `StoredTensors._rows` does."""

    target: Tensor
    name: str
    start: int
    shape: tuple[int, ...]
    box: tuple[slice, ...]


class StoredTensors:
    """All tensors of a directory: one `model.safetensors`, or several files and an index.

    Raises:
        FileNotFoundError: there are none, or a file of the index is missing.
        ValueError: a file is damaged or no regular one, an index is none, leads out of the directory or does not say
            what its files hold.
    """

    def __init__(self, folder: Path) -> None:
        self.source = folder / (INDEX if is_there(folder / INDEX) else WEIGHTS)
        self._places: dict[str, _Place] = {}
        self._readers = ThreadPoolExecutor(READERS)
        listed = _indexed(self.source) if self.source.name == INDEX else {self.source: None}
        for file, expected in listed.items():
            names = self._add(file)
            if expected is not None and expected != names:
                name = min(expected ^ names)
                told = f"has {name!r} in {file.name}, which lacks it" if name in expected else f"lacks {name}"
                raise ValueError(f"{self.source} does not say what {file.name} holds: it {told}")

    def _add(self, file: Path) -> set[str]:
        heads, start = _header(file)
        handle = open_checked(file)
        weakref.finalize(self, handle.close)
        for name, head in heads.items():
            begin = start + head["data_offsets"][0]
            self._places[name] = _Place(file, handle.fileno(), head["dtype"], tuple(head["shape"]), begin)
        return set(heads)

    def names(self) -> list[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The stored type.

        Raises:
            ValueError: PyTorch has none for it.
        """
        kind = self._places[name].kind
        if kind not in _DTYPES:
            raise ValueError(f"{self.source} stores {name} as {kind}, which is no type of a weight")
        return _DTYPES[kind]

    def read(self, name: str, box: tuple[slice, ...]) -> Tensor:
        """A box of one tensor, on the CPU; (): all of it. It raises as `fill` does."""
        sizes = [b.stop - b.start for b in box] if box else self.shape(name)
        target = torch.empty(sizes, dtype=self.dtype(name))
        self.fill(target, name, box)
        return target

    def fill(self, target: Tensor, name: str, box: tuple[slice, ...]) -> None:
        """Reads a box of one tensor into `target`, of the box's shape and any type or device.

        Rows that the box cuts are read whole, and no more than that.

        Raises:
            ValueError: there is a NaN or an infinity in it, or the file has become shorter.
        """
        box = box or tuple(slice(0, size) for size in self.shape(name))
        parts = list(self._parts(target.detach(), name, box))
        if len(parts) == 1:
            self._rows(*parts[0])
            return
        for done in [self._readers.submit(self._rows, *part) for part in parts]:
            done.result()

    def _parts(self, target: Tensor, name: str, box: tuple[slice, ...]) -> Iterator[_Part]:
        """Runs of whole rows that hold the box, each of `PIECE` bytes at most."""
        shape, begin = self.shape(name), self._places[name].start
        if not shape:
            yield _Part(target.view(1), name, begin, (1,), ())
            return
        cut = [axis for axis, (b, size) in enumerate(zip(box, shape, strict=True)) if (b.start, b.stop) != (0, size)]
        axis = min(max(cut, default=0), max(len(shape) - 2, 0))  # columns are taken from whole rows
        row = self.dtype(name).itemsize * math.prod(shape[axis + 1 :])
        step = max(1, PIECE // max(1, row))
        for lead in itertools.product(*(range(b.start, b.stop) for b in box[:axis])):
            index = 0
            for i, size in zip(lead, shape, strict=False):
                index = index * size + i
            here = target[tuple(i - b.start for i, b in zip(lead, box, strict=False))]
            for first in range(box[axis].start, box[axis].stop, step):
                last = min(first + step, box[axis].stop)
                part = here[first - box[axis].start : last - box[axis].start]
                start = begin + (index * shape[axis] + first) * row
                yield _Part(part, name, start, (last - first, *shape[axis + 1 :]), box[axis + 1 :])

    def _rows(self, target: Tensor, name: str, start: int, shape: tuple[int, ...], box: tuple[slice, ...]) -> None:
        """Reads whole rows, from byte `start` on, and puts their part `box` into `target`."""
        dtype = self.dtype(name)
        whole = target.shape == shape and target.dtype == dtype and target.is_contiguous()
        direct = whole and target.device.type == "cpu"
        rows = target.detach() if direct else torch.empty(shape, dtype=dtype)
        self._read_bytes(rows, name, start)
        if not all_finite(rows):
            raise ValueError(f"{self.source}: {name} holds a NaN or an infinity, no number that a weight can be")
        if not direct:
            target.copy_(rows[(slice(None), *box)] if box else rows)

    def _read_bytes(self, rows: Tensor, name: str, start: int) -> None:
        raw = memoryview(rows.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
        place, done = self._places[name], 0
        while done < len(raw):
            got = os.preadv(place.handle, [raw[done:]], start + done)
            if not got:
                raise ValueError(f"{place.file} has become shorter while {name} was read")
            done += got


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


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """What a file says of its tensors, and where their bytes begin.

    Of two entries with one name the library would quietly take the last; it checks all else: that the entries fit
    each other and the file.
    """
    with open_checked(file) as opened:
        size, rest = int.from_bytes(opened.read(8), "little"), os.fstat(opened.fileno()).st_size - 8
        if not 2 <= size <= min(rest, HEADER_BYTES):
            most = min(max(rest, 0), HEADER_BYTES)
            raise ValueError(f"{file} is damaged: its header claims {size} bytes, and it can have {most} at most")
        heads = parse_json(opened.read(size), f"{file} is damaged: its header")
    heads.pop("__metadata__", None)
    try:
        with safe_open(str(file), framework="pt", device="cpu") as checked:
            names = set(checked.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or no safetensors file: {error}") from None
    for name in names:
        shape = heads[name]["shape"]
        if len(shape) > MOST_AXES or any(length > MOST_SIZE for length in shape):
            raise ValueError(f"{file} is damaged: {name} has a shape that no tensor can have")
    return heads, size + 8
