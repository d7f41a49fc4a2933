"""What changes logits before a token is drawn: penalties, bias, bans and grammar masks.

B requests, V vocabulary, N pairs of a request and a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .request import SamplingParams


class History:
    """The distinct tokens of one request and how often it generated each; grows by one token a step.

    Memory follows the tokens, not the vocabulary; a preempted request keeps it.
    """

    def __init__(self, prompt: Iterable[int], generated: Iterable[int] = ()) -> None:
        self._place = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        self._size = len(self._place)
        room = max(64, 2 * self._size)
        self._ids_N = torch.zeros(room, dtype=torch.int64)
        self._ids_N[: self._size] = torch.tensor(list(self._place), dtype=torch.int64)
        self._counts_N = torch.zeros(room)
        for token in generated:
            self.add(token)

    def add(self, token: int) -> None:
        """Counts a generated token."""
        place = self._place.setdefault(token, self._size)
        if place == self._size:
            if place == len(self._ids_N):
                self._ids_N = torch.cat([self._ids_N, torch.zeros_like(self._ids_N)])
                self._counts_N = torch.cat([self._counts_N, torch.zeros_like(self._counts_N)])
            self._ids_N[place] = token
            self._size += 1
        self._counts_N[place] += 1

    def pairs(self, drafts: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Ids, int64, and how often each was generated, float32, as if `drafts` had been generated too."""
        ids_N, counts_N = self._ids_N[: self._size], self._counts_N[: self._size]
        if not drafts:
            return ids_N, counts_N
        new = [token for token in dict.fromkeys(drafts) if token not in self._place]
        where = self._place | {token: self._size + i for i, token in enumerate(new)}
        counts_N = torch.cat([counts_N, torch.zeros(len(new))])
        for token in drafts:
            counts_N[where[token]] += 1
        return torch.cat([ids_N, torch.tensor(new, dtype=torch.int64)]), counts_N


def penalised(asked: SamplingParams) -> bool:
    """Whether these settings need a History."""
    return asked.repetition_penalty != 1 or asked.presence_penalty != 0 or asked.frequency_penalty != 0


def penalise_(scores_BV: Tensor, rows: Sequence[tuple[int, SamplingParams, History, Sequence[int]]]) -> None:
    """Lowers in place the scores of tokens that were there before.

    The repetition penalty (Keskar et al., arXiv 1909.05858, section 4.1; for negative logits as Hugging Face does)
    regards the prompt and the text; presence and frequency, as OpenAI defines them, only the generated text.

    Args:
        scores_BV: float32.
        rows: row of the scores, its settings, its history, and draft tokens to be counted as generated.
    """
    if not rows:
        return
    pairs = [history.pairs(drafts) for _, _, history, drafts in rows]
    sizes = torch.tensor([len(ids_N) for ids_N, _ in pairs])
    told = [(float(r), a.repetition_penalty, a.presence_penalty, a.frequency_penalty) for r, a, _, _ in rows]
    told_N4 = torch.tensor(told).repeat_interleave(sizes, dim=0).to(scores_BV.device)
    row_N = torch.tensor([row for row, *_ in rows]).repeat_interleave(sizes).to(scores_BV.device)
    ids_N = torch.cat([one for one, _ in pairs]).to(scores_BV.device)
    counts_N = torch.cat([one for _, one in pairs]).to(scores_BV.device)
    _, repetition_N, presence_N, frequency_N = told_N4.unbind(1)
    old_N = scores_BV[row_N, ids_N]
    new_N = torch.where(old_N < 0, old_N * repetition_N, old_N / repetition_N)
    scores_BV[row_N, ids_N] = new_N - presence_N * (counts_N > 0) - frequency_N * counts_N


def bias_(scores_BV: Tensor, rows: Sequence[tuple[int, Sequence[tuple[int, float]]]]) -> None:
    """Adds in place to the scores of tokens by id."""
    told = [(row, token, bias) for row, biases in rows for token, bias in biases]
    if told:
        row_N, ids_N = torch.tensor([one[:2] for one in told], device=scores_BV.device).unbind(1)
        scores_BV[row_N, ids_N] += torch.tensor([one[2] for one in told], device=scores_BV.device)


def ban_(scores_BV: Tensor, rows: Sequence[tuple[int, Sequence[int]]]) -> None:
    """Sets in place the scores of tokens to -inf."""
    told = [(row, token) for row, tokens in rows for token in tokens]
    if told:
        row_N, ids_N = torch.tensor(told, device=scores_BV.device).unbind(1)
        scores_BV[row_N, ids_N] = -math.inf


def mask_(scores_BV: Tensor, rows: Sequence[tuple[int, Tensor]]) -> None:
    """Sets in place to -inf what a mask does not allow.

    Args:
        scores_BV: float32.
        rows: row, and bool (V,), true where allowed, or int32 (ceil(V / 32),), a bit a token, lowest bit first,
            as xgrammar and llguidance write. Tokens past the mask's end are not allowed.
    """
    size = scores_BV.shape[1]
    for row, mask in rows:
        allowed_V = (mask if mask.dtype == torch.bool else _bits(mask)).to(scores_BV.device)[:size]
        scores_BV[row, : len(allowed_V)].masked_fill_(~allowed_V, -math.inf)
        scores_BV[row, len(allowed_V) :] = -math.inf


def _bits(mask: Tensor) -> Tensor:
    shifts = torch.arange(32, dtype=mask.dtype, device=mask.device)
    return (mask[:, None] >> shifts & 1).bool().flatten()
