"""Attention of one ragged step over keys and values in blocks (PagedAttention, arXiv 2309.06180).

Prefill chunks and decodes of many sequences are mixed: T new tokens of N sequences, each token attending to its own
sequence up to and with itself. H query heads, G key heads, R = H / G queries per key, S new tokens of a sequence,
L its keys, d head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import choose
from .paged_attention_native import attend_native, fits
from .paged_attention_triton import paged_attention_triton
from .paged_kv import LayerKV, Ragged, check, gather_kv, store_torch

__all__ = ["LayerKV", "Ragged", "paged_attention", "paged_attention_reference", "store_and_attend", "store_kv"]


def store_kv(kv: LayerKV, k_TGd: Tensor, v_TGd: Tensor, ragged: Ragged) -> None:
    """Writes the keys and values of the T new tokens into their slots, rounded to the cache's type.

    Raises:
        ValueError: shapes that do not fit.
    """
    check(kv, ragged, k_TGd=k_TGd, v_TGd=v_TGd)
    store_torch(kv, k_TGd, v_TGd, ragged.slots_T)


def paged_attention(
    q_THd: Tensor,
    kv: LayerKV,
    ragged: Ragged,
    *,
    scale: float | None = None,
    window: int = 0,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v over each token's own position and those before it, o_THd.

    Slots past a token's position are not used, whatever they hold.

    Args:
        scale: None: 1 / sqrt(d).
        window: how many positions a token sees, its own included; 0: all.
        sinks_H: a logit per head that takes part in the softmax and adds nothing to the sum (gpt-oss).

    Raises:
        ValueError: shapes that do not fit.
    """
    check(kv, ragged, q_THd=q_THd)
    factor = q_THd.shape[-1] ** -0.5 if scale is None else scale
    if fits(q_THd, kv):
        return attend_native(q_THd, kv, ragged, scale=factor, window=window, sinks_H=sinks_H)
    if choose(q_THd) == "reference":
        return paged_attention_reference(q_THd, kv, ragged, scale=factor, window=window, sinks_H=sinks_H)
    if choose(q_THd) == "triton":
        return paged_attention_triton(q_THd, kv, ragged, factor, window, sinks_H)
    return _torch(q_THd, kv, ragged, factor, window, sinks_H)


def store_and_attend(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    kv: LayerKV,
    ragged: Ragged,
    *,
    scale: float | None = None,
    window: int = 0,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """`store_kv` and then `paged_attention`, in one call where there is one."""
    check(kv, ragged, q_THd=q_THd, k_TGd=k_TGd, v_TGd=v_TGd)
    if fits(q_THd, kv):
        factor, new = q_THd.shape[-1] ** -0.5 if scale is None else scale, (k_TGd, v_TGd)
        return attend_native(q_THd, kv, ragged, scale=factor, window=window, sinks_H=sinks_H, new=new)
    store_kv(kv, k_TGd, v_TGd, ragged)
    return paged_attention(q_THd, kv, ragged, scale=scale, window=window, sinks_H=sinks_H)


def paged_attention_reference(
    q_THd: Tensor, kv: LayerKV, ragged: Ragged, *, scale: float, window: int = 0, sinks_H: Tensor | None = None
) -> Tensor:
    """`paged_attention` token by token, in fp32 (fp64 for fp64)."""
    wide = torch.promote_types(q_THd.dtype, torch.float32)
    repeat = q_THd.shape[1] // kv.k.shape[2]
    o_THd = torch.empty_like(q_THd)
    starts, lengths = ragged.starts_N1.tolist(), ragged.lengths_N.tolist()
    for n, length in enumerate(lengths):
        for t in range(starts[n], starts[n + 1]):
            keys = length - (starts[n + 1] - t) + 1
            k_LGd, v_LGd = (x[0] for x in gather_kv(kv, ragged.tables_NM[n : n + 1], keys, wide))
            first = max(0, keys - window) if window else 0
            k_LHd, v_LHd = (x[first:].repeat_interleave(repeat, 1) for x in (k_LGd, v_LGd))
            scores_HL = torch.einsum("hd,lhd->hl", q_THd[t].to(wide), k_LHd) * scale
            if sinks_H is not None:
                scores_HL = torch.cat((scores_HL, sinks_H.to(wide)[:, None]), 1)
            probs_HL = scores_HL.softmax(-1)[:, : keys - first]
            o_THd[t] = torch.einsum("hl,lhd->hd", probs_HL, v_LHd).to(q_THd.dtype)
    return o_THd


def _torch(q_THd: Tensor, kv: LayerKV, ragged: Ragged, scale: float, window: int, sinks_H: Tensor | None) -> Tensor:
    """One call of torch's attention for all sequences with as many new tokens: all decodes are one."""
    o_THd = torch.empty(q_THd.shape, dtype=q_THd.dtype, device=q_THd.device)
    starts, lengths = ragged.starts_N1.tolist(), ragged.lengths_N.tolist()
    alike: dict[int, list[int]] = {}
    for n in range(len(lengths)):
        alike.setdefault(starts[n + 1] - starts[n], []).append(n)
    for new, members in alike.items():
        if not new:
            continue
        index_n = torch.tensor(members, device=q_THd.device)
        tokens_nS = ragged.starts_N1[index_n].long()[:, None] + torch.arange(new, device=q_THd.device)
        tables_nM, lengths_n = ragged.tables_NM[index_n], ragged.lengths_N[index_n]
        longest = max(lengths[n] for n in members)
        out = _padded(q_THd[tokens_nS], kv, tables_nM, lengths_n, longest, scale, window, sinks_H)
        o_THd[tokens_nS] = out
    return o_THd


def _padded(
    q_nSHd: Tensor,
    kv: LayerKV,
    tables_nM: Tensor,
    lengths_n: Tensor,
    longest: int,
    scale: float,
    window: int,
    sinks_H: Tensor | None,
) -> Tensor:
    """n sequences with S new tokens each and at most `longest` keys: o_nSHd."""
    new, heads = q_nSHd.shape[1:3]
    position_L = torch.arange(longest, device=q_nSHd.device)
    query_nS1 = (lengths_n[:, None] - new + torch.arange(new, device=q_nSHd.device))[..., None]
    seen_n1SL = (position_L <= query_nS1)[:, None]
    if window:
        seen_n1SL &= (position_L > query_nS1 - window)[:, None]
    unused_nL11 = (position_L >= lengths_n[:, None])[..., None, None]
    # A probability of 0 does not keep a NaN out of a sum.
    k, v = (x.masked_fill_(unused_nL11, 0) for x in gather_kv(kv, tables_nM, longest, q_nSHd.dtype))
    mask = seen_n1SL
    if sinks_H is not None:
        # One more key, of zeros, whose mask is the sink's logit, and one more value of zeros.
        k, v = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))
        shape = (*seen_n1SL.shape[:1], heads, *seen_n1SL.shape[2:])
        mask = torch.zeros(shape, dtype=q_nSHd.dtype, device=q_nSHd.device)
        mask.masked_fill_(~seen_n1SL, float("-inf"))
        last = sinks_H.to(mask)[:, None, None].expand(*shape[:3], 1)
        mask = torch.cat((mask, last), -1)
    o_nHSd = F.scaled_dot_product_attention(
        q_nSHd.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        scale=scale,
        enable_gqa=heads != k.shape[2],
    )
    return o_nHSd.transpose(1, 2)
