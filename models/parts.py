"""Another project's tensors as parts of ours, and ours as theirs: a table of places, read in both directions.

Nothing is renamed in memory and nothing is converted twice: a view reads the box that is asked for, from wherever
the other side's tensors hold it.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .tensor_files import KINDS, WORDS

PIECE = 2**26
"""Bytes of a tensor that are held at a time, or one row of its first axis if that is more."""

Box = tuple[slice, ...]


class Source(Protocol):
    """Tensors by name, wherever they are."""

    @property
    def source(self) -> object:
        """What to call it in a message."""
        ...

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, box: Box) -> Tensor:
        """A box of one tensor on the CPU; (): all of it."""
        ...


class Part(NamedTuple):
    """One of their tensors, or some of its rows, as a part of one of ours: the same numbers in the same order.

    Ours may have more axes: (H, d, D) is their (H * d, D).
    """

    name: str
    """Theirs."""
    shape: tuple[int, ...]
    """Of their whole tensor, as it is stored."""
    at: tuple[int, ...] = ()
    """Leading indices of ours: ours[at] is this part."""
    rows: tuple[int, int] | None = None
    """First and last + 1 of the rows that are meant, before they are stored transposed; None: all."""
    transposed: bool = False
    """Stored as (inputs, outputs)."""

    @property
    def region(self) -> tuple[int, ...]:
        """The shape of what is meant, not transposed."""
        shape = self.shape[::-1] if self.transposed else self.shape
        return shape if self.rows is None else (self.rows[1] - self.rows[0], *shape[1:])

    def stored(self, box: Box) -> Box:
        """Where a box of the region lies in their tensor."""
        first = self.rows[0] if self.rows else 0
        moved = (slice(box[0].start + first, box[0].stop + first), *box[1:])
        return moved[::-1] if self.transposed else moved


Table = Mapping[str, Sequence[Part]]
"""Our tensors, and the parts that make up each."""


class Inward:
    """Their tensors under our names.

    Args:
        theirs: what is stored.
        table: our tensors' parts.
        shapes: of our tensors.
        ignored: their names that carry no weights (masks, tables of angles): a pattern of the whole name.

    Raises:
        ValueError: their tensors that are missing, unknown, of another shape or no weights, all in one message.
    """

    def __init__(
        self, theirs: Source, table: Table, shapes: Mapping[str, tuple[int, ...]], ignored: str = "(?!)"
    ) -> None:
        self._theirs, self._table, self._shapes = theirs, table, shapes
        self.source = theirs.source
        wanted = {part.name: part.shape for parts in table.values() for part in parts}
        problems = [f"{name} is missing" for name in shapes if name not in table]
        there = theirs.names()
        problems += [f"{name} is missing" for name in wanted.keys() - set(there)]
        for name in there:
            if name in wanted and theirs.shape(name) != wanted[name]:
                problems.append(f"{name} has shape {list(theirs.shape(name))}, expected {list(wanted[name])}")
            elif name in wanted and theirs.dtype(name) not in KINDS:
                kind = WORDS.get(theirs.dtype(name))
                problems.append(f"{name} is stored as {kind}, expected one of {', '.join(KINDS.values())}")
            elif name not in wanted and not re.fullmatch(ignored, name):
                problems.append(f"{name} is unknown")
        if problems:
            raise ValueError(f"{self.source} does not fit its config.json: " + "; ".join(sorted(problems)))

    def names(self) -> list[str]:
        return list(self._table)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """The widest of its parts'."""
        kinds = [self._theirs.dtype(part.name) for part in self._table[name]]
        widest = kinds[0]
        for kind in kinds[1:]:
            widest = torch.promote_types(widest, kind)
        return widest

    def read(self, name: str, box: Box) -> Tensor:
        box = box or tuple(slice(0, size) for size in self._shapes[name])
        target = torch.empty([b.stop - b.start for b in box], dtype=self.dtype(name))
        self.fill(target, name, box)
        return target

    def fill(self, target: Tensor, name: str, box: Box) -> None:
        """Copies a box of one tensor into `target`, of the box's shape and any type or device."""
        for part in self._table[name]:
            lead = len(part.at)
            if all(b.start <= i < b.stop for i, b in zip(part.at, box, strict=False)):
                here = target[tuple(i - b.start for i, b in zip(part.at, box, strict=False))]
                self._copy(here, part, self._shapes[name][lead:], box[lead:])

    def _copy(self, target: Tensor, part: Part, shape: tuple[int, ...], box: Box) -> None:
        for ours, theirs in _runs(shape, part.region, box):
            found = self._theirs.read(part.name, part.stored(theirs))
            found = found.mT if part.transposed and found.dim() > 1 else found
            sizes = [b.stop - b.start for b in ours]
            inside = tuple(
                slice(b.start - whole.start, b.stop - whole.start) for b, whole in zip(ours, box, strict=True)
            )
            target[inside].copy_(found.reshape(sizes))


class Outward:
    """Our tensors under their names: what an export writes.

    Args:
        ours: a model's tensors.
        table: their parts.
    """

    def __init__(self, ours: Source, table: Table) -> None:
        self._ours = ours
        self.source = ours.source
        self._places: dict[str, list[tuple[str, Part]]] = {}
        for name, parts in table.items():
            for part in parts:
                self._places.setdefault(part.name, []).append((name, part))

    def names(self) -> list[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name][0][1].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._ours.dtype(self._places[name][0][0])

    def same(self, name: str) -> str | None:
        """The tensor of ours that this one is, if it is one, with the same axes."""
        ours, part = self._places[name][0]
        plain = not part.at and part.rows is None and not part.transposed
        return ours if plain and self._ours.shape(ours) == part.shape else None

    def read(self, name: str, box: Box) -> Tensor:
        """A box of one tensor; the whole tensor is put together for it unless it is one of ours."""
        same = self.same(name)
        if same is not None:
            return self._ours.read(same, box)
        whole = torch.empty(self.shape(name), dtype=self.dtype(name))
        for ours, part in self._places[name]:
            region = tuple(slice(0, size) for size in part.region)
            at = tuple(slice(i, i + 1) for i in part.at)
            rest = tuple(slice(0, size) for size in self._ours.shape(ours)[len(at) :])
            found = self._ours.read(ours, at + rest).reshape(part.region)
            whole[part.stored(region)] = found.mT if part.transposed and found.dim() > 1 else found
        return whole[box] if box else whole


def pieces(source: Source, name: str, size: int = PIECE) -> Iterator[Tensor]:
    """A tensor of any source in pieces along its first axis, of `size` bytes or of one row; no part is read twice."""
    shape = source.shape(name)
    row = source.dtype(name).itemsize * math.prod(shape[1:])
    step = max(1, size // max(1, row))
    if not shape or step >= shape[0] or (isinstance(source, Outward) and source.same(name) is None):
        yield source.read(name, ())
        return
    rest = tuple(slice(0, length) for length in shape[1:])
    for start in range(0, shape[0], step):
        yield source.read(name, (slice(start, min(start + step, shape[0])), *rest))


def _runs(shape: Sequence[int], region: Sequence[int], box: Box) -> Iterator[tuple[Box, Box]]:
    """(box of ours, box of theirs) that hold the same numbers and together make up `box` of ours.

    `shape` is `region` with some of its axes split.
    """
    groups, first = [], 0
    for length in region:
        last, product = first, 1
        while last < len(shape) and (product < length or last == first):
            product *= shape[last]
            last += 1
        groups.append((first, last))
        first = last
    groups[-1] = (groups[-1][0], len(shape))
    choices = [list(_axis(shape[a:b], box[a:b])) for a, b in groups]
    for chosen in itertools.product(*choices):
        yield tuple(s for ours, _ in chosen for s in ours), tuple(theirs for _, theirs in chosen)


def _axis(sizes: Sequence[int], box: Box) -> Iterator[tuple[Box, slice]]:
    """The same for one axis of theirs that ours splits into `sizes`: as few runs as can be."""
    inner = math.prod(sizes[1:])
    if all(b.start == 0 and b.stop == size for b, size in zip(box[1:], sizes[1:], strict=True)):
        yield tuple(box), slice(box[0].start * inner, box[0].stop * inner)
        return
    for i in range(box[0].start, box[0].stop):
        for rest, run in _axis(sizes[1:], box[1:]):
            yield (slice(i, i + 1), *rest), slice(run.start + i * inner, run.stop + i * inner)
