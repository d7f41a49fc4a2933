"""`coterie bench layer`: one MoE layer, forward and backward, against a dense MLP of equal FLOPs and against peers.

The MoE tax is the layer's time over the dense MLP's, repeat by repeat. Weights, tokens and routing are the same for
all; each must first give the answer of a plain loop over the experts.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..parallel.launch import keep_freed_memory
from .peers import LIMIT, MAKERS, Case, Layer, disagreement, make_inputs
from .rows import Row, show, write
from .timing import interleaved, median_and_spread, ratios

BENCH = "layer"
BF16, FP32 = torch.bfloat16, torch.float32
CPU_CASES = tuple(
    Case(tokens, 512, hidden, experts, top_k, dtype)
    for tokens, hidden, experts, top_k in (
        (2048, 1024, 16, 2),
        (2048, 256, 64, 8),
        (64, 1024, 16, 2),
        (64, 256, 64, 8),
    )
    for dtype in (FP32, BF16)
)
GPU_CASES = tuple(
    Case(tokens, dim, hidden, experts, 8, BF16, "cuda")
    for tokens, dim, hidden, experts in ((8192, 2048, 1024, 64), (16384, 2048, 1024, 64), (16384, 4096, 1536, 128))
)
QUICK = (LIMIT, "coterie", "hf_grouped_mm")
SHOWN = ("forward", "forward_tax", "forward_backward", "moe_tax")


def main(json: str | Path | None = None, quick: bool = False, threads: int | None = None) -> list[Row]:
    """Measures all cases of this machine, shows the table, and writes the rows to `json`.

    quick: the first two cases, few repeats, and the fastest peer alone.
    """
    keep_freed_memory()  # as training does; for the peers too
    if threads is not None:
        torch.set_num_threads(threads)
    cases = GPU_CASES if torch.cuda.is_available() else CPU_CASES
    rows: list[Row] = []
    for case in cases[:2] if quick else cases:
        rows += measure(case, QUICK if quick else tuple(MAKERS), repeats=5 if quick else 11)
        if json is not None:
            write(rows, json)
    show([row for row in rows if row.metric in SHOWN])
    return rows


def measure(case: Case, names: tuple[str, ...], repeats: int) -> list[Row]:
    """The rows of one case. A peer that is not installed, or answers differently, is left out and named."""
    layers, x_TD = _build(case, names), make_inputs(case)[0]
    dy_TD = torch.randn_like(x_TD)
    forward = interleaved({n: _forward(layer, x_TD) for n, layer in layers.items()}, repeats, case.device)
    both = interleaved({n: _both(layer, x_TD, dy_TD) for n, layer in layers.items()}, repeats, case.device)
    rows: list[Row] = []
    for metric, tax, seconds in (("forward", "forward_tax", forward), ("forward_backward", "moe_tax", both)):
        limit = median_and_spread(seconds[LIMIT])[0]
        for name, values in seconds.items():
            value, spread = median_and_spread(values)
            ms = (value * 1e3, "ms", spread * 1e3, limit * 1e3, limit / value)
            rows.append(Row(BENCH, case.name, name, metric, *ms))
            value, spread = median_and_spread(ratios(values, seconds[LIMIT]))
            rows.append(Row(BENCH, case.name, name, tax, value, "x dense", spread, 1.0, 1 / value))
    for name, layer in layers.items():
        rows.append(Row(BENCH, case.name, name, "saved_activations", _saved(layer, x_TD) / 2**20, "MiB"))
        if case.device == "cuda":
            peak = _peak(_both(layer, x_TD, dy_TD)) / 2**20
            rows.append(Row(BENCH, case.name, name, "peak_memory", peak, "MiB"))
    return rows


def _build(case: Case, names: tuple[str, ...]) -> dict[str, Layer]:
    layers: dict[str, Layer] = {}
    for name in names:
        try:
            wrong = 0.0 if name == LIMIT else disagreement(name, case)
            if wrong > 0.01:
                raise ValueError(f"{wrong:.0%} of its tokens differ from a plain loop over the experts")
            layers[name] = MAKERS[name](case, make_inputs(case)[1])
        except Exception as error:
            if name in (LIMIT, "coterie"):
                raise
            print(f"{case.name}: without {name}: {str(error).splitlines()[0][:160] if str(error) else error!r}")
        gc.collect()
    return layers


def _forward(layer: Layer, x_TD: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.inference_mode():
            return layer.run(x_TD)

    return run


def _both(layer: Layer, x_TD: Tensor, dy_TD: Tensor) -> Callable[[], None]:
    def run() -> None:
        for parameter in layer.module.parameters():
            parameter.grad = None
        layer.run(x_TD.detach().requires_grad_()).backward(dy_TD)

    return run


def _saved(layer: Layer, x_TD: Tensor) -> int:
    """Bytes that autograd keeps between forward and backward, the parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in layer.module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y_TD = layer.run(x_TD.detach().requires_grad_())
    total = sum(kept.values())
    del y_TD
    return total


def _peak(run: Callable[[], None]) -> int:
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time one MoE layer beside its peers and the dense limit.")
    parser.add_argument("--json", type=Path, help="write the tidy rows here")
    parser.add_argument("--quick", action="store_true", help="two cases, few repeats, one peer")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    arguments = parser.parse_args()
    main(arguments.json, arguments.quick, arguments.threads)
