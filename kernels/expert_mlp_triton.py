"""The experts in Triton: gather, up projection and activation in one kernel; their gradients in another.

Only x and the pre-activation z outlive the forward pass, and the gradient of the weights comes from the down
projection's backward, after SonicMoE (arXiv 2512.14080, section 3). Rows in which nothing was routed are never read.

Shapes: T tokens, D model, E experts, K choices, R routed rows, F expert hidden, N = 2F (swiglu) or F (gelu),
P = ceil(F / PART) partial sums of a row.
"""
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backend import jit, on_device, tl
from .expert_sums_triton import choice_sums, column_sums
from .grouped_gemm_triton import (
    GROUP,
    INTERPRETED,
    SMALL,
    Config,
    at,
    expert_rows,
    find_tile,
    jit_tuned,
    lanes,
    live_sources,
    ragged_grid,
    rows_gemm,
    tiles,
    weights_gemm,
)
from .permute_triton import unpermute_triton

# Columns of F in one partial sum of <dy w_out, a>: the same for every config, so that each writes the same sums.
_PART = 16 if INTERPRETED else 128


def _without_columns(*configs: Config) -> list[Config]:
    return [{name: value for name, value in c.items() if name != "BLOCK_N"} for c in configs]


_UP_CONFIGS = (
    tiles(128, 128, 64, 8, 3, 1),
    tiles(128, 64, 64, 8, 4, 1),
    tiles(128, 64, 64, 4, 3, 2),
    tiles(64, 64, 64, 4, 4, 2),
    tiles(128, 64, 32, 8, 4, 2),
    tiles(64, 32, 32, 4, 4, 3),
)
_DOWN_GRAD_CONFIGS = _without_columns(
    tiles(128, 128, 64, 8, 3, 1),
    tiles(64, 128, 64, 8, 3, 2),
    tiles(128, 128, 32, 8, 4, 1),
    tiles(64, 128, 32, 8, 4, 2),
)


@jit
def _gelu(z):
    # 0.5 z (1 + tanh(u)), u = sqrt(2 / pi) (z + 0.044715 z^3), and 0.5 (1 + tanh(u)) is sigmoid(2u).
    half = tl.sigmoid(1.5957691216057308 * z * (1.0 + 0.044715 * z * z))
    return z * half, half + z * half * (1.0 - half) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)


@jit_tuned(_UP_CONFIGS, SMALL, key=["D", "F", "E", "GATED"])
def _up_kernel(
    a_ptr,
    w_ptr,
    bias_ptr,
    source_ptr,
    counts_ptr,
    z_ptr,
    out_ptr,
    rows,
    D: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    V: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PER_SM: tl.constexpr,
):
    # z_r = W_e x_t (+ b_e) and a_r = activation(z_r), for token t of row r; zeros after the last expert's rows.
    columns: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    N: tl.constexpr = 2 * F if GATED else F
    dtype: tl.constexpr = z_ptr.dtype.element_ty
    rows_V, tiles_V, ends_V = expert_rows(counts_ptr, rows, E, True, BLOCK_M, V)
    for tile in range(tl.program_id(0), tl.sum(tiles_V) * columns, tl.num_programs(0)):
        expert, first, left, n = find_tile(tile, rows_V, tiles_V, ends_V, columns, BLOCK_M, GROUP, V)
        rows_M = tl.arange(0, BLOCK_M)
        cols_F = n * BLOCK_N + tl.arange(0, BLOCK_N)
        source_M, live_M = live_sources(source_ptr + first, rows_M, rows_M < left)
        x_M, w_tile = a_ptr + source_M // K * D, at(w_ptr, expert, N * D)
        gate_MF = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up_MF = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, tl.where(expert < E, D, 0), BLOCK_K):
            k_K = k + tl.arange(0, BLOCK_K)
            x_MK = tl.load(x_M[:, None] + k_K[None, :], mask=live_M[:, None] & (k_K < D)[None, :], other=0.0)
            w_KF, mask_KF = k_K[:, None] + cols_F[None, :] * D, (k_K < D)[:, None] & (cols_F < F)[None, :]
            gate_KF = tl.load(w_tile + w_KF, mask=mask_KF, other=0.0)
            gate_MF = tl.dot(x_MK, gate_KF, gate_MF, input_precision="ieee")
            if GATED:
                up_KF = tl.load(w_tile + F * D + w_KF, mask=mask_KF, other=0.0)
                up_MF = tl.dot(x_MK, up_KF, up_MF, input_precision="ieee")
        if HAS_BIAS:
            biased_F = cols_F < tl.where(expert < E, F, 0)
            gate_MF += tl.load(bias_ptr + expert * N + cols_F, mask=biased_F, other=0.0)[None, :]
            if GATED:
                up_MF += tl.load(bias_ptr + expert * N + F + cols_F, mask=biased_F, other=0.0)[None, :]
        inside_MF = (rows_M < left)[:, None] & (cols_F < F)[None, :]
        z_MF = at(z_ptr, first, N) + rows_M[:, None] * N + cols_F[None, :]
        tl.store(z_MF, gate_MF.to(dtype), mask=inside_MF)
        # The activation reads z as it is stored, as the backward pass will.
        if GATED:
            tl.store(z_MF + F, up_MF.to(dtype), mask=inside_MF)
            gate_MF = gate_MF.to(dtype).to(tl.float32)
            a_MF = gate_MF * tl.sigmoid(gate_MF) * up_MF.to(dtype).to(tl.float32)
        else:
            a_MF, _ = _gelu(gate_MF.to(dtype).to(tl.float32))
        out_MF = at(out_ptr, first, F) + rows_M[:, None] * F + cols_F[None, :]
        tl.store(out_MF, a_MF.to(dtype), mask=inside_MF)


@jit
def _activation_grad(
    g_MF, scale_M, z_tile, dz_tile, scaled_tile, rows_M, cols_F, left, F: tl.constexpr, GATED: tl.constexpr
):
    """Stores dz and w_r a_r, for g the gradient of a without the weights; returns <g_r, a_r> over these columns."""
    N: tl.constexpr = 2 * F if GATED else F
    dtype: tl.constexpr = dz_tile.dtype.element_ty
    inside_MF = (rows_M < left)[:, None] & (cols_F < F)[None, :]
    z_MF = rows_M[:, None] * N + cols_F[None, :]
    gate_MF = tl.load(z_tile + z_MF, mask=inside_MF, other=0.0).to(tl.float32)
    da_MF = g_MF * scale_M[:, None]
    if GATED:
        up_MF = tl.load(z_tile + F + z_MF, mask=inside_MF, other=0.0).to(tl.float32)
        sigmoid_MF = tl.sigmoid(gate_MF)
        silu_MF = gate_MF * sigmoid_MF
        tl.store(dz_tile + F + z_MF, (da_MF * silu_MF).to(dtype), mask=inside_MF)
        da_MF *= up_MF
        slope_MF = sigmoid_MF + silu_MF * (1.0 - sigmoid_MF)
        a_MF = silu_MF * up_MF
    else:
        a_MF, slope_MF = _gelu(gate_MF)
    tl.store(dz_tile + z_MF, (da_MF * slope_MF).to(dtype), mask=inside_MF)
    scaled_MF = scaled_tile + rows_M[:, None] * F + cols_F[None, :]
    tl.store(scaled_MF, (a_MF * scale_M[:, None]).to(dtype), mask=inside_MF)
    return tl.sum(g_MF * a_MF, 1)


@jit_tuned(_DOWN_GRAD_CONFIGS, _without_columns(SMALL)[0], key=["D", "F", "E", "GATED"])
def _down_grad_kernel(
    a_ptr,
    w_ptr,
    z_ptr,
    weights_ptr,
    source_ptr,
    counts_ptr,
    dz_ptr,
    scaled_ptr,
    parts_ptr,
    rows,
    D: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    GATED: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    V: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PER_SM: tl.constexpr,
):
    # g_r = W_out_e^T dy_t, and from it in the epilogue: dz_r = w_r g_r activation'(z_r), the scaled w_r a_r that
    # w_out's gradient takes, and this tile's part of the weight's own gradient <g_r, a_r>.
    columns: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    N: tl.constexpr = 2 * F if GATED else F
    rows_V, tiles_V, ends_V = expert_rows(counts_ptr, rows, E, False, BLOCK_M, V)
    for tile in range(tl.program_id(0), tl.sum(tiles_V) * columns, tl.num_programs(0)):
        expert, first, left, n = find_tile(tile, rows_V, tiles_V, ends_V, columns, BLOCK_M, GROUP, V)
        rows_M = tl.arange(0, BLOCK_M)
        cols_F = n * BLOCK_N + tl.arange(0, BLOCK_N)
        source_M, live_M = live_sources(source_ptr + first, rows_M, rows_M < left)
        dy_M, w_tile = a_ptr + source_M // K * D, at(w_ptr, expert, D * F)
        g_MF = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, D, BLOCK_K):
            k_K = k + tl.arange(0, BLOCK_K)
            dy_MK = tl.load(dy_M[:, None] + k_K[None, :], mask=live_M[:, None] & (k_K < D)[None, :], other=0.0)
            w_mask_KF = (k_K < D)[:, None] & (cols_F < F)[None, :]
            w_KF = tl.load(w_tile + k_K[:, None] * F + cols_F[None, :], mask=w_mask_KF, other=0.0)
            g_MF = tl.dot(dy_MK, w_KF, g_MF, input_precision="ieee")
        scale_M = tl.full((BLOCK_M,), 1.0, tl.float32)
        if HAS_WEIGHTS:
            scale_M = tl.load(weights_ptr + source_M, mask=live_M, other=0.0)
        z_tile, dz_tile, scaled_tile = at(z_ptr, first, N), at(dz_ptr, first, N), at(scaled_ptr, first, F)
        # Half of the columns at a time: a whole tile's z, slopes and products do not fit in the registers.
        left_MF, right_MF = tl.split(tl.permute(tl.reshape(g_MF, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        half_F = n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        part_M = _activation_grad(left_MF, scale_M, z_tile, dz_tile, scaled_tile, rows_M, half_F, left, F, GATED)
        half_F += BLOCK_N // 2
        part_M += _activation_grad(right_MF, scale_M, z_tile, dz_tile, scaled_tile, rows_M, half_F, left, F, GATED)
        if HAS_WEIGHTS:
            tl.store(at(parts_ptr, first, columns) + rows_M * columns + n, part_M, mask=rows_M < left)


def _like(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device)


def _constants(w_out: Tensor, choices: int, activation: str) -> dict[str, Any]:
    shapes = dict(zip("EDF", w_out.shape, strict=True))
    return {**shapes, "K": choices, "V": lanes(w_out.shape[0]), "GATED": activation == "swiglu", "GROUP": GROUP}


@on_device
def forward(
    x_TD: Tensor,
    source_R: Tensor,
    slot_TK: Tensor,
    counts_E: Tensor,
    w_in_END: Tensor,
    w_out_EDF: Tensor,
    weights_TK: Tensor | None,
    b_in_EN: Tensor | None,
    b_out_ED: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """(y_TD, z_RN): the weighted sum over a token's experts, and the pre-activation that `backward` takes."""
    experts, _, hidden = w_out_EDF.shape
    rows = source_R.shape[0]
    z_RN, a_RF = _like(x_TD, rows, w_in_END.shape[1]), _like(x_TD, rows, hidden)
    if z_RN.numel():
        _up_kernel[ragged_grid(x_TD.device, rows, experts, hidden)](
            x_TD.contiguous(),
            w_in_END.contiguous(),
            None if b_in_EN is None else b_in_EN.contiguous(),
            source_R.contiguous(),
            counts_E.contiguous(),
            z_RN,
            a_RF,
            rows,
            HAS_BIAS=b_in_EN is not None,
            **_constants(w_out_EDF, slot_TK.shape[1], activation),
        )
    y_RD = rows_gemm(a_RF, w_out_EDF, counts_E, bias_EN=b_out_ED, tail=False)
    return unpermute_triton(y_RD, slot_TK, weights_TK), z_RN


@on_device
def backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    z_RN: Tensor,
    source_R: Tensor,
    slot_TK: Tensor,
    counts_E: Tensor,
    w_in_END: Tensor,
    w_out_EDF: Tensor,
    weights_TK: Tensor | None,
    b_in_EN: Tensor | None,
    b_out_ED: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, w_in, w_out, and of the weights and the two biases where they were given."""
    choices = slot_TK.shape[1]
    dy_TD = dy_TD.contiguous()
    dz_RN, scaled_RF, parts_RP = _down_grad(
        dy_TD, z_RN, source_R, counts_E, w_out_EDF, weights_TK, choices, activation
    )
    dw_in = weights_gemm(dz_RN, x_TD, counts_E, w_in_END.dtype, source_R=source_R, choices=choices, gather="b")
    dw_out = weights_gemm(dy_TD, scaled_RF, counts_E, w_out_EDF.dtype, source_R=source_R, choices=choices, gather="a")
    dx_RD = rows_gemm(dz_RN, w_in_END, counts_E, turned=True, tail=False)
    dx_TD = unpermute_triton(dx_RD, slot_TK, None)
    dweights_TK = db_in = db_out = None
    if weights_TK is not None:
        dweights_TK = choice_sums(parts_RP, slot_TK, dy_TD, counts_E, b_out_ED).to(weights_TK.dtype)
    if b_in_EN is not None:
        db_in = column_sums(dz_RN, source_R, counts_E, b_in_EN.dtype, choices=choices, gather=False)
    if b_out_ED is not None:
        db_out = column_sums(
            dy_TD, source_R, counts_E, b_out_ED.dtype, choices=choices, gather=True, weights_TK=weights_TK
        )
    return dx_TD, dw_in, dw_out, dweights_TK, db_in, db_out


def _down_grad(
    dy_TD: Tensor,
    z_RN: Tensor,
    source_R: Tensor,
    counts_E: Tensor,
    w_out_EDF: Tensor,
    weights_TK: Tensor | None,
    choices: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    experts, _, hidden = w_out_EDF.shape
    rows = source_R.shape[0]
    dz_RN, scaled_RF = _like(dy_TD, *z_RN.shape), _like(dy_TD, rows, hidden)
    parts_RP = _like(dy_TD, rows, -(-hidden // _PART), dtype=torch.float32)
    if dz_RN.numel():
        _down_grad_kernel[ragged_grid(dy_TD.device, rows, experts, hidden)](
            dy_TD,
            w_out_EDF.contiguous(),
            z_RN.contiguous(),
            None if weights_TK is None else weights_TK.contiguous(),
            source_R.contiguous(),
            counts_E.contiguous(),
            dz_RN,
            scaled_RF,
            parts_RP,
            rows,
            HAS_WEIGHTS=weights_TK is not None,
            BLOCK_N=_PART,
            **_constants(w_out_EDF, choices, activation),
        )
    return dz_RN, scaled_RF, parts_RP
