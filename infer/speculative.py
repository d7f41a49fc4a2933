"""Accepting draft tokens so that the text has the same distribution as without them.

Q requests, R rows of the model's logits (for each request one a draft token and one more), V vocabulary, D draft
tokens of all requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .counter import ACCEPT, DRAFT, SAMPLE
from .sampling import Row, SamplingBatch, distribution, draw, sample_batch
from .truncate import ONE


def rows_for(row: Row, drafts: Sequence[int]) -> list[Row]:
    """The rows that check `drafts` after `row`'s history: each sees the drafts before it and has its own position.

    Bans and masks are the first row's: whoever has them changes them for each row.
    """
    return [
        replace(row, position=row.position + i, drafts=(*row.drafts, *drafts[:i])) for i in range(len(drafts) + 1)
    ]


@torch.inference_mode()
def accept(
    drafts: Sequence[Sequence[int]],
    logits_RV: Tensor,
    batch: SamplingBatch,
    draft_probs_DV: Tensor | None = None,
) -> list[list[int]]:
    """For each request its accepted drafts and one token more: at least one token. A request of which a needed row
    has failed (see `Sampled.ok_B`) ends before that token, so its list may be empty.

    Without draft_probs_DV each row draws its token as if there were no drafts, and drafts count as long as they are
    the tokens drawn. For drafts that are no random choice (n-gram, greedy) this accepts each with the target's
    probability of it, which is what the rule below gives for them, and a seed's text is the same with drafts and
    without. With it: Leviathan et al., arXiv 2211.17192, algorithm 1.

    Args:
        drafts: for each request its draft tokens, none or more.
        logits_RV: of the model after each request's last token and after each of its drafts.
        batch: their rows, see `rows_for`.
        draft_probs_DV: the probabilities with which each draft token was drawn, after all settings.

    Raises:
        ValueError: the drafts do not fit the rows.
    """
    total = sum(map(len, drafts))
    if total + len(drafts) != len(logits_RV):
        raise ValueError(
            f"{total} drafts of {len(drafts)} requests need {total + len(drafts)} rows, not {len(logits_RV)}"
        )
    if draft_probs_DV is None:
        return accept_drawn(drafts, *sample_batch(logits_RV, batch).read())
    if draft_probs_DV.shape != (total, logits_RV.shape[1]):
        raise ValueError(f"draft_probs of shape {list(draft_probs_DV.shape)} do not fit {total} drafts")
    return _leviathan(drafts, logits_RV, batch, draft_probs_DV)


def _leviathan(
    drafts: Sequence[Sequence[int]], logits_RV: Tensor, batch: SamplingBatch, draft_probs_DV: Tensor
) -> list[list[int]]:
    device, every = logits_RV.device, list(range(len(logits_RV)))
    p_RV = distribution(logits_RV, batch)
    checked = [first + i for first, mine in _firsts(drafts) for i in range(len(mine))]
    at_D = torch.tensor(checked, dtype=torch.int64, device=device)
    ids_D1 = torch.tensor([t for mine in drafts for t in mine], dtype=torch.int64, device=device)[:, None]
    u_R1 = batch.uniform(every, ACCEPT, device)
    q_DV = draft_probs_DV.double()
    # u < p / q, without the division: a draft of q = 0 can only be accepted where p > 0.
    accepted_D = (u_R1[at_D] * q_DV.gather(1, ids_D1) < p_RV[at_D].gather(1, ids_D1))[:, 0].tolist()
    w_RV = (p_RV * ONE).round_()
    instead_RV = w_RV.clone()
    instead_RV[at_D] = (w_RV[at_D] - (q_DV * ONE).round_()).clamp_(min=0)
    # Nothing is left where p and q differ by rounding alone.
    instead_RV = instead_RV.where(instead_RV.sum(dim=-1, keepdim=True) > 0, w_RV)
    ids_R, drawn_R = draw(instead_RV, batch.uniform(every, SAMPLE, device))
    found, ok = iter(accepted_D), (~drawn_R.isnan()).tolist()
    return _joined(drafts, [[next(found) for _ in mine] for mine in drafts], ids_R.tolist(), ok)


def accept_drawn(drafts: Sequence[Sequence[int]], tokens: Sequence[int], ok: Sequence[bool]) -> list[list[int]]:
    """`accept` without draft_probs_DV, of rows that are drawn already (`Sampled.read`)."""
    taken = [
        [ok[first + i] and tokens[first + i] == draft for i, draft in enumerate(mine)]
        for first, mine in _firsts(drafts)
    ]
    return _joined(drafts, taken, tokens, ok)


def _joined(
    drafts: Sequence[Sequence[int]], taken: list[list[bool]], tokens: Sequence[int], ok: Sequence[bool]
) -> list[list[int]]:
    out = []
    for (first, mine), yes in zip(_firsts(drafts), taken, strict=True):
        many = [*yes, False].index(False)
        last = first + many
        out.append([*mine[:many], *([tokens[last]] if ok[last] else [])])
    return out


def _firsts(drafts: Sequence[Sequence[int]]) -> list[tuple[int, Sequence[int]]]:
    """Each request's first row, and its drafts."""
    firsts, row = [], 0
    for mine in drafts:
        firsts.append((row, mine))
        row += len(mine) + 1
    return firsts


def draft_uniform(batch: SamplingBatch, device: torch.device) -> Tensor:
    """The random numbers with which a draft model draws its tokens, (R, 1): others than those that check them."""
    return batch.uniform(list(range(len(batch.rows))), DRAFT, device)
