"""Experts on their way between ranks while a model is served: sent in slices between steps, then put in place.

What has come waits beside the slots, which are read by every step until the layer's slots change on all ranks at the
same step. So no token ever sees half an expert, or one that moved on one rank and not on another.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..moe.experts import Experts
from ..moe.gathered import Own
from .rearrange import Fetch, Piece, arrange, pieces, targets

_PIECE = 8  # numbers of a piece in a message


class Movers:
    """The experts of this rank, per MoE layer, and where those of all ranks are. All ranks do all of this alike.

    Attributes:
        slots: per layer the expert in each slot of each share, (P, C).
        nodes: over which the shares are divided.
    """

    def __init__(self, experts: Sequence[Experts], owns: Sequence[Own | None], nodes: int = 1) -> None:
        self.experts, self.owns, self.nodes = experts, owns, nodes
        self.slots = [None if own is None else _even(own) for own in owns]
        self._waiting: dict[tuple[int, int], list[Tensor]] = {}

    def sizes(self, layer: int) -> list[int]:
        """Numbers in each tensor of one expert on this rank."""
        return [tensor[0].numel() for tensor in _tensors(self.experts[layer])]

    def bytes(self, layer: int) -> int:
        """Of one expert on this rank."""
        return sum(tensor[0].nbytes for tensor in _tensors(self.experts[layer]))

    def move(self, layer: int, some: Sequence[Piece]) -> None:
        """Sends and receives pieces, in order; every rank of the group must call with the same."""
        own, tensors = self.owns[layer], _tensors(self.experts[layer])
        assert own is not None
        members, slice_ = dist.get_process_group_ranks(own.group), own.group.rank() % own.etp
        for piece in some:
            fetch = piece.fetch
            if own.share == fetch.source:
                part = tensors[piece.tensor][fetch.source_slot].view(-1)[piece.begin : piece.end]
                dist.send(part, members[fetch.share * own.etp + slice_])
            elif own.share == fetch.share:
                part = self._room(layer, fetch.slot)[piece.tensor][piece.begin : piece.end]
                dist.recv(part, members[fetch.source * own.etp + slice_])

    def _room(self, layer: int, slot: int) -> list[Tensor]:
        key = layer, slot
        if key not in self._waiting:
            self._waiting[key] = [torch.empty_like(tensor[0]).view(-1) for tensor in _tensors(self.experts[layer])]
        return self._waiting[key]

    def place(self, layer: int, slots_PC: np.ndarray) -> None:
        """Puts what has come into its slots, and lets the layer's tokens go there from the next step on."""
        own = self.owns[layer]
        assert own is not None
        for slot in range(own.slots):
            for tensor, come in zip(
                _tensors(self.experts[layer]), self._waiting.pop((layer, slot), ()), strict=False
            ):
                tensor[slot].view(-1).copy_(come)
        count = int(slots_PC.max()) + 1
        own.place(torch.from_numpy(slots_PC).long(), torch.from_numpy(targets(slots_PC, count, self.nodes)).long())
        self.slots[layer] = slots_PC

    def plan(self, layer: int, wanted_PC: np.ndarray, most: int) -> tuple[list[list[Piece]], np.ndarray]:
        """Pieces for each turn, of `most` bytes at most for any one rank to get, and the slots when all have come."""
        now_PC = self.slots[layer]
        assert now_PC is not None
        new_PC, fetches = arrange(now_PC, wanted_PC, self.nodes)
        numbers = max(1, most // _tensors(self.experts[layer])[0].element_size())
        return list(pieces(layer, fetches, self.sizes(layer), numbers)), new_PC


def pack_pieces(some: Sequence[Piece]) -> list[int]:
    """As numbers of a message."""
    return [n for piece in some for n in (piece.layer, piece.tensor, *piece.fetch, piece.begin, piece.end)]


def unpack_pieces(numbers: Sequence[int]) -> list[Piece]:
    """What `pack_pieces` packed."""
    whole = [numbers[i : i + _PIECE] for i in range(0, len(numbers), _PIECE)]
    return [Piece(n[0], n[1], Fetch(*n[2:6]), n[6], n[7]) for n in whole]


def pack_slots(layer: int, slots_PC: np.ndarray) -> list[int]:
    """As numbers of a message."""
    return [layer, len(slots_PC), *slots_PC.flatten().tolist()]


def unpack_slots(numbers: Sequence[int]) -> tuple[int, np.ndarray]:
    """What `pack_slots` packed."""
    return numbers[0], np.array(numbers[2:], np.int64).reshape(numbers[1], -1)


def _tensors(experts: Experts) -> list[Tensor]:
    given = experts.w_in, experts.w_out, experts.b_in, experts.b_out
    return [tensor.detach() for tensor in given if tensor is not None]


def _even(own: Own) -> np.ndarray:
    """Where experts are at first: a run of them on each share."""
    each = own.even
    slots_PC = np.full((own.shares, own.slots), -1)
    slots_PC[:, :each] = np.arange(own.shares * each).reshape(own.shares, each)
    return slots_PC
