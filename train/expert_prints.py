"""Fingerprints of experts, by which every expert of a checkpoint is found in one place, whole, and in its own.

An expert's print is the sum over its elements of (a number drawn from the element's place) * (the element's bits),
modulo 2^64. Sums do not care how ranks have cut an expert, so parts are printed where they lie and added up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..models.shards import local_box
from .manifest import CheckpointError

Prints = dict[str, list[str]]
"""Of each stack of experts, expert by expert."""
_AT_ONCE = 2**17  # elements; their places and products are int64
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Part(NamedTuple):
    """What one rank holds of one expert."""

    name: str
    expert: int
    box: tuple[tuple[int, int], ...]
    """Start and end on each axis of the expert."""
    print: int


def stack_shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The tensors of a training state that hold experts along their first axis: weights, biases, moments."""
    return {name: tuple(t.shape) for name, t in state.items() if ".moe.experts." in name and t.dim() >= 2}


@torch.no_grad()
def local_parts(state: Mapping[str, Tensor]) -> list[Part]:
    """The prints of all that this rank holds of experts."""
    parts = []
    for name in stack_shapes(state):
        tensor = state[name]
        experts, *box = ((s.start, s.stop) for s in local_box(tensor))
        values = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if values.numel():
            sums = print_rows(values, tuple(tensor.shape[1:]), [start for start, _ in box])
            parts += [Part(name, e, tuple(box), s) for e, s in enumerate(sums, experts[0])]
    return parts


def print_rows(values: Tensor, whole: Sequence[int], starts: Sequence[int] = ()) -> list[int]:
    """Prints of parts of several experts that are cut alike.

    Args:
        values: (experts, *part), any layout in memory.
        whole: the shape of a whole expert.
        starts: where the part begins on each axis of the whole; (): at 0.
    """
    starts = starts or [0] * len(whole)
    strides = [math.prod(whole[i + 1 :]) for i in range(len(whole))]
    bits = values.view(_BITS[values.dtype.itemsize])
    sums_E = torch.zeros(len(values), dtype=torch.int64, device=values.device)
    height = max(1, _AT_ONCE // max(1, math.prod(values.shape[2:])))
    for top in range(0, values.shape[1], height):
        block = bits[:, top : top + height]
        places = torch.zeros((), dtype=torch.int64, device=values.device)
        begins = [starts[0] + top, *starts[1:]]
        for begin, size, stride in zip(begins, block.shape[1:], strides, strict=True):
            axis = torch.arange(begin, begin + size, device=values.device) * stride
            places = places[..., None] + axis
        factors = _scatter(places)
        for e in range(len(block)):
            sums_E[e] += (block[e] * factors).sum()
    return [s % 2**64 for s in sums_E.tolist()]


def _scatter(places: Tensor) -> Tensor:
    """An odd number for each place, as if drawn (the finaliser of splitmix64)."""
    x = (places + 1) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor
    return (x ^ ((x >> 31) & (2**33 - 1))) | 1


def as_text(sums: Iterable[int]) -> list[str]:
    """Prints as a manifest holds them."""
    return [f"{s % 2**64:016x}" for s in sums]


def join(parts: Iterable[Part], shapes: Mapping[str, Sequence[int]]) -> Prints:
    """Prints of whole experts from the parts of all ranks.

    Args:
        parts: those of all ranks; copies of a part count once.
        shapes: of the stacks, with the experts' axis.

    Raises:
        ValueError: an expert is not whole, is held in parts that overlap, or its copies differ.
    """
    found: dict[str, list[dict]] = {name: [{} for _ in range(shape[0])] for name, shape in shapes.items()}
    for name, expert, box, value in parts:
        if found[name][expert].setdefault(box, value) != value:
            raise ValueError(f"the copies of expert {expert} of {name} differ from rank to rank")
    prints: Prints = {}
    for name, experts in found.items():
        whole = math.prod(shapes[name][1:])
        for expert, boxes in enumerate(experts):
            held = sum(math.prod(end - start for start, end in box) for box in boxes)
            if held != whole:
                raise ValueError(f"the ranks hold {held} of the {whole} elements of expert {expert} of {name}")
        prints[name] = as_text(sum(boxes.values()) for boxes in experts)
    return prints


def compare(path: Path, expected: Prints, found: Prints) -> None:
    """Refuses experts that are not what was saved in `path`.

    Raises:
        CheckpointError: names the first expert that is another one, or none of those saved.
    """
    for name, prints in found.items():
        saved = expected.get(name, [])
        for expert, value in enumerate(prints):
            if expert < len(saved) and saved[expert] == value:
                continue
            what = f"holds expert {saved.index(value)}" if value in saved else "holds none of the experts saved"
            raise CheckpointError(f"checkpoint {path} was not read as it was saved: {name}[{expert}] {what}")
