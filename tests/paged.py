"""Ragged steps over blocks for tests, and what attention over them means in fp64."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from coterie.kernels.paged_attention import LayerKV, Ragged, store_kv
from coterie.kernels.paged_kv import FP8, LARGEST

KINDS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
    "fp8": FP8,
}
# (keys after the step, new tokens) of each sequence
MIXES = {
    "decode": [(1, 1), (17, 1), (64, 1), (33, 1)],
    "prefill": [(5, 5), (70, 70), (32, 32)],
    "mixed": [(40, 1), (75, 30), (1, 1), (16, 16), (130, 3), (100, 99)],
    "one": [(21, 4)],
    "long": [(1100, 1), (530, 2), (1030, 20)],
}


def blank(blocks: int, size: int, groups: int, width: int, kind: torch.dtype) -> LayerKV:
    """A cache full of NaN."""
    k, v = (torch.zeros(blocks, size, groups, width).to(kind) for _ in range(2))
    if kind not in LARGEST:
        return LayerKV(k.fill_(float("nan")), v.fill_(float("nan")))
    return LayerKV(k, v, *(torch.full((blocks, size, groups), float("nan")) for _ in range(2)))


@dataclass
class Steps:
    """Sequences with random queries, keys and values, and blocks in a random order to keep them in."""

    mix: list[tuple[int, int]]
    heads: int = 4
    groups: int = 2
    width: int = 32
    size: int = 16
    kind: torch.dtype = torch.float32
    dtype: torch.dtype = torch.float32
    spare: int = 5
    q: list[Tensor] = field(default_factory=list)
    k: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)
    tables: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for length, _ in self.mix:
            self.q.append(torch.randn(length, self.heads, self.width).to(self.dtype))
            self.k.append(torch.randn(length, self.groups, self.width).to(self.dtype))
            self.v.append(torch.randn(length, self.groups, self.width).to(self.dtype))
        self.kv = self.place()

    def place(self) -> LayerKV:
        """A blank cache, and other blocks for every sequence."""
        counts = [-(-length // self.size) for length, _ in self.mix]
        blocks = sum(counts) + self.spare
        order = torch.randperm(blocks).tolist()
        self.tables = [[order.pop() for _ in range(count)] for count in counts]
        self.kv = blank(blocks, self.size, self.groups, self.width, self.kind)
        return self.kv

    def ragged(self, pieces: list[tuple[int, int, int]]) -> Ragged:
        """The step that computes tokens start to end of sequence n, for each piece (n, start, end)."""
        counts = [-(-end // self.size) for _, _, end in pieces]
        tables = [self.tables[n][:c] + [0] * (max(counts) - c) for (n, _, _), c in zip(pieces, counts, strict=True)]
        slots = [
            self.tables[n][p // self.size] * self.size + p % self.size for n, s, e in pieces for p in range(s, e)
        ]
        new = torch.tensor([0] + [end - start for _, start, end in pieces])
        lengths = [end for _, _, end in pieces]
        return Ragged(
            torch.tensor(tables, dtype=torch.int32),
            new.cumsum(0).int(),
            torch.tensor(lengths, dtype=torch.int32),
            torch.tensor(slots),
            max(lengths),
            int(new.max()),
        )

    def slots(self, n: int, start: int, end: int) -> list[int]:
        """Where positions start to end of sequence n lie."""
        return [self.tables[n][p // self.size] * self.size + p % self.size for p in range(start, end)]

    def cut(self, pieces: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the pieces, as they lie in a step."""
        q, k, v = (torch.cat([x[n][s:e] for n, s, e in pieces]) for x in (self.q, self.k, self.v))
        return q, k, v

    def earlier(self) -> None:
        """Stores all tokens but the new ones."""
        pieces = [(n, 0, length - new) for n, (length, new) in enumerate(self.mix) if length > new]
        if pieces:
            _, k, v = self.cut(pieces)
            store_kv(self.kv, k, v, self.ragged(pieces))

    @property
    def last(self) -> list[tuple[int, int, int]]:
        """The pieces of the new tokens."""
        return [(n, length - new, length) for n, (length, new) in enumerate(self.mix)]

    def stored(self, n: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of sequence n as the cache holds them, in fp64."""
        out = []
        slots = self.slots(n, 0, end)
        for store, scales in ((self.kv.k, self.kv.k_scale), (self.kv.v, self.kv.v_scale)):
            x = store.double().flatten(0, 1)[slots]
            out.append(x if scales is None else x * scales.double().flatten(0, 1)[slots][..., None])
        return out[0], out[1]

    def expected(
        self,
        pieces: list[tuple[int, int, int]],
        *,
        window: int = 0,
        sinks_H: Tensor | None = None,
        scale: float = 0.0,
    ) -> Tensor:
        """Attention of the pieces in fp64, over what the cache holds."""
        out = []
        for n, start, end in pieces:
            k, v = (x.repeat_interleave(self.heads // self.groups, 1) for x in self.stored(n, end))
            scores = torch.einsum("qhd,khd->hqk", self.q[n][start:end].double(), k) * (scale or self.width**-0.5)
            query, key = torch.arange(start, end)[:, None], torch.arange(end)
            unseen = key > query if not window else (key > query) | (key <= query - window)
            scores.masked_fill_(unseen, float("-inf"))
            if sinks_H is not None:
                scores = torch.cat((scores, sinks_H.double()[:, None, None].expand(-1, end - start, 1)), -1)
            out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :end], v))
        return torch.cat(out)
