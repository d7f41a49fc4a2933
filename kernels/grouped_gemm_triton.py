"""The Triton side of grouped GEMMs: persistent tiles over ragged rows, found on the device from the counts alone.

Shapes: E experts, R routed rows, C contracted width, N output width, M rows of a weight gradient, V lanes that hold
the experts. A matrix has fewer than 2^31 elements; a row or an expert is widened to int64 before it meets a stride.
"""
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .backend import HAS_TRITON, jit, on_device, tl, triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Row tiles that share their weight tiles through L2 before the next weight tiles are read.
GROUP = 8
Config = dict[str, int]


def jit_tuned(configs: Sequence[Config], small: Config, key: Sequence[str]) -> Callable[[Callable[..., Any]], Any]:
    """Compiles a kernel and picks its tiles once for each value of `key`, which holds weight shapes and no row count.

    Timings are kept on disk, so that a resumed run takes the same tiles and sums in the same order. The interpreter
    runs `small` without timing. fp32 runs on the CUDA cores and takes the configs of BLOCK_K 32, which fit it.
    """

    def wrap(function: Callable[..., Any]) -> Any:
        kernel = jit(function)
        if not HAS_TRITON:
            return kernel
        made = [_config(c) for c in ([small] if INTERPRETED else configs)]
        prune = {"early_config_prune": _fit_dtype}
        return triton.autotune(made, key=list(key), prune_configs_by=prune, cache_results=True)(kernel)

    return wrap


def _config(config: Config) -> Any:
    meta = {name: value for name, value in config.items() if name not in ("warps", "stages")}
    return triton.Config(meta, num_warps=config.get("warps", 4), num_stages=config.get("stages", 2))


def _fit_dtype(configs: list[Any], arguments: dict[str, Any], **_: Any) -> list[Any]:
    wide = arguments["a_ptr"].dtype == torch.float32
    return [c for c in configs if c.kwargs["BLOCK_K"] == 32] if wide else configs


def tiles(m: int, n: int, k: int, warps: int, stages: int, per_sm: int) -> Config:
    """One config: a tile of m x n summed k at a time, and how many programs a multiprocessor is given."""
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "PER_SM": per_sm, "warps": warps, "stages": stages}


_CONFIGS = (
    tiles(128, 256, 64, 8, 3, 1),
    tiles(128, 128, 64, 8, 4, 1),
    tiles(128, 128, 64, 4, 3, 2),
    tiles(64, 128, 64, 4, 4, 2),
    tiles(128, 128, 32, 8, 4, 2),
    tiles(64, 64, 32, 4, 4, 3),
)
# A gathered row is loaded after its index, which takes two stages of the depth away.
_GATHER_CONFIGS = tuple({**c, "stages": c["stages"] + 2} for c in _CONFIGS)
SMALL = tiles(16, 16, 16, 4, 2, 1)


@jit
def expert_rows(counts_ptr, rows, E: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, V: tl.constexpr):
    """Rows, row tiles and running end of the row tiles of every expert; with TAIL lane E is the rows after all."""
    lanes_V = tl.arange(0, V)
    rows_V = tl.load(counts_ptr + lanes_V, mask=lanes_V < E, other=0).to(tl.int32)
    if TAIL:
        rows_V = tl.where(lanes_V == E, rows - tl.sum(rows_V), rows_V)
    tiles_V = (rows_V + BLOCK_M - 1) // BLOCK_M
    return rows_V, tiles_V, tl.cumsum(tiles_V)


@jit
def swizzle(tile, row_tiles, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, column tile) of a tile: GROUP row tiles walk over the columns together."""
    first = tile // (GROUP * COLUMNS) * GROUP
    high = tl.minimum(row_tiles - first, GROUP)
    inside = tile % (GROUP * COLUMNS)
    return first + inside % high, inside // high


@jit
def expert_span(expert, rows_V, V: tl.constexpr):
    """The first row of an expert and its row count."""
    lanes_V = tl.arange(0, V)
    return tl.sum(tl.where(lanes_V < expert, rows_V, 0)), tl.sum(tl.where(lanes_V == expert, rows_V, 0))


@jit
def find_tile(
    tile, rows_V, tiles_V, ends_V, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr, V: tl.constexpr
):
    """The expert of a tile, and its place: the first row, how many rows are left from there, the column tile."""
    lanes_V = tl.arange(0, V)
    expert = tl.sum((ends_V <= tile // COLUMNS).to(tl.int32))
    first, count = expert_span(expert, rows_V, V)
    first_tile = tl.sum(tl.where(lanes_V < expert, tiles_V, 0))
    m, n = swizzle(tile - first_tile * COLUMNS, (count + BLOCK_M - 1) // BLOCK_M, COLUMNS, GROUP)
    return expert, first + m * BLOCK_M, count - m * BLOCK_M, n


@jit
def live_sources(source_ptr, rows_M, inside_M):
    """The assignment (t * K + k, int64) in each row, and which rows inside hold one."""
    source_M = tl.load(source_ptr + rows_M, mask=inside_M, other=-1)
    return source_M, source_M >= 0


@jit
def at(pointer, index, stride: tl.constexpr):
    """`pointer` moved by index * stride in int64, so that offsets from there fit in int32."""
    return pointer + tl.cast(index, tl.int64) * stride


@jit_tuned(_CONFIGS, SMALL, key=["C", "N", "E", "TURNED"])
def _rows_kernel(
    a_ptr,
    w_ptr,
    bias_ptr,
    counts_ptr,
    out_ptr,
    rows,
    C: tl.constexpr,
    N: tl.constexpr,
    E: tl.constexpr,
    TURNED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TAIL: tl.constexpr,
    V: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PER_SM: tl.constexpr,
):
    # out_r = W_e a_r (+ b_e), W (N, C), or with TURNED out_r = W_e^T a_r, W (C, N).
    columns: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    rows_V, tiles_V, ends_V = expert_rows(counts_ptr, rows, E, TAIL, BLOCK_M, V)
    for tile in range(tl.program_id(0), tl.sum(tiles_V) * columns, tl.num_programs(0)):
        expert, first, left, n = find_tile(tile, rows_V, tiles_V, ends_V, columns, BLOCK_M, GROUP, V)
        rows_M = tl.arange(0, BLOCK_M)
        cols_N = n * BLOCK_N + tl.arange(0, BLOCK_N)
        a_tile, w_tile = at(a_ptr, first, C), at(w_ptr, expert, N * C)
        depth = C
        if TAIL:
            depth = tl.where(expert < E, C, 0)
        acc_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, depth, BLOCK_K):
            k_K = k + tl.arange(0, BLOCK_K)
            a_mask_MK = (rows_M < left)[:, None] & (k_K < C)[None, :]
            a_MK = tl.load(a_tile + rows_M[:, None] * C + k_K[None, :], mask=a_mask_MK, other=0.0)
            w_KN = k_K[:, None] * N + cols_N[None, :] if TURNED else k_K[:, None] + cols_N[None, :] * C
            b_KN = tl.load(w_tile + w_KN, mask=(k_K < C)[:, None] & (cols_N < N)[None, :], other=0.0)
            acc_MN = tl.dot(a_MK, b_KN, acc_MN, input_precision="ieee")
        if HAS_BIAS:
            acc_MN += tl.load(bias_ptr + expert * N + cols_N, mask=cols_N < tl.where(expert < E, N, 0), other=0.0)[
                None, :
            ]
        out_MN = at(out_ptr, first, N) + rows_M[:, None] * N + cols_N[None, :]
        tl.store(out_MN, acc_MN.to(out_ptr.dtype.element_ty), mask=(rows_M < left)[:, None] & (cols_N < N)[None, :])


@jit_tuned(_GATHER_CONFIGS, SMALL, key=["M", "N", "E", "GATHER_A", "GATHER_B"])
def _weights_kernel(
    a_ptr,
    b_ptr,
    source_ptr,
    counts_ptr,
    out_ptr,
    M: tl.constexpr,
    N: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
    HAS_SOURCE: tl.constexpr,
    V: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PER_SM: tl.constexpr,
):
    # out_e = sum over the rows r of expert e of a_r (outer) b_r; either side may be gathered from the tokens.
    down: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    across: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    lanes_V = tl.arange(0, V)
    rows_V = tl.load(counts_ptr + lanes_V, mask=lanes_V < E, other=0).to(tl.int32)
    for tile in range(tl.program_id(0), E * down * across, tl.num_programs(0)):
        expert = tile // (down * across)
        m, n = swizzle(tile % (down * across), down, across, GROUP)
        first, count = expert_span(expert, rows_V, V)
        cols_M = m * BLOCK_M + tl.arange(0, BLOCK_M)
        cols_N = n * BLOCK_N + tl.arange(0, BLOCK_N)
        acc_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, count, BLOCK_K):
            rows_K = start + tl.arange(0, BLOCK_K)
            live_K = rows_K < count
            tokens_K = first + rows_K
            if HAS_SOURCE:
                source_K, live_K = live_sources(source_ptr, tokens_K, live_K)
                tokens_K = source_K // K
            a_tile = a_ptr if GATHER_A else at(a_ptr, first, M)
            b_tile = b_ptr if GATHER_B else at(b_ptr, first, N)
            a_K = (tokens_K if GATHER_A else rows_K).to(tl.int64)
            b_K = (tokens_K if GATHER_B else rows_K).to(tl.int64)
            a_mask_KM, b_mask_KN = live_K[:, None] & (cols_M < M)[None, :], live_K[:, None] & (cols_N < N)[None, :]
            a_KM = tl.load(a_tile + a_K[:, None] * M + cols_M[None, :], mask=a_mask_KM, other=0.0)
            b_KN = tl.load(b_tile + b_K[:, None] * N + cols_N[None, :], mask=b_mask_KN, other=0.0)
            acc_MN = tl.dot(tl.trans(a_KM), b_KN, acc_MN, input_precision="ieee")
        out_MN = at(out_ptr, expert, M * N) + cols_M[:, None] * N + cols_N[None, :]
        tl.store(out_MN, acc_MN.to(out_ptr.dtype.element_ty), mask=(cols_M < M)[:, None] & (cols_N < N)[None, :])


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def persistent_grid(device: torch.device, tiles_of: Callable[[dict[str, Any]], int]) -> Callable[..., tuple[int]]:
    """A grid of PER_SM programs a multiprocessor (three on a CPU), or of as many as there can be tiles."""
    return lambda meta: (max(1, min(tiles_of(meta), _multiprocessors(device) * meta["PER_SM"])),)


def lanes(experts: int) -> int:
    """V: a power of two with room for the experts and the rows after the last one."""
    return max(16, 1 << experts.bit_length())


def ragged_grid(device: torch.device, rows: int, experts: int, width: int) -> Callable[..., tuple[int]]:
    """The grid for row tiles over `rows` rows; every expert, and the tail, may end in a partial tile."""
    return persistent_grid(
        device, lambda meta: (-(-rows // meta["BLOCK_M"]) + experts + 1) * -(-width // meta["BLOCK_N"])
    )


@on_device
def rows_gemm(
    a_RC: Tensor,
    w: Tensor,
    counts_E: Tensor,
    *,
    turned: bool = False,
    bias_EN: Tensor | None = None,
    tail: bool = True,
) -> Tensor:
    """(R, N): W_e a_r + b_e for w (E, N, C), or W_e^T a_r for w (E, C, N) when `turned`.

    Rows after the last expert's are zero, or with `tail=False` left as they were allocated.
    """
    experts = w.shape[0]
    width = w.shape[2] if turned else w.shape[1]
    rows, depth = a_RC.shape
    out_RN = torch.empty(rows, width, dtype=a_RC.dtype, device=a_RC.device)
    if out_RN.numel() == 0:
        return out_RN
    _rows_kernel[ragged_grid(a_RC.device, rows, experts, width)](
        a_RC.contiguous(),
        w.contiguous(),
        None if bias_EN is None else bias_EN.contiguous(),
        counts_E.contiguous(),
        out_RN,
        rows,
        C=depth,
        N=width,
        E=experts,
        TURNED=turned,
        HAS_BIAS=bias_EN is not None,
        TAIL=tail,
        V=lanes(experts),
        GROUP=GROUP,
    )
    return out_RN


@on_device
def weights_gemm(
    a: Tensor,
    b: Tensor,
    counts_E: Tensor,
    dtype: torch.dtype,
    *,
    source_R: Tensor | None = None,
    choices: int = 1,
    gather: str = "",
) -> Tensor:
    """(E, M, N): the sum over each expert's rows of a_r (outer) b_r; zeros for an expert without rows.

    Rows whose source is -1 are left out. `gather` names the side ("a" or "b") that holds tokens instead of rows.
    """
    experts, m, n = counts_E.shape[0], a.shape[1], b.shape[1]
    out = torch.empty(experts, m, n, dtype=dtype, device=a.device)
    if out.numel() == 0:
        return out
    grid = persistent_grid(a.device, lambda meta: experts * -(-m // meta["BLOCK_M"]) * -(-n // meta["BLOCK_N"]))
    _weights_kernel[grid](
        a.contiguous(),
        b.contiguous(),
        None if source_R is None else source_R.contiguous(),
        counts_E.contiguous(),
        out,
        M=m,
        N=n,
        E=experts,
        K=choices,
        GATHER_A=gather == "a",
        GATHER_B=gather == "b",
        HAS_SOURCE=source_R is not None,
        V=lanes(experts),
        GROUP=GROUP,
    )
    return out
