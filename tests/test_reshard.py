"""A run saved on any layout goes on alike on any other: weights, moments, router biases, place in the data.

A new layout is one more line of LAYOUTS. Each line goes on from the one before it, with one model also from one rank
and from the line five before. CI runs the lines of SOME, each from the one before it there and from one rank;
`pytest -m long` runs all.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ranks import Pool
from runs import batch_steps, make_trainer, small_config

from coterie.models.config import ModelConfig
from coterie.models.gpt import GPT
from coterie.models.parallelize import parallelize
from coterie.moe.config import GateConfig, MoEConfig
from coterie.parallel.launch import Ranks
from coterie.parallel.mesh import build_mesh
from coterie.train.config import OptimConfig, ParallelConfig
from coterie.train.loop import Trainer

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(600)]
SAVED, MORE = 3, 3
Row = dict[str, float]
DEGREES = ("dp_replicate", "tp", "ep", "etp")


class Layout(NamedTuple):
    """Ranks, and settings of `ParallelConfig`."""

    world: int
    settings: dict[str, Any]

    def __str__(self) -> str:
        return "-".join([str(self.world), *(f"{name}{value}" for name, value in self.settings.items())])


LAYOUTS = [
    Layout(1, {}),  # one rank, nothing sharded
    Layout(2, {}),
    Layout(2, {"tp": 2}),
    Layout(2, {"etp": 2}),
    Layout(2, {"dp_replicate": 2}),
    Layout(2, {"ep": 2, "reshard": False, "sync_every_micro": True}),
    Layout(4, {}),  # a layer of 2 experts leaves two ranks without any
    Layout(4, {"ep": 4}),
    Layout(4, {"ep": 2, "recompute": "full"}),
    Layout(4, {"tp": 2, "ep": 4}),
    Layout(4, {"tp": 2, "ep": 2, "etp": 2}),
    Layout(4, {"dp_replicate": 2, "ep": 2}),
    Layout(4, {"dp_replicate": 2, "tp": 2, "reshard": False}),
]
SOME = [LAYOUTS[line] for line in (0, 2, 5, 8, 10, 12)]
# A pyramid with residual experts, grouped queries and a tied head.
PYRAMID = ModelConfig(
    vocab_size=37,
    max_positions=16,
    layers=3,
    dim=24,
    heads=8,
    kv_heads=4,
    head_dim=6,
    hidden=40,
    qk_norm="head",
    experts=(0, 2, 4),
    moe=MoEConfig(
        top_k=2,
        hidden=16,
        residual=True,
        gate=GateConfig(aux_weight=0.05, aux_scope="sequence", z_weight=0.01, bias_update=0.01),
    ),
)
# Biases everywhere, an odd width that no second cut divides, a capacity that drops, a head of its own.
BIASED = replace(
    PYRAMID,
    layers=2,
    experts=(0, 8),
    kv_heads=0,
    activation="gelu",
    norm="layernorm",
    positions="learned",
    attention_bias="all",
    mlp_bias=True,
    qk_norm="all",
    tied_head=False,
    moe=MoEConfig(
        top_k=1,
        hidden=11,
        activation="gelu",
        bias=True,
        shared_hidden=10,
        shared_gate=True,
        gate=GateConfig(capacity_factor=1.0, min_capacity=1, aux_scope="sequence", bias_update=0.03),
    ),
)
MODELS = {"pyramid": PYRAMID, "biased": BIASED}


def fits(name: str, layout: Layout) -> bool:
    """An odd width has no slices, and a capacity counts the tokens of one rank: under tp, of half a sequence."""
    return name != "biased" or not {"tp", "etp"} & layout.settings.keys()


def _trainer(rank: int, layout: Layout, folder: Path, model: ModelConfig, seed: int) -> Trainer:
    """One sequence in a forward pass, so that capacities are alike on any number of ranks."""
    parallel = ParallelConfig(device="cpu", **layout.settings)
    config = small_config(
        folder,
        model,
        seq_len=16,
        micro_batch=1,
        steps=SAVED + MORE,
        optim=OptimConfig(lr=2e-3, min_lr=1e-4, warmup_tokens=256, eps=1e-6),
        parallel=parallel,
    )
    degrees = {name: value for name, value in layout.settings.items() if name in DEGREES}
    laid = parallelize(GPT(model, device="meta"), build_mesh("cpu", **degrees), reshard=parallel.reshard)
    laid.init_weights(seed)
    laid.recompute = parallel.recompute
    ranks = Ranks(rank, rank, layout.world, torch.device("cpu"))
    return make_trainer(config, laid, ranks, steps=_steps(config, rank, layout))


def _steps(config: Any, rank: int, layout: Layout) -> Any:
    """The ranks of a tensor-parallel group read the same sequences."""
    tp = layout.settings.get("tp", 1)
    return batch_steps(config, rank // tp, layout.world // tp)


def _go_on(trainer: Trainer, steps: int) -> list[Row]:
    """Losses and gradient norm of the next steps."""
    data, found = iter(trainer.steps(trainer.progress.samples)), []
    for _ in range(steps):
        totals = trainer.step(data)
        dropped = sum(float(layer.asked_E.sum() - layer.kept_E.sum()) for layer in totals.stats)
        found.append({**totals.losses, "norm": totals.norm, "dropped": dropped})
    return found


def _train_and_save(
    rank: int, world: int, folder: str, name: str, settings: dict[str, Any]
) -> list[dict[str, float]]:
    """Saves after SAVED steps and tells of the MORE that follow."""
    trainer = _trainer(rank, Layout(world, settings), Path(folder), MODELS[name], seed=5)
    _go_on(trainer, SAVED)
    assert any(bias_E.any() for _, bias_E in trainer.model.named_buffers()), "a lost bias would not be seen"
    trainer.save()
    assert trainer.checkpoints.wait() is None
    return _go_on(trainer, MORE)


def _resume(
    rank: int, world: int, folder: str, name: str, settings: dict[str, Any], checkpoints: list[str]
) -> list[list[Row]]:
    """From each checkpoint the MORE steps that follow, on one model: what a load leaves as it was would be seen."""
    trainer = _trainer(rank, Layout(world, settings), Path(folder), MODELS[name], seed=6)
    found = []
    for path in checkpoints:
        trainer.config = replace(trainer.config, checkpoint=replace(trainer.config.checkpoint, resume=path))
        trainer.resume()
        assert trainer.progress.step == SAVED
        found.append(_go_on(trainer, MORE))
    return found


class Runs:
    """Saved runs, made when first asked for, on ranks that stay."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pools = {world: Pool(world) for world in {layout.world for layout in LAYOUTS}}
        self.saved = cache(self._saved)

    def _saved(self, name: str, line: str) -> tuple[str, list[Row]]:
        """A layout's checkpoint, and how it went on itself."""
        layout = next(layout for layout in LAYOUTS if str(layout) == line)
        home = self.folder / name / line
        told = self.pools[layout.world].run(_train_and_save, str(home), name, layout.settings)[0]
        return str(home / "checkpoints" / f"step_{SAVED:08d}"), told


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    made = Runs(tmp_path_factory.mktemp("reshard"))
    yield made
    for pool in made.pools.values():
        pool.close()


def check(runs: Runs, name: str, layout: Layout, among: list[Layout], back: tuple[int, ...], folder: Path) -> None:
    """`layout` goes on from those so many lines before it, and from one rank, as they went on themselves."""
    lines = [str(one) for one in among if fits(name, one)]
    here = lines.index(str(layout))
    sources = sorted({lines[here - n] for n in back} | ({lines[0]} if name != "biased" else set()))
    saved = {source: runs.saved(name, source) for source in sources}
    paths = [path for path, _ in saved.values()]
    told = runs.pools[layout.world].run(_resume, str(folder), name, layout.settings, paths)[0]
    for (source, (_, expected)), found in zip(saved.items(), told, strict=True):
        for step, (there, here) in enumerate(zip(expected, found, strict=True), SAVED + 1):
            for term, value in there.items():
                assert here[term] == pytest.approx(value, rel=1e-6 if term != "norm" else 1e-5), (
                    f"{source} -> {layout}, step {step}: {term} is {here[term]!r}, not {value!r}"
                )


def cases(layouts: list[Layout]) -> list[tuple[str, Layout]]:
    return [(name, layout) for name in MODELS for layout in layouts if fits(name, layout)]


@pytest.mark.parametrize(("name", "layout"), cases(SOME), ids=str)
def test_some_layouts_go_on_from_others(runs: Runs, name: str, layout: Layout, tmp_path: Path) -> None:
    check(runs, name, layout, SOME, (1,), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(("name", "layout"), cases(LAYOUTS), ids=str)
def test_any_layout_goes_on_from_any_other(runs: Runs, name: str, layout: Layout, tmp_path: Path) -> None:
    check(runs, name, layout, LAYOUTS, (1,) if name == "biased" else (1, 5), tmp_path)


def test_the_runs_put_to_the_test_what_they_should(runs: Runs) -> None:
    """Something is dropped, losses move, and steps differ by far more than the tolerance."""
    for name in MODELS:
        _, told = runs.saved(name, "1")
        assert (sum(row["dropped"] for row in told) > 0) == (name == "biased")
        losses = [row["loss"] for row in told]
        assert min(abs(a - b) for a, b in pairwise(losses)) > 1e-3
