"""`coterie bench placement`: the planner beside DeepSeek's EPLB and round robin, judged on unseen steps.

Every placement is made from the first half of the routes and judged on the second. All have as many copies. Peers
deal the tokens of an expert to its copies in turn; `eplb, our routing` is EPLB's placement with our choice of copies,
and so tells how much of the difference is routing. Small cases are solved exactly as well, in window.
"""

# Shapes: S steps, L layers, R ranks, E experts.

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..infer.placement import Cluster, round_robin
from ..infer.placement_plan import plan
from ..infer.placement_score import DECODE, PREFILL, Aim, crossings, rank_activated, rank_tokens, score
from ..infer.replicas import spread
from ..infer.routes import Routes, load
from .placement_exact import exact
from .placement_page import Part
from .placement_page import write as write_page
from .placement_peers import dealt_activated, dealt_targets, eplb
from .placement_routes import Kind, Source
from .rows import Row, show, write

BENCH = "placement"
KINDS: tuple[Kind, ...] = ("steady", "drifting", "bursty")
ZIPF = (0.6, 1.0, 1.4)
UNITS = {"imbalance": "max/mean", "activated": "experts", "crossings": "nodes/token", "following": "nodes/token"}
AIMS = {"prefill": PREFILL, "decode": DECODE}
JUDGED = {"prefill": "imbalance", "decode": "activated"}
"""What a kind of step is judged by; both also by crossings."""


@dataclass(frozen=True)
class Shape:
    """A layer's experts and where they go. `decodes`: tokens of a decode step."""

    experts: int
    top_k: int
    cluster: Cluster
    decodes: int

    @property
    def name(self) -> str:
        c = self.cluster
        return f"E{self.experts} k{self.top_k} on {c.nodes}x{c.ranks} ranks of {c.slots}"


SHAPES = (
    Shape(8, 2, Cluster(2, 2, 3), 8),
    Shape(64, 8, Cluster(2, 4, 9), 32),
    Shape(128, 8, Cluster(4, 4, 9), 64),
    Shape(256, 8, Cluster(4, 8, 9), 128),
    Shape(256, 8, Cluster(8, 8, 5), 128),
)
SOLVED = ((8, 2, 4, 2, 8), (8, 2, 4, 3, 6), (12, 2, 3, 4, 8), (12, 3, 4, 4, 4), (16, 4, 4, 4, 6))
"""(experts, choices, ranks, slots, steps)"""


@dataclass(frozen=True)
class Contender:
    """Copies (L, R, E), and how it chooses among them."""

    copies_LRE: np.ndarray
    targets: Callable[[np.ndarray], np.ndarray]
    activated: Callable[[np.ndarray, np.ndarray], np.ndarray]

    def numbers(self, routes: Routes, nodes: int) -> dict[str, float]:
        """By metric, means over layers and those steps that have tokens."""
        even, read = [], []
        for layer, copies_RE in enumerate(self.copies_LRE):
            loads_SE = routes.loads_SLE[:, layer]
            loads_SE = loads_SE[loads_SE.any(1)]
            tokens_SR = rank_tokens(loads_SE, copies_RE)
            even.append((tokens_SR.max(1) / tokens_SR.mean(1)).mean())
            read.append(self.activated(loads_SE, copies_RE).max(1).mean())
        targets_LPE = np.stack([self.targets(copies_RE) for copies_RE in self.copies_LRE])
        where = (routes.sampled_LTK, targets_LPE, nodes)
        both = (crossings(*where), crossings(*where, follow=True))
        return dict(zip(UNITS, (float(np.mean(even)), float(np.mean(read)), *both), strict=True))


def contenders(window: Routes, cluster: Cluster, aim: Aim) -> Iterator[tuple[str, Contender]]:
    """By name; all planned from `window` alone."""

    def near(held_RE: np.ndarray) -> np.ndarray:
        return spread(held_RE, cluster.nodes)

    tokens_LE = window.loads_SLE.sum(0, dtype=np.int64)
    slots = cluster.world * cluster.slots
    theirs = [
        eplb(t[:n], slots, cluster.nodes, cluster.world) for t, n in zip(tokens_LE, window.experts, strict=True)
    ]
    copies_LRE = np.stack([np.pad(c, ((0, 0), (0, tokens_LE.shape[1] - c.shape[1]))) for c in theirs])
    start = round_robin(window.experts, cluster).held_LRE.astype(np.int64)
    yield "round robin", Contender(start, dealt_targets, dealt_activated)
    yield "eplb", Contender(copies_LRE, dealt_targets, dealt_activated)
    yield "eplb, our routing", Contender(copies_LRE.clip(max=1), near, rank_activated)
    yield "coterie", Contender(plan(window, cluster, aim).held_LRE, near, rank_activated)


def judged(case: str, routes: Routes, cluster: Cluster, aim: Aim) -> list[Row]:
    """The rows of one recording: planned on its first half, judged on its second."""
    return _judged(case, routes, cluster, aim)[0]


def _judged(case: str, routes: Routes, cluster: Cluster, aim: Aim) -> tuple[list[Row], Routes, dict[str, Contender]]:
    half = len(routes) // 2
    found, unseen = dict(contenders(routes.part(slice(0, half)), cluster, aim)), routes.part(slice(half, None))
    rows = []
    for name, contender in found.items():
        told = contender.numbers(unseen, cluster.nodes)
        rows += [Row(BENCH, case, name, metric, value, UNITS[metric]) for metric, value in told.items()]
    return rows, unseen, found


def synthetic(shape: Shape, quick: bool) -> Iterator[Row]:
    """Prefill and decode steps of each kind of routes."""
    layers, steps = (1, 16) if quick else (3, 64)
    for zipf in ZIPF[1:2] if quick else ZIPF:
        for kind in KINDS:
            for part, aim in AIMS.items():
                tokens = shape.decodes if part == "decode" else 4096
                source = Source(shape.experts, shape.top_k, layers, zipf, kind, tokens, steps, part == "prefill")
                yield from judged(f"{part}, {shape.name}, zipf {zipf} {kind}", source.routes(), shape.cluster, aim)


def recorded(path: Path, cluster: Cluster, page: Path | None = None) -> Iterator[Row]:
    """Steps without prompts are judged as decodes, those with some as prefill; drawn on `page`."""
    routes, parts = load(path), []
    for part, aim in AIMS.items():
        some = routes.part((routes.prompts_S > 0) == (part == "prefill"))
        if len(some) >= 2:
            rows, unseen, found = _judged(f"{part}, {path.name}", some, cluster, aim)
            parts.append(Part(part, unseen, found["round robin"].copies_LRE, found["coterie"].copies_LRE, rows))
            yield from rows
    if not parts:
        raise ValueError(f"{path} has too few steps to plan on one half of them and judge on the other")
    if page is not None:
        write_page(page, path.name, cluster, parts)


def solved(quick: bool, seconds: float = 20.0) -> Iterator[Row]:
    """The planner over the proven optimum, in window, without nodes."""
    for E, K, R, C, S in SOLVED[:1] if quick else SOLVED:
        for zipf in ZIPF[1:2] if quick else ZIPF:
            for part, aim in AIMS.items():
                tokens = 256 if part == "prefill" else max(4, 2 * E // K)
                routes = Source(E, K, 1, zipf, "bursty", tokens, S).routes()
                best = exact(routes.loads_SLE[:, 0], R, C, part, seconds)  # type: ignore[arg-type]
                value = getattr(score(plan(routes, Cluster(1, R, C), aim), routes), part)
                case = f"optimum, {part}, E{E} k{K} on {R} ranks of {C}, {S} steps, zipf {zipf}"
                limit = None if best is None else best[1]
                fraction = None if best is None else best[1] / value
                yield Row(BENCH, case, "coterie", "cost", value, "summed", limit=limit, fraction=fraction)


def plan_times(quick: bool, repeats: int = 7) -> Iterator[Row]:
    """Seconds to plan DeepSeek-V3's layers on 64 ranks."""
    layers = 4 if quick else 58
    case = f"plan time, E256 x {layers} layers on 8x8 ranks of 5"
    source, cluster = Source(256, 8, layers, 1.0, "steady", 256, 32, True), Cluster(8, 8, 5)
    routes = source.routes()
    start = time.perf_counter()
    _ = routes.pairs_LEE
    yield Row(BENCH, case, "coterie", "counting pairs", 1e3 * (time.perf_counter() - start), "ms")
    aims = {
        "prefill": PREFILL,
        "decode": DECODE,
        "prefill, one node's links": Aim(crossings=0),
        "decode, one node's links": Aim(0, 1, 0),
    }
    for name, aim in aims.items():
        took = []
        for _ in range(repeats):
            start = time.perf_counter()
            plan(routes, cluster, aim)
            took.append(1e3 * (time.perf_counter() - start))
        low, middle, high = statistics.quantiles(took, n=4)
        yield Row(BENCH, case, "coterie", f"plan, {name}", middle, "ms", spread=(high - low) / 2, limit=50.0)


def summary(rows: list[Row]) -> list[Row]:
    """coterie over each peer by kind of step and shape: geometric mean and worst of the routes."""
    found = {(row.case, row.impl, row.metric): row.value for row in rows if row.metric in UNITS}
    groups: dict[str, list[str]] = {}
    for case in dict.fromkeys(case for case, _, _ in found):
        groups.setdefault(", ".join(case.split(", ")[:2]), []).append(case)
    out = []
    for group, cases in groups.items():
        for peer in ("round robin", "eplb", "eplb, our routing"):
            for metric in (JUDGED[group.split(",")[0]], "crossings", "following"):
                ratios = [found[c, "coterie", metric] / found[c, peer, metric] for c in cases]
                told = {"mean": float(np.exp(np.mean(np.log(ratios)))), "worst": max(ratios)}
                out += [Row(BENCH, f"all {group}", f"over {peer}", f"{metric} {k}", v, "x") for k, v in told.items()]
    return out


def main(
    json: str | Path | None = None,
    quick: bool = False,
    routes: Path | None = None,
    cluster: Cluster | None = None,
    html: Path | None = None,
) -> list[Row]:
    """Runs all of it, shows the summary, and writes the rows to `json`, after each part.

    Args:
        quick: one shape, few steps.
        routes: a recorded file, judged in place of all else.
        cluster: where its experts go.
        html: a page about it.
    """
    if html is not None and routes is None:
        raise ValueError("the page is of recorded routes: give their file too")
    rows: list[Row] = []
    if routes is not None:
        rows += recorded(routes, cluster or Cluster(2, 4, 9), html)
    else:
        parts = [synthetic(shape, quick) for shape in (SHAPES[1:2] if quick else SHAPES)]
        for part in (solved(quick), *parts, plan_times(quick)):  # the first needs scipy, and says so at once
            rows += part
            if json is not None:
                write(rows, json)
    rows += summary(rows)
    if json is not None:
        write(rows, json)
    show([row for row in rows if routes is not None or row.metric not in UNITS])
    return rows
