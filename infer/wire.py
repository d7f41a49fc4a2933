"""What the first rank tells the others of a step: numbers in one tensor, checked as they are read. No object travels.

A message is whole numbers: its kind, whether routes are wanted, and the number of lanes; then for each lane its
length, tokens and rows with logits, and after these heads the lanes' parts: copies, slices, rows. Messages of other
kinds than a step have numbers in place of lanes.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from enum import IntEnum
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import Copy
from .step import Slice

_HEAD = 3  # kind, routes, lanes
_LANE = 3  # length, tokens, rows


class Kind(IntEnum):
    """What a message is for."""

    STEP = 1
    PULSE = 2
    """Nothing is to do; who does not answer is gone."""
    END = 3
    MOVE = 4
    """Pieces of experts are sent (`moving.pack_pieces`)."""
    PLACE = 5
    """A layer's experts get other slots (`moving.pack_slots`)."""


class Part(NamedTuple):
    """What one lane computes."""

    copies: tuple[Copy, ...]
    slices: tuple[Slice, ...]
    rows: tuple[int, ...]
    """Tokens of the slices, one after another, whose logits are wanted."""

    @property
    def tokens(self) -> int:
        return sum(len(piece.tokens) for piece in self.slices)


class Order(NamedTuple):
    """A message as one lane reads it."""

    kind: Kind
    routes: bool
    """Whether the experts of each token are wanted."""
    tokens: tuple[int, ...] = ()
    """Of every lane."""
    rows: tuple[int, ...] = ()
    """Logits wanted of every lane."""
    part: Part = Part((), (), ())
    """Of this lane. Keys, drafts and what a slice's logits are for stay with the first rank."""
    numbers: tuple[int, ...] = ()
    """Of a message about experts."""


def encode(kind: Kind, parts: Sequence[Part] = (), routes: bool = False) -> Tensor:
    """The message, int64 (N,)."""
    bodies = [_body(part) for part in parts]
    numbers = array("q", [kind, routes, len(parts)])
    for part, body in zip(parts, bodies, strict=True):
        numbers.extend((len(body), part.tokens, len(part.rows)))
    for body in bodies:
        numbers.extend(body)
    return torch.frombuffer(numbers, dtype=torch.int64)


def encode_numbers(kind: Kind, numbers: Sequence[int] = ()) -> Tensor:
    """A message without parts, int64 (N,)."""
    return torch.tensor([kind, 0, len(numbers), *numbers])


def _body(part: Part) -> array:
    numbers = array("q", [len(part.copies), len(part.slices)])
    numbers.extend(chain.from_iterable(part.copies))
    for piece in part.slices:
        numbers.extend((piece.start, len(piece.tokens), len(piece.blocks)))
        numbers.extend(piece.tokens)
        numbers.extend(piece.blocks)
    numbers.extend(part.rows)
    return numbers


def decode(message: Tensor, lane: int) -> Order:
    """What a message says to one lane.

    Raises:
        ValueError: it is not whole, or says nothing that is known.
    """
    numbers = array("q", message.numpy().tobytes())
    try:
        kind, routes, lanes = Kind(numbers[0]), bool(numbers[1]), numbers[2]
        if kind is not Kind.STEP:
            if len(numbers) != _HEAD + lanes:
                raise ValueError(f"{lanes} numbers are told of")
            return Order(kind, routes, numbers=tuple(numbers[_HEAD:]))
        heads = [numbers[_HEAD + i * _LANE : _HEAD + (i + 1) * _LANE] for i in range(lanes)]
        begin = _HEAD + lanes * _LANE + sum(head[0] for head in heads[:lane])
        length, tokens, rows = heads[lane]
        part = _part(numbers[begin : begin + length], rows)
    except (IndexError, ValueError) as error:
        raise ValueError(f"a message of {len(numbers)} numbers is not one of ours: {error}") from None
    if begin + length > len(numbers) or part.tokens != tokens:
        raise ValueError(f"a message of {len(numbers)} numbers is not whole")
    return Order(kind, routes, tuple(head[1] for head in heads), tuple(head[2] for head in heads), part)


def _part(body: array, rows: int) -> Part:
    copies, count, at = body[0], body[1], 2
    pairs = tuple((body[at + 2 * i], body[at + 2 * i + 1]) for i in range(copies))
    at += 2 * copies
    slices = []
    for _ in range(count):
        start, tokens, blocks = body[at : at + 3]
        at += 3
        slices.append(
            Slice(
                ("", 0), start, tuple(body[at : at + tokens]), tuple(body[at + tokens : at + tokens + blocks]), False
            )
        )
        at += tokens + blocks
    if at + rows != len(body):
        raise ValueError(f"{len(body)} numbers of a lane, of which {at + rows} are told of")
    return Part(pairs, tuple(slices), tuple(body[at:]))
