"""Keys and values of many sequences in one pool of blocks, and the cache that a ragged step's model pass sees.

T new tokens of N sequences in one step, M blocks of the longest table, H query heads, G key heads, d head width.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain, islice
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..kernels.paged_attention import LayerKV, Ragged, store_and_attend
from ..kernels.paged_kv import LARGEST
from ..models.config import ModelConfig
from .blocks import Copy
from .step import Slice

KVType = Literal["auto", "float32", "bfloat16", "float16", "int8", "fp8"]
"""What keys and values are kept in. auto: the model's own type. int8 and fp8 (e4m3): a scale per token and head."""

_TYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}


def _type(dtype: KVType, model_dtype: torch.dtype) -> torch.dtype:
    if dtype not in get_args(KVType):
        raise ValueError(f"keys and values cannot be kept as {dtype!r}: give one of {', '.join(get_args(KVType))}")
    return model_dtype if dtype == "auto" else _TYPES[dtype]


def block_bytes(config: ModelConfig, size: int, dtype: KVType, model_dtype: torch.dtype) -> int:
    """Bytes of one block of `size` tokens, in all layers, keys, values and their scales."""
    kind = _type(dtype, model_dtype)
    head = config.width_per_head * kind.itemsize + (4 if kind in LARGEST else 0)
    return config.layers * 2 * size * config.num_kv_heads * head


class KVPool:
    """`blocks` blocks of `size` tokens in every layer. Memory is touched only when it is first written.

    Attributes:
        blocks, size: how many blocks, and tokens in each.
        dtype: what keys and values are kept in.
        device: where they are.
    """

    def __init__(
        self,
        config: ModelConfig,
        blocks: int,
        size: int,
        *,
        dtype: KVType = "auto",
        model_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if blocks < 1 or size < 1:
            raise ValueError(f"{blocks} blocks of {size} tokens hold nothing: give at least 1 of each")
        self.blocks, self.size = blocks, size
        self.dtype = _type(dtype, model_dtype)
        on_cuda = torch.device(device or "cpu").type == "cuda"
        if on_cuda and self.dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability(device) < (8, 9):
            raise ValueError("keys and values in fp8 need a GPU of compute capability 8.9 or more: give int8")
        shape = (2, config.layers, blocks, size, config.num_kv_heads, config.width_per_head)
        self._store = torch.empty(shape, dtype=self.dtype, device=device)
        scaled = self.dtype in LARGEST
        self._scales = torch.empty(shape[:-1], dtype=torch.float32, device=device) if scaled else None
        self.device = self._store.device
        # What `copy` moves: no arithmetic is done, and torch cannot index every type.
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[self.dtype.itemsize]
        self._copied = [self._store.view(bits)] + ([] if self._scales is None else [self._scales])
        self._layers = [self._layer(i) for i in range(config.layers)]

    def _layer(self, layer: int) -> LayerKV:
        k, v = self._store[:, layer]
        if self._scales is None:
            return LayerKV(k, v)
        return LayerKV(k, v, *self._scales[:, layer])

    def layer(self, layer: int) -> LayerKV:
        """Keys and values of one layer; views, the same each time."""
        return self._layers[layer]

    @property
    def bytes(self) -> int:
        """Memory of the whole pool."""
        return sum(t.numel() * t.itemsize for t in self._copied)

    def copy(self, pairs: Sequence[Copy]) -> None:
        """Copies whole blocks, (from, to), in all layers, in order: a later pair may read what an earlier one wrote.

        Raises:
            ValueError: a block that the pool does not have.
        """
        for block in chain.from_iterable(pairs):
            if not 0 <= block < self.blocks:
                raise ValueError(f"block {block} is not one of the pool's {self.blocks}")
        sources: list[int] = []
        targets: dict[int, None] = {}
        for source, target in pairs:
            # All of one batch is read before any of it is written.
            if source in targets or target in targets:
                self._copy(sources, list(targets))
                sources, targets = [], {}
            sources.append(source)
            targets[target] = None
        self._copy(sources, list(targets))

    def _copy(self, sources: list[int], targets: list[int]) -> None:
        if not sources:
            return
        both = sent(torch.tensor([sources, targets]), self.device)
        for store in self._copied:
            store.index_copy_(2, both[1], store.index_select(2, both[0]))


class PagedCache:
    """The `models.attention.Cache` of one ragged step over a pool.

    `begin` names the step's slices; the pass of the model that follows, on the tokens that it returns, stores their
    keys and values and attends. Positions are given to the model, so `length` stays 0.

    Attributes:
        ragged: the tables of the step that was begun last.
    """

    losses = False
    length = 0

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        self.ragged: Ragged | None = None

    def begin(self, slices: Sequence[Slice]) -> tuple[Tensor, Tensor]:
        """Makes ready for one pass over the slices' tokens, one slice for each sequence.

        Returns:
            Tokens (1, T) and their positions (1, T), int64, on the pool's device.

        Raises:
            ValueError: no slice, one without a token, with too few blocks, or with a block that the pool lacks.
        """
        all_3T, ragged = tables_of(slices, self.pool)
        at = self.pool.device
        all_3T, tables_NM, starts_N1, lengths_N = (
            sent(t, at) for t in (all_3T, ragged.tables_NM, ragged.starts_N1, ragged.lengths_N)
        )
        self.ragged = Ragged(tables_NM, starts_N1, lengths_N, all_3T[2], ragged.longest, ragged.widest)
        return all_3T[:1], all_3T[1:2]

    def idle(self) -> tuple[Tensor, Tensor]:
        """Makes ready for a pass without a token, as a rank has that only helps others."""
        self.ragged = None
        none_10 = torch.empty(1, 0, dtype=torch.int64, device=self.pool.device)
        return none_10, none_10

    def attend(self, layer: int, q_BSHd: Tensor, k_BSGd: Tensor, v_BSGd: Tensor) -> Tensor:
        """Stores the new keys and values (1, T, G, d) of `layer` and attends: o_BSHd (1, T, H, d)."""
        if self.ragged is None and q_BSHd.shape[:2] == (1, 0):
            return q_BSHd
        if self.ragged is None or q_BSHd.shape[:2] != (1, self.ragged.slots_T.shape[0]):
            raise ValueError(f"queries of shape {tuple(q_BSHd.shape)} are not those of the step that was begun")
        o_THd = store_and_attend(q_BSHd[0], k_BSGd[0], v_BSGd[0], self.pool.layer(layer), self.ragged)
        return o_THd[None]


def sent(numbers: Tensor, device: torch.device) -> Tensor:
    """The host's numbers on a device. A copy to a GPU is under way: only pinned memory is read without a wait."""
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)


def tables_of(slices: Sequence[Slice], pool: KVPool) -> tuple[Tensor, Ragged]:
    """Tokens, positions and slots of a step, int64 (3, T), and its tables, all on the host.

    Raises:
        ValueError: what `PagedCache.begin` says.
    """
    for piece in slices:
        if not piece.tokens or piece.start < 0 or len(piece.blocks) * pool.size < piece.start + len(piece.tokens):
            raise ValueError(
                f"{len(piece.tokens)} tokens from position {piece.start} do not lie in "
                f"{len(piece.blocks)} blocks of {pool.size}"
            )
    if not slices:
        raise ValueError("a step without a slice computes nothing")
    table = _table(slices)
    if not 0 <= int(table.min()) <= int(table.max()) < pool.blocks:
        raise ValueError(f"a table names block {int(table.max())}, but the pool has {pool.blocks}")
    longs = array("q", chain.from_iterable(piece.tokens for piece in slices))
    total = len(longs)
    lengths = array("i", [piece.start + len(piece.tokens) for piece in slices])
    starts = array("i", accumulate((len(piece.tokens) for piece in slices), initial=0))
    if total == len(slices):
        longs.extend([piece.start for piece in slices])
    else:
        longs.extend(chain.from_iterable(range(p.start, p.start + len(p.tokens)) for p in slices))
    for piece in slices:
        longs.extend(_slots(piece, pool.size))
    all_3T = torch.frombuffer(longs, dtype=torch.int64).view(3, total)
    starts_N1, lengths_N = (torch.frombuffer(x, dtype=torch.int32) for x in (starts, lengths))
    widest = max(len(piece.tokens) for piece in slices)
    return all_3T, Ragged(torch.from_numpy(table), starts_N1, lengths_N, all_3T[2], max(lengths), widest)


def _table(slices: Sequence[Slice]) -> np.ndarray:
    """Block tables, int32 (N, M), padded with 0."""
    widest = max(len(piece.blocks) for piece in slices)
    table = np.zeros((len(slices), widest), np.int32)
    for row, piece in zip(table, slices, strict=True):
        row[: len(piece.blocks)] = array("i", piece.blocks)
    return table


def _slots(piece: Slice, size: int) -> Iterable[int]:
    """Where each of the new tokens goes: block * size + offset."""
    first, offset = divmod(piece.start, size)
    if len(piece.tokens) == 1:
        return (piece.blocks[first] * size + offset,)
    whole = chain.from_iterable(range(block * size, block * size + size) for block in piece.blocks[first:])
    return islice(whole, offset, offset + len(piece.tokens))
