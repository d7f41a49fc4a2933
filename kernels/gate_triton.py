"""Triton kernels of the gate.

Shapes: T tokens, E experts, K choices, G groups of M = E / G experts; P and Q: G and M rounded up to powers of two.
The kernels see an expert e = g * M + m in column g * Q + m of C = P * Q, so that groups are a plain reshape away.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import jit, on_device, tl, triton


@jit
def order(values):
    """fp32 as int32 of the same order. The least int32 is no number's: it marks what cannot be chosen."""
    bits = values.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@jit
def take_best(keys_TN, N: tl.constexpr):
    """The lowest column of each row's largest key, and the keys with it closed."""
    column_N = tl.arange(0, N)[None, :]
    best_T = tl.max(keys_TN, 1)
    chosen_T = tl.min(tl.where(keys_TN == best_T[:, None], column_N, N - 1), 1)
    return chosen_T, tl.where(column_N == chosen_T[:, None], -0x80000000, keys_TN)


@jit
def open_groups(
    select_TC,
    G: tl.constexpr,
    M: tl.constexpr,
    TOPK: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """True for the members of the TOPK best groups; `select_TC` is -inf where a column has no expert."""
    select_TPQ = tl.reshape(select_TC, (BLOCK_T, P, Q))
    member_Q = tl.arange(0, Q)[None, None, :]
    group_P = tl.arange(0, P)[None, :]
    best_TP = tl.max(select_TPQ, 2)
    if M > 1:
        first_TP = tl.min(tl.where(select_TPQ == best_TP[:, :, None], member_Q, Q - 1), 2)
        best_TP += tl.max(tl.where(member_Q == first_TP[:, :, None], float("-inf"), select_TPQ), 2)
    keys_TP = tl.where(group_P < G, order(best_TP), -0x80000000)
    open_TP = tl.zeros_like(keys_TP)
    for _ in range(TOPK):
        chosen_T, keys_TP = take_best(keys_TP, P)
        open_TP = tl.where(group_P == chosen_T[:, None], 1, open_TP)
    open_TPQ = tl.broadcast_to(open_TP[:, :, None], (BLOCK_T, P, Q))
    return tl.reshape(open_TPQ, (BLOCK_T, P * Q)) > 0


@jit
def _gate_kernel(
    logits_TE,
    bias_E,
    valid_T,
    replay_TK,
    scores_TE,
    weights_TK,
    ids_TK,
    counts_E,
    tokens,
    E: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    SOFTMAX: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    M: tl.constexpr = E // G
    column_C = tl.arange(0, P * Q)
    expert_C = column_C // Q * M + column_C % Q
    real_C = (column_C // Q < G) & (column_C % Q < M)
    token_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_T = token_T < tokens
    at_TC = token_T[:, None] * E + expert_C[None, :]
    mask_TC = row_T[:, None] & real_C[None, :]

    logits = tl.load(logits_TE + at_TC, mask=mask_TC, other=0.0)
    if SOFTMAX:
        logits = tl.where(real_C[None, :], logits, float("-inf"))
        power = tl.exp(logits - tl.max(logits, 1)[:, None])
        scores = power / tl.sum(power, 1)[:, None]
    else:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    tl.store(scores_TE + at_TC, scores, mask=mask_TC)

    chooses_T = row_T
    if valid_T is not None:
        chooses_T = row_T & (tl.load(valid_T + token_T, mask=row_T, other=0) != 0)
    keys = tl.zeros((BLOCK_T, P * Q), tl.int32)
    if replay_TK is None:
        select = scores
        if bias_E is not None:
            select += tl.load(bias_E + expert_C, mask=real_C, other=0.0)[None, :]
        keys = tl.where(real_C[None, :], order(select), -0x80000000)
        if G > 1:
            select = tl.where(real_C[None, :], select, float("-inf"))
            keys = tl.where(open_groups(select, G, M, TOPK_GROUPS, P, Q, BLOCK_T), keys, -0x80000000)

    load_C = tl.zeros((P * Q,), tl.int32)
    for k in range(K):
        at_T = token_T * K + k
        if replay_TK is None:
            chosen_T, keys = take_best(keys, P * Q)
            id_T = (chosen_T // Q * M + chosen_T % Q).to(tl.int64)
        else:
            id_T = tl.load(replay_TK + at_T, mask=row_T, other=-1)
        id_T = tl.where(chooses_T, id_T, -1)
        hit_TC = (id_T[:, None] == expert_C[None, :]) & mask_TC
        tl.store(ids_TK + at_T, id_T, mask=row_T)
        tl.store(weights_TK + at_T, tl.sum(tl.where(hit_TC, scores, 0.0), 1), mask=row_T)
        load_C += tl.sum(hit_TC.to(tl.int32), 0)
    # Integer sums: whatever order the blocks add in, the counts are the same.
    tl.atomic_add(counts_E + expert_C, load_C.to(tl.int64), mask=real_C & (load_C > 0))


@jit
def _gate_backward_kernel(
    scores_TE,
    ids_TK,
    dscores_TE,
    dweights_TK,
    dlogits_TE,
    tokens,
    E: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    SOFTMAX: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    expert_C = tl.arange(0, C)
    token_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_T = token_T < tokens
    at_TC = token_T[:, None] * E + expert_C[None, :]
    mask_TC = row_T[:, None] & (expert_C < E)[None, :]
    scores = tl.load(scores_TE + at_TC, mask=mask_TC, other=0.0)
    dscores = tl.zeros((BLOCK_T, C), tl.float32)
    if dscores_TE is not None:
        dscores += tl.load(dscores_TE + at_TC, mask=mask_TC, other=0.0)
    if dweights_TK is not None:
        for k in range(K):
            id_T = tl.load(ids_TK + token_T * K + k, mask=row_T, other=-1)
            dweight_T = tl.load(dweights_TK + token_T * K + k, mask=row_T, other=0.0)
            dscores += tl.where(id_T[:, None] == expert_C[None, :], dweight_T[:, None], 0.0)
    if SOFTMAX:
        dlogits = scores * (dscores - tl.sum(scores * dscores, 1)[:, None])
    else:
        dlogits = dscores * scores * (1.0 - scores)
    tl.store(dlogits_TE + at_TC, dlogits, mask=mask_TC)


def tokens_at_once(columns: int) -> int:
    return max(1, min(64, 2048 // columns))


@on_device
def gate_triton(
    logits_TE: Tensor,
    top_k: int,
    score: str,
    bias_E: Tensor | None,
    groups: int,
    topk_groups: int,
    valid_T: Tensor | None,
    ids_TK: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`gate` by one kernel: fp32 logits in, (scores, weights, ids, counts) out. No host sync."""
    tokens, experts = logits_TE.shape
    scores_TE = torch.empty_like(logits_TE, memory_format=torch.contiguous_format)
    weights_TK = logits_TE.new_empty((tokens, top_k))
    chosen_TK = logits_TE.new_empty((tokens, top_k), dtype=torch.int64)
    counts_E = logits_TE.new_zeros((experts,), dtype=torch.int64)
    if tokens == 0:
        return scores_TE, weights_TK, chosen_TK, counts_E
    P, Q = triton.next_power_of_2(groups), triton.next_power_of_2(experts // groups)
    block = tokens_at_once(P * Q)
    _gate_kernel[(triton.cdiv(tokens, block),)](
        logits_TE.contiguous(),
        None if bias_E is None else bias_E.contiguous(),
        None if valid_T is None else valid_T.contiguous(),
        None if ids_TK is None else ids_TK.contiguous(),
        scores_TE,
        weights_TK,
        chosen_TK,
        counts_E,
        tokens,
        E=experts,
        K=top_k,
        G=groups,
        TOPK_GROUPS=topk_groups,
        P=P,
        Q=Q,
        SOFTMAX=score == "softmax",
        BLOCK_T=block,
    )
    return scores_TE, weights_TK, chosen_TK, counts_E


@on_device
def gate_backward_triton(
    scores_TE: Tensor, ids_TK: Tensor, dscores_TE: Tensor | None, dweights_TK: Tensor | None, score: str
) -> Tensor:
    """d(loss)/d(logits) of `gate`; a gradient of None is zero."""
    tokens, experts = scores_TE.shape
    dlogits_TE = torch.empty_like(scores_TE)
    if tokens == 0:
        return dlogits_TE
    columns = triton.next_power_of_2(experts)
    block = tokens_at_once(columns)
    _gate_backward_kernel[(triton.cdiv(tokens, block),)](
        scores_TE,
        ids_TK,
        None if dscores_TE is None else dscores_TE.contiguous(),
        None if dweights_TK is None else dweights_TK.contiguous(),
        dlogits_TE,
        tokens,
        E=experts,
        K=ids_TK.shape[1],
        C=columns,
        SOFTMAX=score == "softmax",
        BLOCK_T=block,
    )
    return dlogits_TE
