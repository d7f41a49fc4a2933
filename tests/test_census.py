"""The census of collectives: kinds, bytes, waiting; and the benchmark that reads it."""

import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from coterie.benchmarks import layouts
from coterie.models.config import ModelConfig
from coterie.moe.config import MoEConfig
from coterie.parallel import tensor
from coterie.parallel.census import Census
from coterie.parallel.collectives import all_reduce_sum


def count(rank: int, world: int) -> dict:
    """What each collective is counted as, also in backward."""
    group = dist.group.WORLD
    x_BsD = torch.ones(2, 4, 6, requires_grad=True)
    with Census() as census:
        y = tensor.gather_sequence(x_BsD, group)
        y.sum().backward()
        all_reduce_sum(torch.ones(10))
        uneven = [3, 1] if rank == 0 else [2, 5]
        back = [3, 2] if rank == 0 else [1, 5]
        dist.all_to_all_single(torch.empty(sum(back), 7), torch.ones(sum(uneven), 7), back, uneven)
    found = {kind: list(moved) for kind, moved in census.moved.items()}
    with Census(timed=True) as census:
        time.sleep(0.3 * rank)
        all_reduce_sum(torch.ones(10))
    return {"moved": found, "wait": census.wait, "exchange": census.exchange, "idle": [*Census().moved["all_reduce"]]}


@pytest.mark.dist
def test_collectives_are_counted_and_timed() -> None:
    for rank, found in enumerate(run_ranks(count, 2)):
        row = 7 * 4
        assert found["moved"] == {
            "all_gather": [1, 2 * 4 * 6 * 4],
            "reduce_scatter": [1, 2 * 4 * 6 * 4],
            "all_reduce": [1, 10 * 4],
            "all_to_all": [1, (1 if rank == 0 else 2) * row],
        }
        assert found["idle"] == [0, 0]
        assert found["exchange"] > 0
        assert (found["wait"] > 0.2) == (rank == 0), "the other rank is late"


@pytest.mark.dist
def test_the_benchmark_of_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(
        vocab_size=64, max_positions=16, layers=2, dim=16, heads=2, experts=(0, 4), moe=MoEConfig(hidden=16)
    )
    contender = partial(layouts.Contender, world=2)
    contenders = (contender("dp", degrees={}), contender("tp", degrees={"tp": 2, "ep": 2}, chunks=2))
    rows = layouts._measure(layouts.Case("small", config, 4, 16, contenders), 2)
    found = {(row.impl, row.metric): row.value for row in rows}
    assert found["dp", "step"] > 0
    assert ("dp", "all_to_all calls") not in found
    # Counts, and two pieces each way, forward and backward.
    assert found["tp", "all_to_all calls"] == 1 + 2 * 2 * 2
    assert found["tp", "reduce_scatter bytes"] > 0
    monkeypatch.setattr(layouts, "_build", unequal)
    with pytest.raises(ValueError, match="the losses of small differ"):
        layouts._measure(layouts.Case("small", config, 4, 16, contenders), 2)


def unequal(rank: int, world: int, contender: tuple, *_: object) -> float:
    return float(len(contender[0]) + rank + len(contender[2]))
