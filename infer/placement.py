"""Which rank holds which expert: the machine's room, a checked placement, and what a change of it moves.

Ranks are numbered node by node. An expert has one copy or more, each on a rank of its own: a second copy on one rank
would cost memory and share no work. No torch.
"""

# Shapes: L layers, R ranks, N nodes of G ranks, C slots of a rank, E experts (of the layer with most).

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Cluster:
    """Where experts can be held.

    Attributes:
        nodes, ranks: nodes, and ranks of each of them.
        slots: copies that a rank may hold of one layer's experts.
        copies: copies that a rank may hold of all layers' together; None: no bound but the slots.
    """

    nodes: int
    ranks: int
    slots: int
    copies: int | None = None

    def __post_init__(self) -> None:
        if min(self.nodes, self.ranks, self.slots) < 1:
            raise ValueError(f"{self.nodes} nodes of {self.ranks} ranks with {self.slots} slots hold nothing")

    @classmethod
    def of_bytes(cls, nodes: int, ranks: int, slots: int, rank_bytes: int, expert_bytes: int) -> Cluster:
        """With the copies that fit in `rank_bytes` of a rank when the largest expert has `expert_bytes`."""
        return cls(nodes, ranks, slots, rank_bytes // expert_bytes)

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.nodes * self.ranks

    def room(self, experts: Sequence[int], skew: Sequence[float] | None = None) -> tuple[int, ...]:
        """Slots of a rank in each layer. Where `copies` does not allow all, every layer gets what it needs, and
        what is left goes one by one to the layers with the least, of these to the most skewed.

        Args:
            experts: of each layer.
            skew: how uneven each layer's load is; None: all alike.

        Raises:
            ValueError: a layer's experts do not fit.
        """
        least = [-(-count // self.world) for count in experts]
        most = [min(self.slots, count) for count in experts]
        left = sum(most) if self.copies is None else self.copies
        if any(a > b for a, b in zip(least, most, strict=True)) or sum(least) > left:
            raise ValueError(
                f"layers of {_short(experts)} experts need {max(least)} slots and {sum(least)} copies on each of "
                f"{self.world} ranks, and there are {self.slots} and {left}: use more ranks or give them more memory"
            )
        if left >= sum(most):
            return tuple(most)
        given, left = list(least), left - sum(least)
        skew = [0.0] * len(least) if skew is None else list(skew)
        while left and (open_ := [i for i, n in enumerate(given) if n < most[i]]):
            given[min(open_, key=lambda i: (given[i] - least[i], -skew[i], i))] += 1
            left -= 1
        return tuple(given)


@dataclass(frozen=True, eq=False)
class Placement:
    """Which expert is in each slot of each rank.

    Attributes:
        slots_LRC: experts, -1 for an empty slot; each rank's in ascending order with the empty ones last; int16.
        experts: of each layer.
        nodes: the ranks are divided over these evenly, in order.

    Raises:
        ValueError: an expert is nowhere, or twice on a rank, or does not exist; the nodes do not divide the ranks.
    """

    slots_LRC: np.ndarray
    experts: tuple[int, ...]
    nodes: int = 1

    def __post_init__(self) -> None:
        slots = np.asarray(self.slots_LRC)
        if slots.ndim != 3 or slots.dtype.kind not in "iu" or len(slots) != len(self.experts) or not self.experts:
            raise ValueError("a placement needs whole numbers (L, R, C) and the number of experts of each layer")
        if self.nodes < 1 or not slots.shape[1] or slots.shape[1] % self.nodes:
            raise ValueError(f"{slots.shape[1]} ranks cannot be divided over {self.nodes} nodes")
        if (slots < -1).any() or (slots >= np.array(self.experts)[:, None, None]).any():
            raise ValueError("a slot has an expert that its layer does not have")
        key = np.where(slots < 0, np.iinfo(np.int16).max, slots).astype(np.int16)  # empty slots sort last
        key.sort(axis=2)
        slots = np.where(key == np.iinfo(np.int16).max, -1, key).astype(np.int16)
        if ((slots[:, :, 1:] == slots[:, :, :-1]) & (slots[:, :, 1:] >= 0)).any():
            raise ValueError("a rank holds an expert twice, which would share no work")
        slots.flags.writeable = False
        object.__setattr__(self, "slots_LRC", slots)
        missing = (self.copies_LE == 0) & (np.arange(max(self.experts)) < np.array(self.experts)[:, None])
        if missing.any():
            layer, expert = np.argwhere(missing)[0]
            raise ValueError(f"expert {expert} of layer {layer} is on no rank")

    @property
    def ranks(self) -> int:
        return self.slots_LRC.shape[1]

    @cached_property
    def held_LRE(self) -> np.ndarray:
        """Whether a rank holds an expert."""
        return held(self.slots_LRC, max(self.experts))

    @cached_property
    def copies_LE(self) -> np.ndarray:
        """Ranks that hold each expert."""
        return self.held_LRE.sum(1)

    def check(self, cluster: Cluster) -> None:
        """Raises ValueError unless the cluster has the room."""
        if (self.nodes, self.ranks) != (cluster.nodes, cluster.world):
            raise ValueError(f"a placement on {self.ranks} ranks of {self.nodes} nodes is not one on {cluster}")
        used_RL = (self.slots_LRC >= 0).sum(2).T
        if used_RL.max() > cluster.slots:
            raise ValueError(f"a rank holds {used_RL.max()} experts of a layer and has {cluster.slots} slots")
        if cluster.copies is not None and used_RL.sum(1).max() > cluster.copies:
            raise ValueError(f"a rank holds {used_RL.sum(1).max()} experts and has memory for {cluster.copies}")


def held(slots_LRC: np.ndarray, experts: int) -> np.ndarray:
    """Whether a rank holds an expert, (L, R, E), of slots with -1 for none."""
    flags = np.zeros((*slots_LRC.shape[:2], experts + 1), bool)
    np.put_along_axis(flags, slots_LRC.astype(np.intp), True, 2)  # -1 is the column behind the last expert
    return flags[:, :, :-1]


def round_robin(experts: Sequence[int], cluster: Cluster) -> Placement:
    """Experts in order, as expert parallelism lays them out: every rank has a run of them, and copies of the first
    experts of other ranks where there is room."""
    slots_LRC = np.full((len(experts), cluster.world, cluster.slots), -1, np.int16)
    for layer, (count, room) in enumerate(zip(experts, cluster.room(experts), strict=True)):
        width = -(-count // cluster.world)
        for rank in range(cluster.world):
            mine = [(rank * width + i) % count for i in range(min(room, count))]
            slots_LRC[layer, rank, : len(mine)] = mine
    return Placement(slots_LRC, tuple(experts), cluster.nodes)


def moved(before: Placement, after: Placement) -> np.ndarray:
    """Copies (L,) that a rank must fetch: those that it did not hold."""
    return (after.held_LRE & ~before.held_LRE).sum((1, 2))


def _short(numbers: Sequence[int]) -> str:
    return ", ".join(str(n) for n in sorted(set(numbers)))
