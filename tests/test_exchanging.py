"""The settings of exchanges: what they refuse, what auto takes, and what a run writes of its traffic."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from ranks import run_ranks
from runs import make_trainer, small_config, small_model
from torch import nn

from coterie.models.gpt import GPT
from coterie.models.parallelize import parallelize
from coterie.moe.dispatch import AllToAllDispatch
from coterie.moe.exchanging import Dispatchers, Exchanging
from coterie.parallel import cost
from coterie.parallel.exchange import Flat
from coterie.parallel.exchange_dedup import EXCHANGES
from coterie.parallel.launch import Ranks
from coterie.parallel.mesh import build_mesh
from coterie.parallel.traffic import Nodes
from coterie.train.config import ParallelConfig, TrainConfig, check
from coterie.train.metrics import read_metrics

KINDS = {
    "flat": Exchanging("flat", ranks_per_node=1),
    "chunks": Exchanging("flat", chunks=2, ranks_per_node=1),
    "hierarchical": Exchanging("hierarchical", ranks_per_node=1),
    "deduplicated": Exchanging("deduplicated", ranks_per_node=1),
    "one node": Exchanging(),
}


def _config(folder: Path, **parallel: Any) -> TrainConfig:
    """Layers of 2 and 4 experts; two micro-batches a step."""
    model = small_model(capacity_factor=1.0, min_capacity=1)
    base = small_config(folder, model, steps=3, eval_every=2, eval_batches=1)
    return replace(base, parallel=ParallelConfig(**{"ep": 2, **parallel}))


def _runs(rank: int, world: int, folder: str) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for kind, settings in KINDS.items():
        results[kind] = _run(rank, world, Path(folder) / kind, settings)
    lines = logging.getLogger("coterie")
    lines.setLevel(logging.INFO)
    keep = _Keep()
    lines.addHandler(keep)
    auto = _model(Exchanging(ranks_per_node=1, tokens=20), _config(Path(folder)))
    one = _model(Exchanging(), _config(Path(folder)))
    results["auto"] = [type(layer.exchange).__name__ for layer in _dispatches(auto)]
    results["said"] = keep.said
    results["one"] = [type(layer.exchange).__name__ for layer in _dispatches(one)]
    try:
        Dispatchers(Exchanging(ranks_per_node=1 + rank))
        results["refused"] = ""
    except ValueError as error:
        results["refused"] = str(error)
    return results


class _Keep(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def _model(settings: Exchanging, config: TrainConfig) -> GPT:
    model = parallelize(GPT(config.model, device="meta"), build_mesh("cpu", ep=2), exchanging=settings)
    model.init_weights(7)
    return model


def _dispatches(model: nn.Module) -> list[AllToAllDispatch]:
    found = [getattr(module, "dispatch", None) for module in model.modules()]
    return [one for one in found if isinstance(one, AllToAllDispatch)]


def _run(rank: int, world: int, folder: Path, settings: Exchanging) -> dict[str, Any]:
    """A run with evaluations; the routes of its training passes."""
    config = _config(folder)
    model = _model(settings, config)
    routes: list[torch.Tensor] = []

    def note(gate: nn.Module, _: Any, routing: Any) -> None:
        if gate.training:
            routes.append(routing.ids_TK)

    for block in model.blocks:
        if block.moe is not None:  # type: ignore[union-attr]
            block.moe.gate.register_forward_hook(note)  # type: ignore[union-attr]
    ranks = Ranks(rank, rank, world, torch.device("cpu"))
    trainer = make_trainer(config, model, ranks, valid=lambda: next(trainer.steps(0)))
    trainer.run()
    return {"routes": routes, "chunks": [layer.chunks for layer in _dispatches(model)]}


@pytest.mark.dist
def test_a_run_writes_what_its_exchanges_sent(tmp_path: Path) -> None:
    results = run_ranks(_runs, 2, str(tmp_path))
    rows = {kind: read_metrics(tmp_path / kind) for kind in KINDS}
    assert results[0]["chunks"]["chunks"] == [1, 2], "a rank with one expert takes one chunk"
    for kind in KINDS:
        assert [row["loss"] for row in rows[kind]] == [row["loss"] for row in rows["flat"]]
        sent = [row["sent"] for row in rows[kind]]
        if kind == "chunks":
            assert [s["inter_bytes"] for s in sent] == [row["sent"]["inter_bytes"] for row in rows["flat"]]
            assert sent[0]["inter_messages"] > rows["flat"][0]["sent"]["inter_messages"]
        else:
            assert sent == _expected([r[kind]["routes"] for r in results], kind)
    assert [row["sent"] for row in rows["flat"]] != [row["sent"] for row in rows["deduplicated"]]
    for result in results:
        assert result["one"] == ["Flat", "Flat"], "one node has nothing to choose"
        assert result["auto"] == results[0]["auto"]
        assert [said.split(":")[0] for said in result["said"]] == [
            "2 experts on 2 nodes of 1 ranks",
            "4 experts on 2 nodes of 1 ranks",
        ]
        for name, said in zip(result["auto"], result["said"], strict=True):
            assert f"exchange {name.lower()} (" in said
        assert "1 on one node and 2 on another: give parallel.ranks_per_node" in result["refused"]


def _expected(routes: list[list[torch.Tensor]], kind: str) -> list[dict[str, int]]:
    """Rank 0's counts of every step, by the formulas."""
    nodes = Nodes(1, 2) if kind == "one node" else Nodes(2, 1)
    steps, passes = [], list(zip(*routes, strict=True))
    for first in range(0, len(passes), 4):  # two micro-batches of two layers
        total = {f"{link}_{name}": 0 for link in ("self", "intra", "inter") for name in ("messages", "bytes")}
        for layer, ids in enumerate(passes[first : first + 4]):
            experts = (2, 4)[layer % 2]
            batch = cost.Batch(0, 24, 2, experts)
            routed = cost.observe([i.numpy() for i in ids], experts, nodes)
            matrices = cost.phases("flat" if kind == "one node" else kind, routed, nodes, batch)
            for link, (messages, size) in cost.sent(matrices, nodes, 0).items():
                total[f"{link}_messages"] += messages
                total[f"{link}_bytes"] += size
        steps.append(total)
    return steps


def test_the_settings_name_all_exchanges() -> None:
    names = get_args(get_type_hints(ParallelConfig)["exchange"])
    assert names == ("auto", *EXCHANGES)
    assert EXCHANGES["flat"] is Flat


@pytest.mark.parametrize(
    ("parallel", "sentence"),
    [
        ({"chunks": 0}, "parallel.chunks is 0: give 1 or more"),
        ({"chunks": 3, "ep": 1}, ""),
        ({"chunks": 2}, ""),
        ({"chunks": 4, "ep": 2}, ""),
        ({"ranks_per_node": -1}, "parallel.ranks_per_node is -1: give 0 or more"),
    ],
)
def test_settings_are_checked_before_a_run(parallel: dict, sentence: str, tmp_path: Path) -> None:
    config = _config(tmp_path, **parallel)
    if not sentence:
        check(config, 2)
        return
    with pytest.raises(ValueError, match=sentence):
        check(config, 2)


def test_chunks_must_divide_a_ranks_experts(tmp_path: Path) -> None:
    config = _config(tmp_path, chunks=2)
    model = replace(config.model, experts=(0, 2, 6))
    with pytest.raises(ValueError, match="the 3 experts of a rank do not divide into 2 chunks: give another number"):
        check(replace(config, model=model), 2)
