"""`coterie bench decode --shape NAME`: generation in process by a model of a published shape, with random weights.

The weights are drawn on the device, layer by layer, and pass neither the disk nor the host's memory. One engine is
asked twice: with decode steps recorded and repeated (`infer/decodes.py`), and without.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..infer.config import EngineConfig
from ..infer.engine import Engine
from ..models.gpt import GPT
from .decode import Bench, Sizes, check
from .decode_model import SHAPES, fill, shape_of
from .decode_worker import Coterie, peak_bytes
from .device import Memory
from .rows import Row, show, write

BATCHES = (1, 4, 16, 64)
_STEP = 2048  # tokens: a budget that is given is not measured


class InProcess:
    """The engine of this process, as `decode_worker.Measured`: with recorded steps, or without."""

    def __init__(self, impl: str, engine: Engine, client: Coterie, recorded: bool) -> None:
        self.impl, self.startup, self.peak = impl, 0.0, 0
        self._engine, self._client, self._recorded = engine, client, recorded

    def ask(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """See `Measured`.

        Raises:
            RuntimeError: steps were to be recorded, and cannot be.
        """
        decodes, device = self._engine.core.runner.decodes, self._engine.core.runner.device
        kept = decodes.why_not
        decodes.why_not = kept if self._recorded else "the benchmark switched it off"
        started = time.perf_counter()
        try:
            tokens, told = self._client.generate(prompts, new)
        finally:
            why, decodes.why_not = decodes.why_not, kept
        seconds = time.perf_counter() - started
        if self._recorded and why is not None:
            raise RuntimeError(f"decode steps were not recorded: {why}")
        if any(len(made) != new for made in tokens):
            raise RuntimeError(f"the engine gave other numbers of tokens than {len(prompts)} x {new}")
        self.startup = self.startup or seconds
        self.peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_bytes()
        return {"tokens": tokens, "seconds": seconds, **told}


def engine(shape: str, device: str, seed: int = 0) -> Engine:
    """An engine of random weights in bf16.

    Raises:
        ValueError: there is no such shape.
    """
    model = GPT(shape_of(shape), device=device, dtype=torch.bfloat16)
    fill(model, seed)
    return Engine(model, None, EngineConfig(budget=_STEP, prefix_cache=False))


def main(
    *shapes: str,
    json: str | Path | None = None,
    quick: bool = False,
    batches: Sequence[int] = BATCHES,
    repeats: int = 3,
    device: str | None = None,
) -> list[Row]:
    """Measures shapes one after another, shows the rows and writes them to `json` after each part.

    Raises:
        ValueError: there is no such shape, or the numbers mean nothing.
    """
    check(batches, repeats)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    sizes = Sizes(prompt=8, new=12, prefill=40) if quick else Sizes()
    rows: list[Row] = []
    for shape in shapes:
        served = engine(shape, device)
        bench = Bench(
            _contenders(served),
            Memory(device),
            served.vocabulary,
            f"{shape} bfloat16 on {device}",
            sizes,
            2 if quick else repeats,
        )
        rows = bench.run(batches, rows, lambda found: json and write(found, json))
        del served, bench
        gc.collect()  # engines and their hooks hold each other
    show(rows)
    return rows


def _contenders(served: Engine) -> list[InProcess]:
    client = Coterie(served)
    recorded, plain = (
        InProcess("coterie", served, client, True),
        InProcess("coterie, not recorded", served, client, False),
    )
    plain.ask([[1, 2, 3, 4, 5, 6, 7, 8]], 4)
    try:
        recorded.ask([[1, 2, 3, 4, 5, 6, 7, 8]], 4)
    except RuntimeError as error:
        print(f"without recorded steps: {error}")
        return [plain]
    return [recorded, plain]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Generate by models of published shapes with random weights.")
    parser.add_argument("shapes", nargs="+", choices=list(SHAPES))
    parser.add_argument("--json", type=Path, help="write the tidy rows here")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="few tokens and repeats")
    given = parser.parse_args()
    main(*given.shapes, json=given.json, device=given.device, quick=given.quick)
