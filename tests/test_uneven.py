"""Ranks with bad gradients, less data or no tokens at all: all ranks do the same, and none waits for ever."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from runs import batch_steps, build, make_trainer, small_config, small_model

from coterie.models.parallelize import parallelize
from coterie.parallel.launch import Ranks
from coterie.parallel.mesh import build_mesh
from coterie.train.data import IGNORE, Batch
from coterie.train.loop import Trainer

pytestmark = pytest.mark.dist


def _trainer(rank: int, world: int, folder: str, **options: Any) -> Trainer:
    ranks = Ranks(rank, rank, world, torch.device("cpu"))
    config = small_config(Path(folder), small_model(bias_update=0.01), micro_batch=0, max_bad_steps=2)
    model = build(config.model)
    if world > 1:
        model = parallelize(model, build_mesh("cpu", ep=2))
    return make_trainer(config, model, ranks, **options)


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _poison_an_expert(rank: int, world: int, folder: str) -> list[Any]:
    """In step 2 the gradient of an expert that lives on the last rank alone is NaN there."""
    trainer = _trainer(rank, world, folder)
    reduce, moved = trainer._reduce, []

    def poison(*arguments: Any) -> Any:
        if rank == world - 1 and trainer.progress.step == 1:
            experts = trainer.model.blocks[2].moe.experts  # type: ignore[union-attr,index]
            _local(experts.w_in.grad)[-1].fill_(math.nan)
        return reduce(*arguments)

    trainer._reduce = poison  # type: ignore[method-assign]
    data = trainer.steps(0)
    for _ in range(3):
        before = {n: _local(t).clone() for n, t in trainer.model.state_dict().items()}
        totals = trainer.step(data)
        same = [torch.equal(_local(t), before[n]) for n, t in trainer.model.state_dict().items()]
        moved.append([totals.finite, all(same)])
    return [moved, trainer.progress.skipped, trainer.progress.samples]


def test_a_bad_gradient_of_one_ranks_expert_skips_the_step_everywhere(tmp_path: Path) -> None:
    expected = [[[True, False], [False, True], [True, False]], 1, 24]
    assert run_ranks(_poison_an_expert, 2, str(tmp_path)) == [expected] * 2


def _end_early(rank: int, world: int, folder: str, length: int) -> str:
    """The last rank's data ends after `length` steps."""
    plain = batch_steps(small_config(Path(folder), micro_batch=0), rank, world)

    def steps(consumed: int) -> Any:
        for n, step in enumerate(plain(consumed)):
            if rank == world - 1 and n == length:
                return
            yield step

    trainer = _trainer(rank, world, folder, steps=steps)
    try:
        trainer.run()
    except ValueError as error:
        return str(error)
    return "went on"


def test_data_that_ends_on_one_rank_ends_the_run_on_all(tmp_path: Path) -> None:
    said = run_ranks(_end_early, 2, str(tmp_path), 2)
    assert said[0] == said[1]
    assert said[0].startswith("the data ended after step 2 of 6, at 16 samples:")


def _pad(rank: int, world: int, folder: str, batch: int) -> list[Any]:
    """The second half of every step's samples is padding: with two ranks, all that the last one has."""
    plain = batch_steps(small_config(Path(folder), micro_batch=0), rank, world)

    def steps(consumed: int) -> Any:
        for (one,) in plain(consumed):
            valid = torch.ones_like(one.tokens_BS, dtype=torch.bool)
            valid[max(0, batch // 2 - rank * len(valid)) :] = False
            yield [Batch(one.tokens_BS, one.targets_BS.where(valid, IGNORE), valid)]

    trainer = _trainer(rank, world, folder, steps=steps)
    data = trainer.steps(0)
    totals = [trainer.step(data) for _ in range(3)]
    return [[t.norm, *t.losses.values(), *(s.asked_E.tolist() for s in t.stats)] for t in totals]


def test_a_rank_without_tokens_takes_part(tmp_path: Path) -> None:
    alone = _pad(0, 1, str(tmp_path / "alone"), 8)
    together = run_ranks(_pad, 2, str(tmp_path / "together"), 8)
    assert together[0] == together[1]
    for one, two in zip(alone, together[0], strict=True):
        assert two[:4] == pytest.approx(one[:4], rel=1e-5)
        assert two[4:] == one[4:]
        assert sum(one[4]) == 4 * 10 * 2, "half of the samples, two choices each"
