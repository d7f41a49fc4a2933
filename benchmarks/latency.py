"""`coterie bench latency`: DeepSpeed-MoE's latency table on paper. Nothing is measured.

Its five models on its clusters of A100s, beside what it says, and the same on H200s.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ..infer.latency import Step, predict
from ..infer.latency_ways import Pace, Served
from ..models.presets import PRESETS
from ..parallel.cost import Links
from ..parallel.layout import Layout, fill
from ..train.machines import MACHINES, Machine
from .rows import Row, write

NODE = 8
ASKED = Served(sequences=8, context=178, node=NODE)
"""Prompts of 128 tokens and answers of 100, at their middle."""
REACHED = 0.8
"""Of the data sheet's memory rate and FLOP/s."""
CALL = 4e-6
"""Seconds of an operation in a CUDA graph beyond its bytes."""


class Case(NamedTuple):
    """A model of the paper on a number of GPUs."""

    model: str
    tp: int
    """The paper's degree of tensor slicing."""
    gpus: tuple[int, ...]
    paper: str = ""
    """Its latency, at the greatest number."""


CASES = (
    Case("gpt-1.3b-moe-128", 1, (8, 16, 32, 64)),
    Case("gpt-2.4b-moe-128", 1, (128,)),
    Case("gpt-8b-moe-128", 4, (128,)),
    Case("gpt-24b-moe-128", 8, (128, 256), "under 25"),
    Case("gpt-47b-moe-128", 8, (256,)),
)
GPUS = ("a100-80", "h200")


def pace_of(machine: Machine) -> Pace:
    """What a decode step reaches of a GPU's data sheet."""
    links = Links(machine.intra, machine.inter)
    return Pace(machine.memory_rate * REACHED, machine.bf16 * REACHED, links, machine.rings, call=CALL)


def layout_of(case: Case, gpus: int) -> Layout:
    """128 experts over as many GPUs, each cut into slices over those beyond."""
    return fill(gpus, tp=case.tp, ep=min(gpus, 128), etp=max(1, gpus // 128))


def step_of(case: Case, gpus: int, machine: Machine, exchange: str = "auto", sequences: int = 8) -> Step:
    """The prediction for one line of the table. `sequences`: of a lane."""
    asked = ASKED._replace(exchange=exchange, sequences=sequences)
    return predict(PRESETS[case.model](), layout_of(case, gpus), pace_of(machine), asked)


def table() -> str:
    """In Markdown; milliseconds."""
    heads = ["model", "GPUs", "layout", "GiB", "way", "memory", "tp", "experts", "starts", "rank 0"]
    heads += ["**step**", "flat", "1 sequence", "paper"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for case in CASES:
        for gpus in case.gpus:
            for name in GPUS:
                lines.append(_line(case, gpus, name))
    return "\n".join(lines)


def _line(case: Case, gpus: int, name: str) -> str:
    machine, layout = MACHINES[name], layout_of(case, gpus)
    step, flat, few = (step_of(case, gpus, machine, way, n) for way, n in (("auto", 8), ("flat", 8), ("auto", 1)))
    total, degrees = step.total, f"EP {layout.ep}"
    degrees += f", TP {layout.tp}" * (layout.tp > 1) + f", slices {layout.etp}" * (layout.etp > 1)
    parts = (total.compute, total.tensor, total.exchange, total.start, total.control)
    parts = (*parts, step.seconds, flat.seconds, few.seconds)
    said = case.paper if gpus == case.gpus[-1] and name.startswith("a100") else ""
    texts = (f"`{case.model}`", f"{gpus} {name}", degrees, f"{step.held / 2**30:.1f}", step.ways[0])
    return "| " + " | ".join((*texts, *(f"{part * 1e3:.1f}" for part in parts), said)) + " |"


def main(json: Path | None = None) -> None:
    """Prints the table; `json` gets each step's milliseconds."""
    print(table())
    if json is not None:
        write([_row(case, gpus, name) for case in CASES for gpus in case.gpus for name in GPUS], json)


def _row(case: Case, gpus: int, name: str) -> Row:
    """`limit`: what reading weights, keys and values takes alone."""
    step = step_of(case, gpus, MACHINES[name])
    milliseconds, limit = step.seconds * 1e3, step.total.compute * 1e3
    return Row(
        "latency",
        f"{case.model} on {gpus} {name}",
        "predicted",
        "step",
        milliseconds,
        "ms",
        limit=limit,
        fraction=limit / milliseconds,
    )
