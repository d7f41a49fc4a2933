"""The experts of a MoE layer in CPU inference: bytes of the chosen experts a second beside what the memory gives, and
for many tokens multiplications a second beside torch's own product."""

# Shapes: T tokens, D model, E experts, K choices, F hidden, R = T K routed rows.

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import expert_native, native
from ..kernels.expert_mlp import expert_mlp
from ..kernels.permute import plan_rows
from .rows import Row, show, write
from .timing import interleaved, median_and_spread

_D, _F, _E, _K = 512, 1024, 16, 2
_LAYERS = 8  # which take turns: together their weights are larger than the caches
_TURNS = 5  # sets of choices, so that no cache holds the experts that come next
_FEW = 64  # tokens up to which the memory is the limit
Stacked = tuple[Tensor, Tensor]


def main(json: str | Path | None = None, quick: bool = False, threads: int | None = None) -> list[Row]:
    """Measures, shows and returns the rows; half a minute, or a few seconds with `quick`.

    Raises:
        RuntimeError: there are no CPU kernels here, and why.
    """
    if native.library() is None:
        raise RuntimeError(f"there are no CPU kernels to measure: {native.why_not()}")
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    rows = []
    with torch.inference_mode():
        for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float32):
            weights = [_stacked(dtype) for _ in range(_LAYERS)]
            for tokens in (1, 16, 1024) if quick else (1, 4, 8, 16, 32, _FEW, 256, 1024, 2048):
                rows += _case(weights, tokens, 3 if quick or tokens > _FEW else 7)
    show(rows)
    if json is not None:
        write(rows, json)
    return rows


def _stacked(dtype: torch.dtype) -> Stacked:
    w_in, w_out = torch.randn(_E, 2 * _F, _D) / _D**0.5, torch.randn(_E, _D, _F) / _F**0.5
    return w_in.to(dtype), w_out.to(dtype)


def _case(weights: Sequence[Stacked], tokens: int, repeats: int) -> list[Row]:
    dtype, few = weights[0][0].dtype, tokens <= _FEW
    skewed_TE = (torch.arange(1, _E + 1) ** -0.7).expand(tokens, -1)
    turns = [[torch.multinomial(skewed_TE, _K) for _ in weights] for _ in range(_TURNS if few else 1)]
    x_TD, shares_TK = torch.randn(tokens, _D).to(dtype), torch.rand(tokens, _K)

    def own() -> None:
        for turn in turns:
            for (w_in, w_out), ids_TK in zip(weights, turn, strict=True):
                expert_native.experts(x_TD, ids_TK, shares_TK, w_in, w_out)

    def plain() -> None:
        for turn in turns:
            for (w_in, w_out), ids_TK in zip(weights, turn, strict=True):
                expert_mlp(x_TD, plan_rows(ids_TK, _E), w_in, w_out, weights_TK=shares_TK)

    limit, amount = _read(weights) if few else _linear(x_TD, weights[0][0])
    seconds = interleaved({"coterie": own, "torch": plain, "limit": limit}, repeats, warmup=1)
    rate = amount / statistics.median(seconds["limit"]) / 1e9
    if few:
        expert = sum(w[0].nbytes for w in weights[0])
        done = expert * sum(len(ids_TK.unique()) for turn in turns for ids_TK in turn)
    else:
        done = len(weights) * tokens * _K * 6 * _D * _F
    metric, unit = ("weights of chosen experts", "GB/s") if few else ("products", "GFLOP/s")
    case = f"{str(dtype).removeprefix('torch.')} T{tokens} d{_D} F{_F} E{_E} k{_K}"
    rows = []
    for name in ("coterie", "torch"):
        middle, spread = median_and_spread([done / s / 1e9 for s in seconds[name]])
        rows.append(Row("experts", case, name, metric, middle, unit, spread, rate, middle / rate))
    return rows


def _read(weights: Sequence[Stacked]) -> tuple[Callable[[], object], int]:
    """A reading of all weights, and its bytes."""
    every = [w.view(torch.int32).flatten() for pair in weights for w in pair]
    return lambda: [w.amax() for w in every], sum(w.nbytes for w in every)


def _linear(x_TD: Tensor, w_in: Tensor) -> tuple[Callable[[], object], int]:
    """torch's product of as many rows as are routed, and twice its multiplications."""
    w_ND, x_RD = w_in.flatten(0, 1)[: 4 * 2 * _F], x_TD.repeat(_K, 1)
    return lambda: F.linear(x_RD, w_ND), 2 * len(x_RD) * w_ND.numel()
