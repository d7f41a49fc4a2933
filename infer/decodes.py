"""Steps in which every sequence computes one token, recorded for each number of sequences and repeated.

N sequences of a step, M blocks that a text can have.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.paged_kv import Ragged
from ..kernels.tape import Arena, Recording, record
from ..models.gpt import GPT, Output
from .paged import KVPool, PagedCache, tables_of
from .step import Slice

MOST = 128
"""Sequences: a step of more is ruled by its products, not by what starts them."""
_GROW = 8
log = logging.getLogger("coterie")


class Decodes:
    """Repeats decode steps of one model over one pool: their tokens, positions and tables lie at fixed places.

    On a GPU a recording serves all numbers of sequences up to its own. The rows left over repeat the first sequence:
    they write what it writes, and visit no expert that it does not visit.

    Recordings read the weights where they lie: whoever puts others in their place says `forget`.
    """

    def __init__(self, model: GPT, pool: KVPool) -> None:
        self._model, self._pool = model, pool
        self._recordings, self._arena = dict[int, Recording[Output]](), Arena()
        self._weights = [p.detach() for p in model.parameters()]  # what a recording reads stays in memory
        self._shares = pool.device.type == "cuda"
        columns = min(-(-model.config.max_positions // pool.size), pool.blocks)
        kind = {"dtype": torch.int32, "device": pool.device}
        self._all_3N = torch.zeros(3, MOST, dtype=torch.int64, device=pool.device)
        self._tables_NM = torch.zeros(MOST, columns, **kind)
        self._starts_N1, self._lengths_N = torch.arange(MOST + 1, **kind), torch.ones(MOST, **kind)
        self.why_not: str | None = None
        """Why this model's steps cannot be recorded."""

    def forget(self) -> None:
        """Records anew what is asked for from here on."""
        self._recordings.clear()
        self._weights = [p.detach() for p in self._model.parameters()]

    def run(self, slices: Sequence[Slice]) -> Output | None:
        """The pass over slices of one token each, one logit row for each. What it returns holds until the next run.
        None: this step cannot be repeated.

        Raises:
            ValueError: what `PagedCache.begin` says.
        """
        size = len(slices)
        if self.why_not is not None or not 0 < size <= MOST or any(len(piece.tokens) != 1 for piece in slices):
            return None
        rows = self._rows(size)
        all_3N, ragged = tables_of([*slices, *[slices[0]] * (rows - size)], self._pool)
        self._all_3N[:, :rows].copy_(all_3N)
        self._tables_NM[:rows, : ragged.tables_NM.shape[1]].copy_(ragged.tables_NM)
        self._lengths_N[:rows].copy_(ragged.lengths_N)
        found = self._recordings.get(rows)
        if found is None:
            return self._record(rows, size)
        return _first(found.replay(), size)

    def _rows(self, size: int) -> int:
        if not self._shares:
            return size
        return 1 << (size - 1).bit_length() if size < _GROW else -(-size // _GROW) * _GROW

    def _record(self, rows: int, size: int) -> Output | None:
        tokens_1N, positions_1N, slots_N = self._all_3N[:1, :rows], self._all_3N[1:2, :rows], self._all_3N[2, :rows]
        # The host's numbers decide how the work is cut: those of the longest text hold for all.
        longest = self._tables_NM.shape[1] * self._pool.size
        tables = (self._tables_NM[:rows], self._starts_N1[: rows + 1], self._lengths_N[:rows], slots_N)
        cache = PagedCache(self._pool)
        cache.ragged = Ragged(*tables, longest, 1)
        try:
            recording = record(
                lambda: self._model(tokens_1N, positions_1N, cache=cache), self._pool.device, self._arena
            )
        except RuntimeError as error:
            self.why_not = str(error)
            log.info("decode steps are not recorded: %s", error)
            return None
        self._recordings[rows] = recording
        return _first(recording.output, size)


def _first(out: Output, size: int) -> Output:
    """The first `size` rows."""
    logits_BSV = out.logits_BSV
    if logits_BSV is None or logits_BSV.shape[1] == size:
        return out
    routes: tuple[Tensor, ...] = tuple(ids_TK[:size] for ids_TK in out.routes)
    return out._replace(logits_BSV=logits_BSV[:, :size], routes=routes)
