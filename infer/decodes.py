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
        self._columns = min(-(-model.config.max_positions // pool.size), pool.blocks)
        self._inputs = dict[int, _Inputs]()
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
        inputs = self._inputs.get(rows)
        if inputs is None:
            with torch.inference_mode(False):  # what is made in it can only be written in it
                inputs = self._inputs[rows] = _Inputs(rows, self._columns, self._pool.device)
        inputs.put(all_3N, ragged)
        found = self._recordings.get(rows)
        if found is None:
            return self._record(inputs, rows, size)
        return _first(found.replay(), size)

    def _rows(self, size: int) -> int:
        if not self._shares:
            return size
        return 1 << (size - 1).bit_length() if size < _GROW else -(-size // _GROW) * _GROW

    def _record(self, inputs: _Inputs, rows: int, size: int) -> Output | None:
        cache = PagedCache(self._pool)
        # The host's numbers decide how the work is cut: those of the longest text hold for all.
        cache.ragged = inputs.ragged(self._columns * self._pool.size)
        try:
            recording = record(
                lambda: self._model(*inputs.tokens_and_positions(), cache=cache), self._pool.device, self._arena
            )
        except RuntimeError as error:
            self.why_not = str(error)
            log.info("decode steps are not recorded: %s", error)
            return None
        self._recordings[rows] = recording
        return _first(recording.output, size)


class _Inputs:
    """What a recording of `rows` sequences reads, side by side: a step's numbers travel to a GPU in one copy, from
    memory that the host does not have to wait for. Steps do not overlap, so the last copy is done."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self._there = torch.zeros(rows * (8 + columns), dtype=torch.int32, device=device)
        pinned = device.type == "cuda"
        self._here = torch.zeros(len(self._there), dtype=torch.int32, pin_memory=True) if pinned else self._there
        self._here[6 * rows : 7 * rows] = 1
        self._rows, self._starts_N1 = rows, torch.arange(rows + 1, dtype=torch.int32, device=device)

    def _parts(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, positions and slots (3, N) int64, lengths (N,), and tables (N, M)."""
        rows = self._rows
        longs_3N, lengths_N = numbers[: 6 * rows].view(torch.int64).view(3, rows), numbers[6 * rows : 7 * rows]
        return longs_3N, lengths_N, numbers[8 * rows :].view(rows, -1)  # at a multiple of 16 bytes

    def put(self, all_3N: Tensor, ragged: Ragged) -> None:
        """Takes the numbers of a step, as `tables_of` gives them."""
        longs_3N, lengths_N, tables_NM = self._parts(self._here)
        longs_3N.copy_(all_3N)
        lengths_N.copy_(ragged.lengths_N)
        tables_NM[:, : ragged.tables_NM.shape[1]].copy_(ragged.tables_NM)
        if self._here is not self._there:
            self._there.copy_(self._here, non_blocking=True)

    def tokens_and_positions(self) -> tuple[Tensor, Tensor]:
        """(1, N) each."""
        all_3N = self._parts(self._there)[0]
        return all_3N[:1], all_3N[1:2]

    def ragged(self, longest: int) -> Ragged:
        """The step's tables, for texts of up to `longest` tokens."""
        all_3N, lengths_N, tables_NM = self._parts(self._there)
        return Ragged(tables_NM, self._starts_N1, lengths_N, all_3N[2], longest, 1)


def _first(out: Output, size: int) -> Output:
    """The first `size` rows."""
    logits_BSV = out.logits_BSV
    if logits_BSV is None or logits_BSV.shape[1] == size:
        return out
    routes: tuple[Tensor, ...] = tuple(ids_TK[:size] for ids_TK in out.routes)
    return out._replace(logits_BSV=logits_BSV[:, :size], routes=routes)
