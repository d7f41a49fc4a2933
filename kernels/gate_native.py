"""The whole router of a MoE layer in one call, for inference on a CPU: `native/gate.cpp`.

Shapes: T tokens, D model, E experts, K choices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from ctypes import c_float, c_int, c_long, c_void_p

import torch
from torch import Tensor

from . import native


def ready(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> bool:
    """Whether `route` takes these: `native.ready`, and the router in fp32."""
    if not native.ready(x_TD, weight_ED) or weight_ED.dtype != torch.float32:
        return False
    return bias_E is None or (bias_E.dtype == torch.float32 and bias_E.is_contiguous())


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
    """ids_TK (int64), weights_TK (fp32) and counts_E (int64) of `kernels.gate`, the weights renormalised and scaled.

    A token's answer has the same bits whatever the other tokens are.
    """
    (tokens, dim), experts = x_TD.shape, len(weight_ED)
    ids_TK = x_TD.new_empty((tokens, top_k), dtype=torch.int64)
    weights_TK = x_TD.new_empty((tokens, top_k), dtype=torch.float32)
    counts_E = x_TD.new_empty(experts, dtype=torch.int64)
    _functions()[x_TD.dtype](
        x_TD.data_ptr(),
        weight_ED.data_ptr(),
        None if bias_E is None else bias_E.data_ptr(),
        ids_TK.data_ptr(),
        weights_TK.data_ptr(),
        counts_E.data_ptr(),
        tokens,
        dim,
        experts,
        top_k,
        groups,
        topk_groups,
        score == "sigmoid",
        renormalize,
        scale,
        torch.get_num_threads(),
    )
    return ids_TK, weights_TK, counts_E


def scale_by_sigmoid_(x_TD: Tensor, logits_T1: Tensor) -> Tensor:
    """x * sigmoid(logits), of an x that nobody else needs: where inference runs on a CPU it is written to x.

    torch's sigmoid gives the last few numbers of a tensor other bits than those before them.
    """
    if not native.ready(x_TD, logits_T1) or x_TD.dtype != logits_T1.dtype or logits_T1.shape != (len(x_TD), 1):
        return x_TD * logits_T1.sigmoid()
    _scales()[x_TD.dtype](x_TD.data_ptr(), logits_T1.data_ptr(), *x_TD.shape)
    return x_TD


def mix_(y_TD: Tensor, residual_TD: Tensor, logits_T2: Tensor) -> Tensor:
    """c_0 * y + c_1 * residual with c = softmax(logits), of a y that nobody else needs: where inference runs on a
    CPU it is written to y, and c is not rounded."""
    alike = y_TD.dtype == residual_TD.dtype == logits_T2.dtype and y_TD.shape == residual_TD.shape
    if not (alike and native.ready(y_TD, residual_TD, logits_T2) and logits_T2.shape == (len(y_TD), 2)):
        mix_T2 = logits_T2.softmax(-1, dtype=torch.float32).to(y_TD.dtype)
        return torch.addcmul(y_TD * mix_T2[:, :1], residual_TD, mix_T2[:, 1:])
    function = _mixes()[y_TD.dtype]
    function(y_TD.data_ptr(), residual_TD.data_ptr(), logits_T2.data_ptr(), *y_TD.shape, torch.get_num_threads())
    return y_TD


@functools.cache
def _mixes() -> dict[torch.dtype, Callable[..., None]]:
    kinds = [c_void_p] * 3 + [c_long] * 2 + [c_int]
    names = {torch.bfloat16: "mix_bf16", torch.float32: "mix_fp32"}
    return {dtype: native.function(name, *kinds) for dtype, name in names.items()}


@functools.cache
def _scales() -> dict[torch.dtype, Callable[..., None]]:
    kinds = [c_void_p, c_void_p, c_long, c_long]
    names = {torch.bfloat16: "scale_bf16", torch.float32: "scale_fp32"}
    return {dtype: native.function(name, *kinds) for dtype, name in names.items()}


@functools.cache
def _functions() -> dict[torch.dtype, Callable[..., None]]:
    kinds = [c_void_p] * 6 + [c_long] * 6 + [c_int, c_int, c_float, c_int]
    names = {torch.bfloat16: "gate_bf16", torch.float32: "gate_fp32"}
    return {dtype: native.function(name, *kinds) for dtype, name in names.items()}
