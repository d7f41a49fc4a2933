"""The whole router of a MoE layer in two launches, for inference where Triton runs.

Shapes: T tokens, D model, E experts, K choices; columns as in `gate_triton`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import choose, jit, on_device, tl, triton
from .gate_triton import open_groups, order, take_best, tokens_at_once

MOST_TOKENS = 16
"""For more of them a product reads the router's weights as seldom, and its tiles are fuller."""


@jit
def _logits_kernel(
    x_TD,
    weight_ED,
    logits_TE,
    counts_E,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program for a token and some experts, so that a token's sums do not depend on the others."""
    token, e_E = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    sum_ED = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    for first in range(0, D, BLOCK_D):
        d_D = first + tl.arange(0, BLOCK_D)
        x_D = tl.load(x_TD + token * D + d_D, mask=d_D < D, other=0.0).to(tl.float32)
        mask_ED = (e_E < E)[:, None] & (d_D < D)[None, :]
        sum_ED += tl.load(weight_ED + e_E[:, None] * D + d_D[None, :], mask=mask_ED, other=0.0) * x_D[None, :]
    tl.store(logits_TE + token * E + e_E, tl.sum(sum_ED, 1), mask=e_E < E)
    if token == 0:
        tl.store(counts_E + e_E, tl.zeros((BLOCK_E,), tl.int64), mask=e_E < E)


@jit
def _route_kernel(
    logits_TE,
    bias_E,
    weights_TK,
    ids_TK,
    counts_E,
    tokens,
    factor,
    E: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    SOFTMAX: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # The choices of `_gate_kernel`, and their weights as the experts take them.
    M: tl.constexpr = E // G
    column_C = tl.arange(0, P * Q)
    expert_C = column_C // Q * M + column_C % Q
    real_C = (column_C // Q < G) & (column_C % Q < M)
    token_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_T, k_K = token_T < tokens, tl.arange(0, BLOCK_K)
    mask_TC = row_T[:, None] & real_C[None, :]
    logits = tl.load(logits_TE + token_T[:, None] * E + expert_C[None, :], mask=mask_TC, other=0.0)
    if SOFTMAX:
        logits = tl.where(real_C[None, :], logits, float("-inf"))
        power = tl.exp(logits - tl.max(logits, 1)[:, None])
        scores = power / tl.sum(power, 1)[:, None]
    else:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    select = scores
    if bias_E is not None:
        select += tl.load(bias_E + expert_C, mask=real_C, other=0.0)[None, :]
    keys = tl.where(real_C[None, :], order(select), -0x80000000)
    if G > 1:
        select = tl.where(real_C[None, :], select, float("-inf"))
        keys = tl.where(open_groups(select, G, M, TOPK_GROUPS, P, Q, BLOCK_T), keys, -0x80000000)
    load_C = tl.zeros((P * Q,), tl.int32)
    weight_TK = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for k in range(K):
        chosen_T, keys = take_best(keys, P * Q)
        hit_TC = (column_C[None, :] == chosen_T[:, None]) & mask_TC
        weight_T = tl.sum(tl.where(hit_TC, scores, 0.0), 1)
        weight_TK = tl.where(k_K[None, :] == k, weight_T[:, None], weight_TK)
        tl.store(ids_TK + token_T * K + k, (chosen_T // Q * M + chosen_T % Q).to(tl.int64), mask=row_T)
        load_C += tl.sum(hit_TC.to(tl.int32), 0)
    if RENORMALIZE:
        weight_TK = weight_TK / tl.maximum(tl.sum(weight_TK, 1), 1e-20)[:, None]
    at_TK = token_T[:, None] * K + k_K[None, :]
    tl.store(weights_TK + at_TK, weight_TK * factor, mask=row_T[:, None] & (k_K < K)[None, :])
    tl.atomic_add(counts_E + expert_C, load_C.to(tl.int64), mask=real_C & (load_C > 0))


def ready(x_TD: Tensor, weight_ED: Tensor) -> bool:
    """Whether `route` takes these: inference mode, where Triton runs, and the router in fp32."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled() or choose(x_TD) != "triton":
        return False
    return len(x_TD) > 0 and weight_ED.dtype == torch.float32 and weight_ED.is_contiguous()


@on_device
def route(
    x_TD: Tensor,
    weight_ED: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    *,
    score: str,
    groups: int,
    topk_groups: int,
    renormalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`gate_native.route` by two launches, or for more than MOST_TOKENS by torch's product and one."""
    (tokens, dim), experts, x_TD = x_TD.shape, len(weight_ED), x_TD.contiguous()
    if tokens <= MOST_TOKENS:
        logits_TE = x_TD.new_empty((tokens, experts), dtype=torch.float32)
        counts_E = x_TD.new_empty(experts, dtype=torch.int64)
        tile = {"BLOCK_E": 8, "BLOCK_D": min(triton.next_power_of_2(dim), 512)}
        _logits_kernel[(tokens, triton.cdiv(experts, 8))](
            x_TD, weight_ED, logits_TE, counts_E, D=dim, E=experts, **tile, num_warps=4
        )
    else:
        logits_TE = torch.nn.functional.linear(x_TD.float(), weight_ED)
        counts_E = x_TD.new_zeros(experts, dtype=torch.int64)
    weights_TK = logits_TE.new_empty((tokens, top_k))
    ids_TK = logits_TE.new_empty((tokens, top_k), dtype=torch.int64)
    P, Q = triton.next_power_of_2(groups), triton.next_power_of_2(experts // groups)
    block = 1 if tokens <= MOST_TOKENS else tokens_at_once(P * Q)
    _route_kernel[(triton.cdiv(tokens, block),)](
        *(logits_TE, bias_E, weights_TK, ids_TK, counts_E, tokens, float(scale)),
        E=experts,
        K=top_k,
        G=groups,
        TOPK_GROUPS=topk_groups,
        P=P,
        Q=Q,
        SOFTMAX=score == "softmax",
        RENORMALIZE=renormalize,
        BLOCK_T=block,
        BLOCK_K=triton.next_power_of_2(top_k),
        num_warps=1 if block == 1 else 4,
    )
    return ids_TK, weights_TK, counts_E
