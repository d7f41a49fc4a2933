"""The next token of many requests at once, each with its own settings; a row's result never depends on its batch.

B requests of a step, R rows of them, V vocabulary, K candidates, N alternatives that are told.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernels.argmax import argmax
from .counter import SAMPLE, uniform
from .penalties import History, ban_, bias_, mask_, penalise_, penalised
from .request import SamplingParams
from .truncate import MOST, ONE, cut, largest, whole_numbers

_COLDEST = 1e-6  # a lower temperature is greedy: it would magnify nothing but the rounding of logits
_AT_ONCE = 1 << 18  # scores: more at once are slower on a CPU, which must then map new memory for each step


@dataclass(frozen=True)
class Row:
    """One request's part in a step.

    Attributes:
        settings: checked against the vocabulary already (`SamplingParams.check_vocabulary`).
        seed: any int of 64 bits.
        position: tokens it has generated before this one; with the seed this decides the random number.
        history: needed where a penalty is asked for.
        drafts: draft tokens that stand between the history and this row.
        banned: tokens that may not be drawn, such as the end of text before `min_tokens`.
        mask: of a grammar; see `mask_`.
    """

    settings: SamplingParams
    seed: int = 0
    position: int = 0
    history: History | None = None
    drafts: Sequence[int] = ()
    banned: Sequence[int] = ()
    mask: Tensor | None = None


@dataclass(frozen=True)
class Sampled:
    """One token a row.

    Attributes:
        ids_B: int64; 0 where not ok.
        ok_B: false where no token was allowed or the logits are not finite: that request has failed, no other.
        logprobs_B: ln of the model's own probability, before any setting, float32: what the API tells, as OpenAI's
            does. NaN for rows that did not ask.
        drawn_logprobs_B: ln of the probability with which the token was drawn, after all settings, float32.
        top_ids_BN, top_logprobs_BN: the likeliest tokens by the model's own probability, N the most that any row
            asked for; a row that asked for fewer reads only its first ones.
    """

    ids_B: Tensor
    ok_B: Tensor
    logprobs_B: Tensor
    drawn_logprobs_B: Tensor
    top_ids_BN: Tensor
    top_logprobs_BN: Tensor

    def read(self) -> tuple[list[int], list[bool]]:
        """ids and ok on the host, in one copy; it waits for the device."""
        ids, ok = torch.stack((self.ids_B, self.ok_B)).tolist()
        return ids, list(map(bool, ok))


def is_greedy(asked: SamplingParams) -> bool:
    """Whether these settings leave nothing to chance."""
    return asked.temperature < _COLDEST or asked.top_k == 1


@dataclass
class SamplingBatch:
    """The rows of a step, sorted by the work they need. The vocabulary is that of the logits."""

    rows: Sequence[Row]
    greedy: list[int] = field(init=False)
    whole: list[int] = field(init=False)
    cut: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.greedy, self.whole, self.cut = [], [], []
        for index, row in enumerate(self.rows):
            asked = row.settings
            truncated = asked.top_k > 0 or asked.top_p < 1
            (self.greedy if is_greedy(asked) else self.cut if truncated else self.whole).append(index)

    def column(self, name: str, rows: Sequence[int], device: torch.device) -> Tensor:
        """One float64 setting of these rows, (R, 1)."""
        values = [[getattr(self.rows[row].settings, name)] for row in rows]
        return torch.tensor(values, dtype=torch.float64, device=device)

    def uniform(self, rows: Sequence[int], draw: int, device: torch.device) -> Tensor:
        """The random numbers of these rows, (R, 1) float64; `draw` as in `counter.uniform`."""
        told = [(((one := self.rows[row]).seed + 2**63) % 2**64 - 2**63, one.position) for row in rows]
        seeds_R, positions_R = torch.tensor(told, dtype=torch.int64, device=device).unbind(1)
        return uniform(seeds_R, positions_R, draw)[:, None]

    def scores(self, logits_BV: Tensor) -> Tensor:
        """Logits after penalties, bias, bans and masks, in this order, float32; the logits themselves, of whatever
        type, where nothing changes them."""
        told = list(enumerate(self.rows))
        lowered = [(i, r.settings, r.history, r.drafts) for i, r in told if r.history and penalised(r.settings)]
        biased = [(i, r.settings.logit_bias) for i, r in told if r.settings.logit_bias]
        banned = [(i, r.banned) for i, r in told if r.banned]
        masked = [(i, r.mask) for i, r in told if r.mask is not None]
        if not (lowered or biased or banned or masked):
            return logits_BV
        scores_BV = logits_BV.to(torch.float32, copy=True)
        penalise_(scores_BV, lowered)
        bias_(scores_BV, biased)
        ban_(scores_BV, banned)
        mask_(scores_BV, masked)
        return scores_BV


@torch.inference_mode()
def sample_batch(logits_BV: Tensor, batch: SamplingBatch) -> Sampled:
    """Draws one token a row.

    The order of a row's settings: penalties, bias, bans and masks, temperature, top_k, top_p of what top_k left,
    min_p: Hugging Face's. Exactly top_k tokens stay, of equals the lowest ids, and top_p keeps the fewest that
    reach it. No row at all costs more than argmax where all are greedy.

    Raises:
        ValueError: rows and logits do not fit, or the vocabulary has more than 2^19 tokens.
    """
    size, device = len(batch.rows), logits_BV.device
    if logits_BV.dim() != 2 or len(logits_BV) != size or not 0 < logits_BV.shape[1] <= MOST:
        raise ValueError(f"logits of shape {list(logits_BV.shape)} do not fit {size} rows of 1 to {MOST} tokens")
    scores_BV = batch.scores(logits_BV)
    if len(batch.greedy) == size:
        ids_B, best_B = argmax(scores_BV)
        drawn_B = torch.where(best_B.isfinite(), 0.0, math.nan)
    else:
        ids_B = torch.zeros(size, dtype=torch.int64, device=device)
        drawn_B = torch.full((size,), math.nan, device=device)
        for rows, ids_RK, w_RK in pools(scores_BV, batch):
            place_R, drawn_R = draw(w_RK, batch.uniform(rows, SAMPLE, device))
            at_R = torch.tensor(rows, device=device)
            ids_B[at_R] = place_R if ids_RK is None else ids_RK.gather(1, place_R[:, None])[:, 0]
            drawn_B[at_R] = drawn_R
    ok_B = ~drawn_B.isnan()
    ids_B = ids_B * ok_B
    return Sampled(ids_B, ok_B, *_told(logits_BV, ids_B, drawn_B, batch))


def _told(logits_BV: Tensor, ids_B: Tensor, drawn_B: Tensor, batch: SamplingBatch) -> tuple[Tensor, ...]:
    size, device = len(ids_B), ids_B.device
    asked = {i: n for i, row in enumerate(batch.rows) if (n := row.settings.logprobs) is not None}
    most = max(asked.values(), default=0)
    logprobs_B = torch.full((size,), math.nan, device=device)
    top_ids_BN = torch.zeros((size, most), dtype=torch.int64, device=device)
    top_logprobs_BN = torch.full((size, most), math.nan, device=device)
    if asked:
        rows_R = torch.tensor(list(asked), device=device)
        raw_RV = logits_BV.float() if len(asked) == size else logits_BV[rows_R].float()
        logprobs_B[rows_R], top_ids_BN[rows_R], top_logprobs_BN[rows_R] = told_logprobs(raw_RV, ids_B[rows_R], most)
    return logprobs_B, drawn_B, top_ids_BN, top_logprobs_BN


def told_logprobs(raw_RV: Tensor, ids_R: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """ln of the probabilities of these tokens, (R,); the ids of the likeliest ones, (R, most), and theirs."""
    sum_R1 = whole_numbers(raw_RV).sum(dim=-1, keepdim=True, dtype=torch.float64)
    log_sum_R1 = raw_RV.amax(dim=-1, keepdim=True) + (sum_R1 / ONE).log().float()
    logprobs_R = (raw_RV.gather(1, ids_R[:, None]) - log_sum_R1)[:, 0]
    if not most:
        return logprobs_R, ids_R.new_zeros((len(ids_R), 0)), raw_RV.new_zeros((len(ids_R), 0))
    best_RN, top_ids_RN = largest(raw_RV, most)
    return logprobs_R, top_ids_RN, best_RN - log_sum_R1


def draw(w_RK: Tensor, u_R1: Tensor) -> tuple[Tensor, Tensor]:
    """Places, (R,) int64, by the inverse of the cumulated weights, and ln of their probabilities, NaN where the
    weights are no numbers."""
    sums_RK = w_RK.cumsum(dim=-1, dtype=torch.float64)
    total_R1 = sums_RK[:, -1:].clone()  # searchsorted warns of a view
    # u < 1, yet the product may be rounded up to the sum, past every place.
    target_R1 = torch.minimum((u_R1 * total_R1).floor(), total_R1 - 1)
    place_R1 = torch.searchsorted(sums_RK, target_R1, right=True).clamp_(max=w_RK.shape[1] - 1)
    chance_R1 = w_RK.gather(1, place_R1).double() / total_R1
    return place_R1[:, 0], chance_R1.log().float()[:, 0]


Pool = tuple[list[int], Tensor | None, Tensor]


def pools(scores_BV: Tensor, batch: SamplingBatch) -> Iterator[Pool]:
    """What each row may draw: rows, the ids of their candidates, ascending (None: all tokens), and whole-number
    weights, 0 for those that are cut. Every row is in one pool, alone or with others."""
    if batch.greedy:
        ids_R, best_R = argmax(_rows(scores_BV, batch.greedy))
        yield batch.greedy, ids_R[:, None], torch.where(best_R.isfinite(), ONE, math.nan)[:, None]
    step = max(1, _AT_ONCE // scores_BV.shape[1]) if scores_BV.device.type == "cpu" else len(scores_BV)
    for rows in (batch.whole, batch.cut):
        for first in range(0, len(rows), step):
            yield from _part(scores_BV, rows[first : first + step], rows is batch.cut, batch)


def _part(scores_BV: Tensor, rows: list[int], truncated: bool, batch: SamplingBatch) -> Iterator[Pool]:
    warm_R1 = batch.column("temperature", rows, scores_BV.device).float()
    scores_RV = _rows(scores_BV, rows).float()
    if not bool((warm_R1 == 1).all()):
        scores_RV = scores_RV / warm_R1
    if truncated:
        limits = [batch.column(name, rows, scores_BV.device) for name in ("top_k", "top_p", "min_p")]
        for places, ids_RK, w_RK in cut(scores_RV, torch.cat(limits, dim=1)):
            yield [rows[i] for i in places], ids_RK, w_RK
        return
    w_RV = whole_numbers(scores_RV)
    least_R1 = ONE * batch.column("min_p", rows, scores_BV.device).float()
    if bool((least_R1 > 0).any()):
        w_RV = w_RV.where((w_RV >= least_R1) | w_RV.isnan(), 0.0)
    yield rows, None, w_RV


def _rows(x_BV: Tensor, rows: list[int]) -> Tensor:
    return x_BV if len(rows) == len(x_BV) else x_BV[torch.tensor(rows, device=x_BV.device)]


def distribution(logits_BV: Tensor, batch: SamplingBatch) -> Tensor:
    """The probabilities with which `sample_batch` draws, (B, V) float64; NaN in a row that has failed."""
    probs_BV = torch.zeros(logits_BV.shape, dtype=torch.float64, device=logits_BV.device)
    for rows, ids_RK, w_RK in pools(batch.scores(logits_BV), batch):
        part_RK = w_RK.double() / w_RK.sum(dim=-1, keepdim=True, dtype=torch.float64)
        at_R = torch.tensor(rows, device=logits_BV.device)
        if ids_RK is None:
            probs_BV[at_R] = part_RK
        else:
            probs_BV[at_R[:, None], ids_RK] = part_RK
    return probs_BV


def reference(logits_V: Tensor, row: Row) -> Tensor:
    """`distribution` of one row, plainly: everything sorted, nothing batched."""
    asked = row.settings
    scores_V = SamplingBatch([row]).scores(logits_V[None])[0].float()
    if is_greedy(asked):
        return torch.nn.functional.one_hot(scores_V.argmax(), len(scores_V)).double()
    scores_V, ids_V = (scores_V / torch.tensor(asked.temperature)).sort(descending=True, stable=True)
    w_V = ((scores_V - scores_V[0]).exp() * ONE).round().double()
    if asked.top_k:
        w_V[asked.top_k :] = 0
    before_V = w_V.cumsum(0) - w_V
    w_V[before_V >= asked.top_p * w_V.sum()] = 0
    w_V[w_V < ONE * torch.tensor(asked.min_p)] = 0
    return torch.zeros_like(w_V).scatter(0, ids_V, w_V / w_V.sum())
