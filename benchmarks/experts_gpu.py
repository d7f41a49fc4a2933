"""`coterie bench experts --device cuda`: the experts of one layer of a published shape, for few and for many tokens.

Several layers take turns with choices of their own, so that no cache holds what comes next. All calls of a turn are
one CUDA graph, so what is timed is the device's work; beside it stands what one call takes that Python starts. The
limit is what the memory gives a plain read.
"""

# Shapes: T tokens, D model, E experts, K choices, F hidden, R = T K routed rows.

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import expert_decode_triton as decode
from ..kernels.expert_mlp import expert_mlp, expert_mlp_reference
from ..kernels.permute import plan_rows
from ..models.config import ModelConfig
from .decode_model import shape_of
from .device import Memory, captured, seconds, started
from .rows import Row, show, write
from .timing import median_and_spread

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
_LAYERS = 4
_TURNS = 4
_WRONG = 0.02  # of the norm: what bf16 may differ by from fp32
_grouped_mm = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
Run = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x_TD, ids_TK, shares_TK, w_in_END, w_out_EDF) -> y_TD."""


def few(x_TD: Tensor, ids_TK: Tensor, shares_TK: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """What a decode step of up to 16 tokens runs."""
    return decode.expert_decode_triton(x_TD, ids_TK, shares_TK, w_in, w_out)


def many(x_TD: Tensor, ids_TK: Tensor, shares_TK: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """What any larger step runs."""
    return expert_mlp(x_TD, plan_rows(ids_TK, len(w_in)), w_in, w_out, weights_TK=shares_TK)


def grouped_mm(x_TD: Tensor, ids_TK: Tensor, shares_TK: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """torch's grouped product between a sort and its inverse, as transformers runs it."""
    if _grouped_mm is None:
        raise RuntimeError("torch has no grouped_mm here")
    ids_R = ids_TK.flatten()
    order_R = ids_R.argsort()
    counts_E = torch.zeros(len(w_in), dtype=torch.int32, device=ids_R.device)
    counts_E.scatter_add_(0, ids_R, torch.ones_like(ids_R, dtype=torch.int32))
    ends_E = counts_E.cumsum(0, dtype=torch.int32)
    z_RN = _grouped_mm(x_TD[order_R // ids_TK.shape[1]], w_in.transpose(-2, -1), offs=ends_E)
    gate_RF, up_RF = z_RN.chunk(2, -1)
    y_RD = _grouped_mm(F.silu(gate_RF) * up_RF, w_out.transpose(-2, -1), offs=ends_E)
    y_RD = y_RD * shares_TK.flatten()[order_R, None]
    y_TKD = torch.empty_like(y_RD).index_copy_(0, order_R, y_RD).view(*ids_TK.shape, -1)
    return y_TKD.sum(1).to(x_TD.dtype)


def vllm(x_TD: Tensor, ids_TK: Tensor, shares_TK: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """vLLM's Triton kernel, where it is installed."""
    from vllm.model_executor.layers.fused_moe import fused_experts  # type: ignore[import-not-found]

    return fused_experts(x_TD, w_in, w_out, shares_TK, ids_TK.int())


PEERS: dict[str, Run] = {"torch grouped_mm": grouped_mm, "vllm fused_moe": vllm}


def contenders(tokens: int) -> dict[str, Run]:
    """All that can compute so many tokens."""
    ours = {"coterie few": few} if tokens <= decode.MOST_TOKENS else {}
    return {**ours, "coterie many": many, **PEERS}


def main(
    *shapes: str,
    json: str | Path | None = None,
    quick: bool = False,
    device: str = "cuda",
    tokens: Sequence[int] | None = None,
    tiles: bool = False,
) -> list[Row]:
    """Measures shapes one after another, shows the rows and writes them to `json` after each case.

    Args:
        tiles: the kernel of a few tokens alone, with tiles of many sizes, instead of beside its peers.

    Raises:
        ValueError: there is no such shape, or one of our kernels gives wrong answers.
    """
    rows: list[Row] = []
    memory = Memory(device)
    for shape in shapes or ("olmoe", "qwen3_30b"):
        config = shape_of(shape)
        layers = [_layer(config, device) for _ in range(_LAYERS)]
        bench = Bench(shape, layers, config.moe.top_k, memory, device, 2 if quick else 9)
        for count in tokens or ((1, 16) if tiles else (1, 16, 64) if quick else TOKENS):
            for found in bench.sweep(count) if tiles else [bench.case(count, contenders(count))]:
                rows += found
                if json is not None:
                    write(rows, json)
    show(rows)
    return rows


def _layer(shape: ModelConfig, device: str) -> tuple[Tensor, Tensor]:
    """w_in (E, N, D) and w_out (E, D, F), in bf16."""
    experts, hidden, dim = shape.experts[0], shape.expert_hidden, shape.dim
    sizes = (experts, 2 * hidden, dim), (experts, dim, hidden)
    w_in, w_out = (torch.empty(size, dtype=torch.bfloat16, device=device) for size in sizes)
    return w_in.normal_(std=dim**-0.5), w_out.normal_(std=hidden**-0.5)


class Bench:
    """All cases of one shape."""

    def __init__(
        self,
        shape: str,
        layers: Sequence[tuple[Tensor, Tensor]],
        choices: int,
        memory: Memory,
        device: str,
        repeats: int,
    ) -> None:
        self._shape, self._layers, self._choices = shape, layers, choices
        self._memory, self._device, self._repeats = memory, device, repeats

    @torch.inference_mode()
    def case(self, tokens: int, runs: dict[str, Run]) -> list[Row]:
        """The rows of so many tokens. A peer that is not installed, cannot be recorded or is wrong is left out."""
        calls, distinct = self._calls(tokens)
        graphs: dict[str, Callable[[], object]] = {}
        launched: dict[str, float] = {}
        for name, run in runs.items():
            try:
                self._check(run, calls)
                graphs[name] = captured(_all(run, calls), self._device)
                launched[name] = min(started(_all(run, calls), self._device) for _ in range(3)) / len(calls)
            except Exception as error:
                if name.startswith("coterie"):
                    raise
                print(f"{self._shape} T{tokens}: without {name}: {(str(error) or repr(error)).splitlines()[0][:160]}")
        taken: dict[str, list[float]] = {name: [] for name in graphs}
        rate = self._memory.rate()
        for repeat in range(self._repeats):
            for name in list(graphs) if repeat % 2 == 0 else reversed(list(graphs)):
                taken[name].append(seconds(graphs[name], self._device))
        done = distinct * sum(w[0].nbytes for w in self._layers[0])
        rows, case = [], f"{self._shape} T{tokens}"
        for name, values in taken.items():
            speed, spread = median_and_spread([done / one / 1e9 for one in values])
            limit = rate / 1e9
            metric = "weights of chosen experts"
            rows.append(Row("experts", case, name, metric, speed, "GB/s", spread, limit, speed / limit))
            value, spread = median_and_spread([one / len(calls) * 1e6 for one in values])
            rows.append(Row("experts", case, name, "a call", value, "us", spread))
            rows.append(Row("experts", case, name, "a call that Python starts", launched[name] * 1e6, "us"))
        rows.append(Row("experts", case, "machine", "distinct experts", distinct / len(calls), "a call"))
        return rows

    def sweep(self, tokens: int) -> list[list[Row]]:
        """The kernel of a few tokens with other tiles, the fastest first; those that do not fit are left out."""
        kept, found = (decode.UP, decode.DOWN), list[list[Row]]()
        for up, down in zip(TILES, TILES, strict=True):
            decode.UP, decode.DOWN = up, down
            name = "coterie few " + "x".join(map(str, up))
            try:
                found.append(self.case(tokens, {name: few}))
            except Exception as error:
                print(f"{self._shape} T{tokens}: without {name}: {type(error).__name__}")
        decode.UP, decode.DOWN = kept
        return sorted(found, key=lambda rows: -rows[0].value)

    def _calls(self, tokens: int) -> tuple[list[tuple[Tensor, ...]], int]:
        """Operands of a turn's calls, and the experts that they visit together."""
        generator = torch.Generator().manual_seed(tokens)
        experts, dim = len(self._layers[0][0]), self._layers[0][0].shape[2]
        skewed_TE = (torch.arange(1, experts + 1) ** -0.7).expand(tokens, -1)
        calls, distinct = [], 0
        for _ in range(_TURNS):
            for w_in, w_out in self._layers:
                ids_TK = torch.multinomial(skewed_TE, self._choices, generator=generator)
                distinct += len(ids_TK.unique())
                x_TD = torch.randn(tokens, dim, generator=generator).to(self._device, torch.bfloat16)
                shares_TK = torch.rand(tokens, self._choices, generator=generator).to(self._device)
                calls.append((x_TD, ids_TK.to(self._device), shares_TK, w_in, w_out))
        return calls, distinct

    def _check(self, run: Run, calls: Sequence[tuple[Tensor, ...]]) -> None:
        """Raises ValueError for answers that are not those of a loop over the experts in fp32."""
        x_TD, ids_TK, shares_TK, w_in, w_out = calls[0]
        chosen_e, own = ids_TK.unique(return_inverse=True)
        weights = w_in[chosen_e].float(), w_out[chosen_e].float()
        plan = plan_rows(own, len(chosen_e))
        expected_TD = expert_mlp_reference(x_TD.float(), plan, *weights, weights_TK=shares_TK)
        error = (run(x_TD, ids_TK, shares_TK, w_in, w_out).float() - expected_TD).norm() / expected_TD.norm()
        if not float(error) < _WRONG:
            raise ValueError(f"its answers differ from a plain loop's by {float(error):.3g} of their norm")


TILES = (
    (16, 128, 4, 3),
    (16, 256, 4, 3),
    (32, 64, 4, 4),
    (32, 128, 2, 4),
    (32, 128, 4, 3),
    (32, 128, 4, 5),
    (32, 256, 4, 3),
    (32, 256, 8, 3),
    (64, 64, 4, 4),
    (64, 128, 4, 3),
    (64, 128, 8, 4),
    (128, 64, 4, 3),
    (128, 64, 8, 4),
)
"""Columns, depth, warps and stages."""


def _all(run: Run, calls: Sequence[tuple[Tensor, ...]]) -> Callable[[], object]:
    return lambda: [run(*operands) for operands in calls]  # type: ignore[call-arg]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time the experts of one layer on a GPU.")
    parser.add_argument("shapes", nargs="*", help="olmoe and qwen3_30b, if none is named")
    parser.add_argument("--json", type=Path, help="write the tidy rows here")
    parser.add_argument("--quick", action="store_true", help="three cases, few repeats")
    parser.add_argument("--tiles", action="store_true", help="the tiles of our kernel, instead of peers")
    given = parser.parse_args()
    main(*given.shapes, json=given.json, quick=given.quick, tiles=given.tiles)
