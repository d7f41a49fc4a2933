"""`coterie bench latency --measure`: steps of our own ranks on this machine beside what `infer/latency.py` predicts.

Each rank's memory, products and links are measured while all others do the same, then the time of a decode step. What
an operation's start takes is fitted on one rank, and grows with the ranks that share a core.
"""

from __future__ import annotations

import argparse
import json as jsonlib
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..infer.config import EngineConfig
from ..infer.engine import Engine
from ..infer.latency import Step, predict
from ..infer.latency_ways import Pace, Served
from ..infer.memory import read_rate
from ..infer.ranks import follow
from ..infer.request import SamplingParams
from ..models.config import ModelConfig
from ..models.gpt import GPT
from ..models.weights import save_model
from ..moe.config import MoEConfig
from ..parallel.collectives import all_reduce_max
from ..parallel.cost import Links
from ..parallel.launch import Ranks, init_ranks
from ..parallel.layout import fill
from ..train.clock import peak_flops
from ..train.machines import MACHINES
from .plan_probe import probe_links, with_links
from .rows import Row, show, write
from .spread import run_spread
from .timing import median_and_spread

MODEL = ModelConfig(
    vocab_size=2048, max_positions=256, layers=6, dim=512, heads=8, hidden=1024, experts=(16,) * 6,
    moe=MoEConfig(top_k=2, hidden=1024),
)  # fmt: skip
LAYOUTS: tuple[dict[str, Any], ...] = (
    {},
    {"ep": 2},
    {"tp": 2, "ep": 2},
    {"ep": 4},
    {"tp": 2, "ep": 4},
    {"ep": 8},
    {"tp": 2, "ep": 8},
)
SEQUENCES, PROMPT, STEPS = 4, 64, 40
BENCH = "latency"


def main(json: str | Path | None = None, quick: bool = False, limit_s: float = 300) -> list[Row]:
    """For every layout what was measured, what is predicted, and how far apart they are.

    Args:
        quick: the first three layouts.
        limit_s: seconds after which the ranks of a layout are ended.
    """
    rows, call = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        model = GPT(MODEL)
        model.init_weights(5)
        save_model(folder, model)
        for degrees in LAYOUTS[: 3 if quick else None]:
            world = EngineConfig(**degrees).least_ranks
            words = ["--model", folder, "--degrees", jsonlib.dumps(degrees)]
            found = run_spread("latency_measured", 1, world, words, False, limit_s)
            value, spread = median_and_spread(found["seconds"])
            share = max(1.0, world / (os.cpu_count() or 1))
            step = _predicted(found, degrees, call * share)
            if world == 1:
                call = max(0.0, value - step.total.compute) / step.total.calls
                step = _predicted(found, degrees, call)
            case = ", ".join(f"{name} {value}" for name, value in degrees.items()) or "one rank"
            rows.append(Row(BENCH, case, "coterie", "step", value * 1e3, "ms", spread * 1e3))
            rows.append(Row(BENCH, case, "formula", "step", step.seconds * 1e3, "ms", None, value * 1e3))
            rows.append(Row(BENCH, case, "formula", "error", 100 * (step.seconds / value - 1), "%"))
            if json is not None:
                write(rows, json)
    show(rows)
    return rows


def _predicted(found: dict[str, Any], degrees: dict[str, Any], call: float) -> Step:
    world = EngineConfig(**degrees).least_ranks
    on = with_links(MACHINES["cpu"], found["links"]) if world > 1 else MACHINES["cpu"]
    rings = on.rings if world > 1 else None
    pace = Pace(found["memory"], found["flops"], Links(on.intra, on.inter), rings, call)
    asked = Served(SEQUENCES, PROMPT + STEPS // 2, world, element_bytes=4)
    return predict(MODEL, fill(world, **degrees), pace, asked)


def worker(out: Path, folder: str, degrees: dict[str, Any]) -> None:
    """One rank; the first writes."""
    ranks = init_ranks("cpu")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks.world))
    config = EngineConfig(
        **degrees, budget=512, max_sequences=SEQUENCES * 8, prefix_cache=False, max_queued_requests=64
    )
    found = _machine(ranks)
    if ranks.first:
        found["seconds"] = _steps(Engine.open(folder, config, ranks), ranks.world // config.tp)
        out.write_text(jsonlib.dumps(found))
    else:
        follow(folder, config, ranks)
    ranks.shutdown()


def _machine(ranks: Ranks) -> dict[str, Any]:
    """What the slowest rank reaches while all do the same."""
    big = torch.nn.Linear(4096, 4096)
    slowest = [1 / read_rate(big), 1 / peak_flops(torch.device("cpu"), torch.float32)]
    memory, flops = all_reduce_max(torch.tensor(slowest, dtype=torch.float64)).tolist()
    links = probe_links(ranks.rank, ranks.world) if ranks.world > 1 else []
    return {"memory": 1 / memory, "flops": 1 / flops, "links": links}


def _steps(engine: Engine, lanes: int) -> list[float]:
    """Seconds of decode steps of SEQUENCES in each lane, from a step's end to the next's."""
    dice, told = torch.Generator().manual_seed(1), []
    params = SamplingParams(temperature=0.0, max_tokens=STEPS + 20, ignore_eos=True)
    for _ in range(SEQUENCES * lanes):
        prompt = torch.randint(0, MODEL.vocab_size, (PROMPT,), generator=dice).tolist()
        engine.submit(prompt, params, lambda delta: None)
    engine.watch(lambda report: told.append((report.decodes, report.seconds)))
    while not engine.idle:
        engine.step()
    engine.stop()
    seconds = [taken for decodes, taken in told if decodes == SEQUENCES * lanes][5:]
    return seconds or [statistics.median(taken for _, taken in told)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time decode steps of ranks, to hold a prediction against.")
    parser.add_argument("--worker", type=Path, required=True)
    parser.add_argument("--where", default="")
    parser.add_argument("--model", required=True)
    parser.add_argument("--degrees", required=True)
    given = parser.parse_args()
    worker(given.worker, given.model, jsonlib.loads(given.degrees))
