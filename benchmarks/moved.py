"""`coterie bench moved`: steps of a model on 2 hosts of 2 ranks, with experts where they lie at first and where a
plan puts them, there and back again in turn; beside each what `parallel/cost.py` says of the exchange. Last, decode
steps while experts move between them, beside those in which none does.

The model is random, but its tokens have topics, as those of trained ones do: tokens of a topic take the experts of
that topic, and some topics come more often. Plans are made from other prompts than those that are timed.
"""

# Shapes: L layers, R ranks, C slots, E experts, T tokens of a rank, K choices, D model.

from __future__ import annotations

import argparse
import json as jsonlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..infer.config import EngineConfig, Exchange
from ..infer.engine import Engine
from ..infer.moving import pack_pieces, pack_slots
from ..infer.outputs import Delta
from ..infer.placement import Cluster, Placement
from ..infer.placement_plan import plan
from ..infer.placement_score import PREFILL, score
from ..infer.ranks import follow
from ..infer.rearrange import targets
from ..infer.request import SamplingParams
from ..infer.routes import Recorder, Routes
from ..infer.wire import Kind
from ..models.config import ModelConfig
from ..models.gpt import GPT
from ..models.weights import save_model
from ..moe.config import MoEConfig
from ..parallel.all_to_all import Network
from ..parallel.cost import Batch, observe, phases, seconds
from ..parallel.exchange_probe import measure_rates
from ..parallel.launch import Ranks, init_ranks
from ..parallel.traffic import Nodes
from .hosts import Hosts
from .rows import Row, show, write
from .spread import run_spread
from .timing import median_and_spread

BENCH = "moved"
NODES, PER_NODE = 2, 2
TOPICS, EXPERTS, WORDS, DIM, LAYERS = 8, 32, 4096, 256, 4
LENGTH, PROMPTS = 256, 8
WAYS = ("gathered", "flat", "deduplicated")


def main(json: str | Path | None = None, quick: bool = False, netns: bool = True, limit_s: float = 300) -> list[Row]:
    """Measures, shows the table, and writes the rows to `json`.

    Args:
        quick: few repeats.
        netns: hosts are network namespaces with links of 1 ms and 1 Gbit/s; False: pretended.
        limit_s: seconds after which the ranks are ended, for each way to the experts.
    """
    if netns:
        Hosts(NODES)  # refuses at once what cannot be made
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, topical())
        for way in WAYS[1:2] if quick else WAYS:
            words = ["--way", way, "--model", folder, "--repeats", str(2 if quick else 5)]
            found = run_spread("moved", NODES, PER_NODE, words, netns, limit_s)
            rows += [*_rows(found), *_under_load(found)]
    if json is not None:
        write(rows, json)
    show(rows)
    return rows


def _rows(found: dict[str, Any]) -> list[Row]:
    case, rows, base = found["case"], [], 0.0
    for name, one in found["placements"].items():
        value, spread = median_and_spread(one["seconds"])
        base = base or value
        rows.append(Row(BENCH, case, name, "step", value * 1e3, "ms", spread * 1e3, base * 1e3, base / value))
        if one["exchange"]:
            rows.append(Row(BENCH, case, name, "exchange predicted", one["exchange"] * 1e3, "ms"))
        rows.append(Row(BENCH, case, name, "tokens, most / mean", one["imbalance"], "x"))
        rows.append(Row(BENCH, case, name, "nodes crossed to", one["crossings"], "a token and layer"))
    first, last = (found["placements"][name] for name in ("as at first", "planned"))
    if first["exchange"]:
        measured = median_and_spread(first["seconds"])[0] - median_and_spread(last["seconds"])[0]
        told = first["exchange"] - last["exchange"]
        rows.append(Row(BENCH, case, "gain", "predicted", told * 1e3, "ms", limit=measured * 1e3))
    return rows


def _under_load(found: dict[str, Any]) -> list[Row]:
    """Percentiles of decode steps; `limit`: of those in which nothing moves."""
    moving, still = (np.array(found["load"][name]) * 1e3 for name in ("moving", "still"))
    rows = []
    for percent in (50, 95, 99):
        value, base = float(np.percentile(moving, percent)), float(np.percentile(still, percent))
        case = f"{found['case']}, decoding"
        rows.append(Row(BENCH, case, "while moving", f"p{percent}", value, "ms", None, base, value / base))
    return rows


def topical() -> GPT:
    """Tokens near the centre of their topic, and experts that a topic's tokens like."""
    moe = MoEConfig(top_k=2, hidden=256)
    config = ModelConfig(
        vocab_size=WORDS, max_positions=512, layers=LAYERS, dim=DIM, heads=4, hidden=256,
        experts=(EXPERTS,) * LAYERS, moe=moe,
    )  # fmt: skip
    model, dice = GPT(config), torch.Generator().manual_seed(3)
    model.init_weights(3)
    with torch.no_grad():
        centres = torch.nn.functional.normalize(torch.randn(TOPICS, DIM, generator=dice), dim=1)
        model.embed.weight.copy_(
            centres[topic_of(torch.arange(WORDS))] + 0.03 * torch.randn(WORDS, DIM, generator=dice)
        )
        for layer, moe_layer in enumerate(model.moe_layers):
            order = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(layer))
            noise = torch.randn(EXPERTS, DIM, generator=dice)
            moe_layer.gate.weight.copy_((centres[order % TOPICS] + 0.03 * noise) * 4)
    return model


def topic_of(words: torch.Tensor) -> torch.Tensor:
    """Of token ids."""
    return words % TOPICS


def prompts(seed: int) -> list[list[int]]:
    """Each of one topic; the first topics are asked for most (Zipf)."""
    dice = torch.Generator().manual_seed(seed)
    weight = 1 / torch.arange(1, TOPICS + 1) ** 0.8
    topics = torch.multinomial(weight, PROMPTS, replacement=True, generator=dice)
    words = torch.randint(0, WORDS // TOPICS, (PROMPTS, LENGTH), generator=dice) * TOPICS + topics[:, None]
    return words.tolist()


def worker(out: Path, where: str, folder: str, way: Exchange, repeats: int) -> None:
    """One rank; the first writes."""
    ranks = init_ranks("cpu")
    torch.set_num_threads(1)
    group = torch.distributed.group.WORLD
    assert group is not None
    rates = measure_rates(Network(group))
    config = EngineConfig(
        ep=ranks.world,
        exchange=way,
        spare_experts=2,
        replan_steps=1 << 30,  # plans are followed here when it is time
        budget=LENGTH * PROMPTS,
        prefix_cache=False,
    )
    if not ranks.first:
        follow(folder, config, ranks)
    else:
        found = _measured(folder, config, ranks, rates, repeats)
        found["case"] = f"{way}, {NODES}x{PER_NODE} hosts, {where}"
        out.write_text(jsonlib.dumps(found))
    ranks.shutdown()


def _measured(folder: str, config: EngineConfig, ranks: Ranks, rates: Any, repeats: int) -> dict[str, Any]:
    """Seconds of steps under both placements, and what is said of them."""
    whole = topical().eval()
    engine = Engine.open(folder, config, ranks)
    assert engine.core.fleet is not None
    movers = engine.core.fleet.movers
    first = np.stack([slots_PC for slots_PC in movers.slots if slots_PC is not None])
    now = Placement(first, (EXPERTS,) * LAYERS, NODES)
    seen, timed = routes(whole, range(6)), range(100, 100 + 3 * repeats)
    wanted = plan(seen, Cluster(NODES, PER_NODE, first.shape[2]), PREFILL, present=now)
    placements = {"as at first": now, "planned": wanted}
    taken: dict[str, list[float]] = {name: [] for name in placements}
    for turn in range(repeats):
        for name, placement in placements.items():
            put(engine, placement)
            taken[name] += [run(engine, prompts(seed)) for seed in timed[3 * turn : 3 * turn + 3]]
    load = under_load(engine, 60 * repeats)
    engine.stop()
    judged, found = routes(whole, timed), {}
    for name, placement in placements.items():
        scored = score(placement, judged)
        found[name] = {"seconds": taken[name], "imbalance": scored.imbalance, "crossings": scored.crossings}
        found[name]["exchange"] = exchange_seconds(config.exchange, placement, judged, rates)
    return {"placements": found, "load": load}


def routes(model: GPT, seeds: Sequence[int]) -> Routes:
    """The choices of all tokens of these prompts, a step for each seed."""
    recorder = Recorder([EXPERTS] * LAYERS, 2, sampled=LENGTH * PROMPTS)
    for seed in seeds:
        with torch.inference_mode():
            out = model(torch.tensor(prompts(seed)))
        ids_LTK = torch.stack(out.routes).numpy()
        loads = np.stack([np.bincount(ids_TK.flatten(), minlength=EXPERTS) for ids_TK in ids_LTK])
        recorder.add(loads, ids_LTK, LENGTH * PROMPTS)
    return recorder.routes()


def run(engine: Engine, asked: Sequence[Sequence[int]]) -> float:
    """Seconds of one step of these prompts: an equal share of them comes to each rank, in turn."""
    told: list[float] = []
    unwatch = engine.watch(lambda report: told.append(report.seconds))
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    for prompt in asked:
        engine.submit(prompt, params, lambda delta: None)
    while not engine.idle:
        engine.step()
    unwatch()
    (taken,) = told
    return taken


def under_load(engine: Engine, steps: int) -> dict[str, list[float]]:
    """Seconds from step to step of two decodes a rank: of those between which experts move, drawn anew three times,
    and of the others."""
    replanner, dice = engine.core.replanner, np.random.default_rng(1)
    assert replanner is not None
    params = SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True)
    taken: dict[str, list[float]] = {"moving": [], "still": []}
    for step in range(steps):
        while len(engine.core.live) < 2 * NODES * PER_NODE:
            engine.submit([1 + step % TOPICS], params, _fail_on_error)
        if step % (steps // 3) == steps // 6:
            every = [dice.permutation(EXPERTS).reshape(NODES * PER_NODE, -1) for _ in range(LAYERS)]
            replanner.follow(list(enumerate(every)))
        begin, moving = time.perf_counter(), replanner.moving
        engine.step()
        taken["moving" if moving else "still"].append(time.perf_counter() - begin)
    for id in {key[0] for key in engine.core.live}:
        engine.abort(id)
    while replanner.moving or not engine.idle:
        engine.step()
        replanner.tick()
    return taken


def _fail_on_error(delta: Delta) -> None:
    assert delta.finish != "error", delta.error


def put(engine: Engine, placement: Placement) -> None:
    """Moves experts to where a placement wants them, all at once."""
    fleet = engine.core.fleet
    assert fleet is not None
    for layer, wanted_PC in enumerate(placement.slots_LRC):
        turns, slots_PC = fleet.movers.plan(layer, wanted_PC, 1 << 24)
        for turn in turns:
            fleet.say(Kind.MOVE, pack_pieces(turn))
        fleet.say(Kind.PLACE, pack_slots(layer, slots_PC))


def exchange_seconds(way: str, placement: Placement, judged: Routes, rates: Any) -> float:
    """What the formulas say that the exchanges of a step take, all layers; 0: there is none for this way."""
    if way not in ("flat", "hierarchical", "deduplicated"):
        return 0.0
    nodes, total = Nodes(NODES, PER_NODE), 0.0
    batch = Batch(LENGTH * PROMPTS // nodes.ranks, DIM, 2, EXPERTS)
    home_T = np.arange(LENGTH * PROMPTS) // LENGTH % nodes.ranks
    slots = placement.slots_LRC.shape[2]
    for ids_SMK, slots_RC in zip(judged.tokens_SMLK.transpose(2, 0, 1, 3), placement.slots_LRC, strict=True):
        target_RE = targets(slots_RC, EXPERTS, NODES)
        for ids_TK in ids_SMK:  # a slot of the rank is as good as any other for what travels
            sent = [target_RE[rank][ids_TK[home_T == rank]] * slots for rank in range(nodes.ranks)]
            routed = observe(sent, slots * nodes.ranks, nodes)
            total += seconds(phases(way, routed, nodes, batch, backward=False), nodes, rates)
    return total / len(judged)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time steps with experts where they lie at first, and as planned.")
    parser.add_argument("--worker", type=Path, required=True)
    parser.add_argument("--where", default="")
    parser.add_argument("--model", required=True)
    parser.add_argument("--way", required=True, choices=WAYS)
    parser.add_argument("--repeats", type=int, default=1)
    given = parser.parse_args()
    worker(given.worker, given.where, given.model, given.way, given.repeats)
