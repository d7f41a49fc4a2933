"""Keys and values in blocks: what a layer's memory and a ragged step look like, and how it is written.

N sequences, T new tokens, M blocks of the longest table, G key heads, d head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = {torch.int8: 127.0, FP8: 448.0}
"""The types that need scales, and the largest number that each holds."""


class LayerKV(NamedTuple):
    """One layer's keys and values, contiguous.

    k, v: (blocks, size, G, d) in fp32, bf16, fp16, int8 or float8_e4m3fn.
    k_scale, v_scale: (blocks, size, G) fp32, for int8 and fp8: one number stands for value * scale. Else None.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


class Ragged(NamedTuple):
    """T new tokens of N sequences, in the order of the sequences.

    tables_NM: int32 block tables: position p of sequence n lies in block tables[n, p // size]. Padded with 0.
    starts_N1: int32 (N + 1,): which of the T tokens is the first of each sequence; the last entry is T.
    lengths_N: int32 keys of each sequence after this step: its last new token is at position lengths[n] - 1.
    slots_T: int64 block * size + offset of each new token.
    longest: the largest of lengths_N, on the host.
    widest: most new tokens of one sequence, on the host.
    """

    tables_NM: Tensor
    starts_N1: Tensor
    lengths_N: Tensor
    slots_T: Tensor
    longest: int
    widest: int


def quantize(x_TGd: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(values (T, G, d), scales (T, G) fp32): symmetric, per token and head, rounded to nearest, ties to even.

    A head that is zero all over, or smaller than fp32 can divide by, becomes zeros with the scale 0.
    """
    x_TGd = x_TGd.float()
    scale_TG = x_TGd.abs().amax(-1) / LARGEST[dtype]
    scale_TG = torch.where(scale_TG < 1e-30, 0.0, scale_TG)
    scaled_TGd = x_TGd * torch.where(scale_TG == 0, 0.0, 1 / scale_TG)[..., None]
    if dtype == torch.int8:
        scaled_TGd = scaled_TGd.round_().clamp_(-127, 127)
    return scaled_TGd.to(dtype), scale_TG


def rows_of(store: Tensor) -> Tensor:
    """(blocks, size, ...) as (slots, ...), fp8 as bytes, which torch can index on every device."""
    return (store.view(torch.uint8) if store.dtype == FP8 else store).view(-1, *store.shape[2:])


def store_torch(kv: LayerKV, k_TGd: Tensor, v_TGd: Tensor, slots_T: Tensor) -> None:
    """`store_kv` with torch's own index_copy."""
    for store, scales, x_TGd in ((kv.k, kv.k_scale, k_TGd), (kv.v, kv.v_scale, v_TGd)):
        if scales is None:
            x_TGd = x_TGd.to(store.dtype)
        else:
            x_TGd, scale_TG = quantize(x_TGd, store.dtype)
            rows_of(scales).index_copy_(0, slots_T, scale_TG)
        rows = rows_of(store)
        rows.index_copy_(0, slots_T, x_TGd.view(torch.uint8) if store.dtype == FP8 else x_TGd)


def gather_kv(kv: LayerKV, tables_nM: Tensor, keys: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values of the first `keys` positions of n sequences, (n, keys, G, d) in `dtype`; scales multiplied."""
    size = kv.k.shape[1]
    blocks_nm = tables_nM[:, : -(-keys // size)].long()
    out = []
    for store, scales in ((kv.k, kv.k_scale), (kv.v, kv.v_scale)):
        bits = store.view(torch.uint8) if store.dtype == FP8 else store
        x = bits[blocks_nm].flatten(1, 2)[:, :keys].view(store.dtype)
        if scales is not None:
            x = x.float() * scales[blocks_nm].flatten(1, 2)[:, :keys, :, None]
        out.append(x.to(dtype))
    return out[0], out[1]


def check(
    kv: LayerKV,
    ragged: Ragged,
    *,
    q_THd: Tensor | None = None,
    k_TGd: Tensor | None = None,
    v_TGd: Tensor | None = None,
) -> None:
    """Raises ValueError where the shapes or types do not fit together."""
    tokens, (groups, width) = ragged.slots_T.shape[0], kv.k.shape[2:]
    if kv.k.shape != kv.v.shape or kv.k.dtype != kv.v.dtype:
        raise ValueError(f"paged attention: keys {_kind(kv.k)} and values {_kind(kv.v)} are not kept alike")
    scaled = kv.k_scale is not None and kv.v_scale is not None
    if scaled != (kv.k.dtype in LARGEST):
        raise ValueError(f"paged attention: {kv.k.dtype} is kept {'with' if not scaled else 'without'} scales")
    if q_THd is not None and (
        q_THd.dim() != 3 or q_THd.shape[::2] != (tokens, width) or not q_THd.shape[1] or q_THd.shape[1] % groups
    ):
        raise ValueError(f"paged attention: queries {_kind(q_THd)} do not fit {tokens} tokens and keys {_kind(kv.k)}")
    for name, x_TGd in (("keys", k_TGd), ("values", v_TGd)):
        if x_TGd is not None and x_TGd.shape != (tokens, groups, width):
            raise ValueError(
                f"paged attention: {name} {_kind(x_TGd)} do not fit {tokens} tokens and a cache of {_kind(kv.k)}"
            )


def _kind(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype}".replace("torch.", "")
