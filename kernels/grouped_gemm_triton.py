"""The Triton side of grouped GEMMs: persistent tiles over ragged rows, found on the device from the counts alone.

Shapes: E experts, R routed rows, C contracted width, N output width, M rows of a weight gradient, V lanes that hold
the experts. A row index is widened to int64 before it meets a stride, an expert's index before it meets its matrix.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .backend import HAS_TRITON, jit, tl, triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Row tiles that share their weight tiles through L2 before the next weight tiles are read.
GROUP = 8
Config = dict[str, int]


def tuned(configs: Sequence[Config], small: Config, key: Sequence[str]) -> Callable[[Callable[..., Any]], Any]:
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
    wide = any(t.dtype == torch.float32 for t in (arguments["a_ptr"], arguments["out_ptr"]))
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
SMALL = tiles(16, 16, 16, 4, 2, 1)


@jit
def expert_rows(counts_ptr, rows, E: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, V: tl.constexpr):
    """Rows, row tiles and the running end of the row tiles of every expert; with TAIL lane E is the rows after all."""
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
def find_tile(
    tile, rows_V, tiles_V, ends_V, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr, V: tl.constexpr
):
    """The expert of a tile, and its place: the first row, how many rows are left from there, the column tile."""
    lanes_V = tl.arange(0, V)
    expert = tl.sum((ends_V <= tile // COLUMNS).to(tl.int32))
    first = tl.sum(tl.where(lanes_V < expert, rows_V, 0))
    first_tile = tl.sum(tl.where(lanes_V < expert, tiles_V, 0))
    count = tl.sum(tl.where(lanes_V == expert, rows_V, 0))
    m, n = swizzle(tile - first_tile * COLUMNS, (count + BLOCK_M - 1) // BLOCK_M, COLUMNS, GROUP)
    return expert, first + m * BLOCK_M, count - m * BLOCK_M, n


@jit
def source_rows(source_ptr, rows_M, live_M, K: tl.constexpr):
    """The token that each row was gathered from (int64), and which rows hold one."""
    source_M = tl.load(source_ptr + rows_M, mask=live_M, other=-1)
    return source_M // K, source_M >= 0


@jit
def matrix_offsets(expert, rows_A, columns_B, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TURNED: tl.constexpr):
    """Offsets (A, B) into matrix `expert` of a stack of (ROWS, COLUMNS); TURNED: of its transpose."""
    start = expert.to(tl.int64) * ROWS * COLUMNS
    if TURNED:
        return start + rows_A[:, None] + columns_B[None, :].to(tl.int64) * COLUMNS
    return start + rows_A[:, None].to(tl.int64) * COLUMNS + columns_B[None, :]


@tuned(_CONFIGS, SMALL, key=["C", "N", "E", "TURNED"])
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
        live_M = tl.arange(0, BLOCK_M) < left
        rows_M = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        cols_N = n * BLOCK_N + tl.arange(0, BLOCK_N)
        depth = C
        if TAIL:
            depth = tl.where(expert < E, C, 0)
        acc_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, depth, BLOCK_K):
            k_K = k + tl.arange(0, BLOCK_K)
            a_MK = tl.load(
                a_ptr + rows_M[:, None] * C + k_K[None, :], mask=live_M[:, None] & (k_K < C)[None, :], other=0.0
            )
            b_KN = tl.load(
                w_ptr + matrix_offsets(expert, k_K, cols_N, C if TURNED else N, N if TURNED else C, not TURNED),
                mask=(k_K < C)[:, None] & (cols_N < N)[None, :],
                other=0.0,
            )
            acc_MN = tl.dot(a_MK, b_KN, acc_MN, input_precision="ieee")
        if HAS_BIAS:
            acc_MN += tl.load(bias_ptr + expert * N + cols_N, mask=(cols_N < N) & (expert < E), other=0.0)[None, :]
        tl.store(
            out_ptr + rows_M[:, None] * N + cols_N[None, :],
            acc_MN.to(out_ptr.dtype.element_ty),
            mask=live_M[:, None] & (cols_N < N)[None, :],
        )


@tuned(_CONFIGS, SMALL, key=["M", "N", "E", "GATHER_A", "GATHER_B"])
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
        first = tl.sum(tl.where(lanes_V < expert, rows_V, 0))
        count = tl.sum(tl.where(lanes_V == expert, rows_V, 0))
        cols_M = m * BLOCK_M + tl.arange(0, BLOCK_M)
        cols_N = n * BLOCK_N + tl.arange(0, BLOCK_N)
        acc_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, count, BLOCK_K):
            live_K = start + tl.arange(0, BLOCK_K) < count
            rows_K = (first + start + tl.arange(0, BLOCK_K)).to(tl.int64)
            tokens_K = rows_K
            if HAS_SOURCE:
                tokens_K, live_K = source_rows(source_ptr, rows_K, live_K, K)
            a_K = tokens_K if GATHER_A else rows_K
            b_K = tokens_K if GATHER_B else rows_K
            a_KM = tl.load(
                a_ptr + a_K[:, None] * M + cols_M[None, :], mask=live_K[:, None] & (cols_M < M)[None, :], other=0.0
            )
            b_KN = tl.load(
                b_ptr + b_K[:, None] * N + cols_N[None, :], mask=live_K[:, None] & (cols_N < N)[None, :], other=0.0
            )
            acc_MN = tl.dot(tl.trans(a_KM), b_KN, acc_MN, input_precision="ieee")
        tl.store(
            out_ptr + matrix_offsets(tl.to_tensor(expert), cols_M, cols_N, M, N, False),
            acc_MN.to(out_ptr.dtype.element_ty),
            mask=(cols_M < M)[:, None] & (cols_N < N)[None, :],
        )


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def persistent_grid(device: torch.device, tiles_of: Callable[[dict[str, Any]], int]) -> Callable[..., tuple[int]]:
    """A grid of PER_SM programs a multiprocessor, or of as many as there can be tiles; three under the interpreter."""
    return lambda meta: (max(1, min(tiles_of(meta), _multiprocessors(device) * meta["PER_SM"])),)


def lanes(experts: int) -> int:
    """V: a power of two with room for the experts and the rows after the last one."""
    return max(16, 1 << experts.bit_length())


def ragged_grid(device: torch.device, rows: int, experts: int, width: int, block: str) -> Callable[..., tuple[int]]:
    """The grid for row tiles over `rows` rows and columns of `meta[block]`; every expert may end in a partial tile."""
    return persistent_grid(
        device, lambda meta: (-(-rows // meta["BLOCK_M"]) + experts + 1) * -(-width // meta[block])
    )


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
    with torch.cuda.device_of(a_RC):
        _rows_kernel[ragged_grid(a_RC.device, rows, experts, width, "BLOCK_N")](
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
    grid = persistent_grid(
        a.device, lambda meta: experts * -(-m // meta["BLOCK_M"]) * -(-n // meta["BLOCK_N"])
    )
    with torch.cuda.device_of(a):
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
