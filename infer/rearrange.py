"""From where experts are to where a plan wants them: what each share fetches, in slices, and what is then put where.

Pure numbers, no torch. Experts that stay do not change their slot; what comes takes the slots of what goes.
"""

# Shapes: P shares of a layer's experts, C slots of each, E experts.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .replicas import spread


class Fetch(NamedTuple):
    """One expert that a share gets from another."""

    share: int
    slot: int
    """Where it will be."""
    source: int
    """The share that sends it, and the slot it has there."""
    source_slot: int


class Piece(NamedTuple):
    """A run of numbers of one tensor of one expert on its way."""

    layer: int
    tensor: int
    """Which of the experts' tensors."""
    fetch: Fetch
    begin: int
    end: int


def arrange(now_PC: np.ndarray, wanted_PC: np.ndarray, nodes: int = 1) -> tuple[np.ndarray, list[Fetch]]:
    """The slots that make every share hold what is wanted, and what is fetched for it.

    A copy comes from a share of its node if one has it, and from the one that sends least.

    Args:
        now_PC: the expert in each slot, -1 for none.
        wanted_PC: experts of each share, in any order, -1 for none.
    """
    now_PC, wanted_PC = np.asarray(now_PC), np.asarray(wanted_PC)
    shares = len(now_PC)
    node_P = np.arange(shares) * nodes // shares
    held = [{int(expert): slot for slot, expert in enumerate(row) if expert >= 0} for row in now_PC]
    new_PC, fetches, sent = now_PC.copy(), [], [0] * shares
    for share in range(shares):
        wanted = [int(expert) for expert in wanted_PC[share] if expert >= 0]
        free = [slot for slot, expert in enumerate(now_PC[share]) if expert not in wanted]
        new_PC[share, free] = -1
        for expert in sorted(set(wanted) - set(held[share])):
            having = [p for p in range(shares) if expert in held[p]]
            source = min(having, key=lambda p: (node_P[p] != node_P[share], sent[p], p))
            sent[source] += 1
            slot = free.pop(0)
            new_PC[share, slot] = expert
            fetches.append(Fetch(share, slot, source, held[source][expert]))
    return new_PC, fetches


def pieces(layer: int, fetches: Sequence[Fetch], sizes: Sequence[int], most: int) -> Iterator[list[Piece]]:
    """All numbers of the fetched experts, in lists of `most` numbers at most for any one share to get.

    Args:
        sizes: numbers in each of an expert's tensors.
    """
    shares = sorted({fetch.share for fetch in fetches})
    ways = [_of_share(layer, [fetch for fetch in fetches if fetch.share == share], sizes, most) for share in shares]
    longest = max(map(len, ways), default=0)
    for turn in range(longest):
        yield [piece for way in ways if turn < len(way) for piece in way[turn]]


def _of_share(layer: int, fetches: Sequence[Fetch], sizes: Sequence[int], most: int) -> list[list[Piece]]:
    turns, left = [[]], most
    for fetch in fetches:
        for tensor, size in enumerate(sizes):
            begin = 0
            while begin < size:
                if not left:
                    turns.append([])
                    left = most
                end = min(size, begin + left)
                turns[-1].append(Piece(layer, tensor, fetch, begin, end))
                left -= end - begin
                begin = end
    return turns


def targets(slots_PC: np.ndarray, experts: int, nodes: int = 1) -> np.ndarray:
    """Which share computes an expert for the tokens of each, (P, E)."""
    held_PE = np.zeros((len(slots_PC), experts), bool)
    for share, row in enumerate(slots_PC):
        held_PE[share, row[row >= 0]] = True
    return spread(held_PE, nodes)
