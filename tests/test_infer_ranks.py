"""One model on several ranks gives the tokens that one rank gives, under every layout and every exchange."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engines
import pytest
import torch
from ranks import Pool

from coterie.infer.config import EngineConfig
from coterie.infer.engine import Engine
from coterie.infer.ranks import follow
from coterie.models.weights import save_model
from coterie.parallel.launch import Ranks

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    save_model(folder, engines.model(), engines.tokenizer())
    return folder


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, Pool]]:
    made = {world: Pool(world) for world in (2, 4, 8)}
    yield made
    for pool in made.values():
        pool.close()


def _settings(**settings: Any) -> EngineConfig:
    return EngineConfig(**{"block_size": 4, "budget": 24, "max_model_len": 120, "max_sequences": 8} | settings)


def _prompts(count: int) -> list[list[int]]:
    return [engines.prompt(1 + 7 * i % 53, seed=i) for i in range(count)]


def _ranks(rank: int, world: int) -> Ranks:
    return Ranks(rank, rank, world, torch.device("cpu"))


def _serve(rank: int, world: int, folder: str, settings: dict[str, Any], count: int) -> list[list[int]]:
    """Every request's tokens, on the first rank."""
    config, ranks = _settings(**settings), _ranks(rank, world)
    if rank:
        follow(folder, config, ranks)
        return []
    engine = Engine.open(folder, config, ranks)
    asked = [engines.ask(engine, prompt, 9) for prompt in _prompts(count)]
    while not engine.idle:
        engine.step()
    counts = engine.core.scheduler.counts()
    assert counts.used == counts.running == counts.waiting == 0
    engine.stop()
    return [client.tokens() for client in asked]


def _alone(folder: Path, count: int) -> list[list[int]]:
    engine = Engine.open(folder, _settings())
    asked = [engines.ask(engine, prompt, 9) for prompt in _prompts(count)]
    engines.drain(engine)
    return [client.tokens() for client in asked]


LAYOUTS = [
    (2, {"ep": 2}),
    (2, {"tp": 2}),
    (2, {"etp": 2}),
    (2, {"tp": 2, "ep": 2}),
    (2, {"ep": 2, "exchange": "flat"}),
    (2, {"tp": 2, "ep": 2, "exchange": "flat"}),
    (4, {"ep": 4, "tp": 2}),
    (4, {"ep": 2, "etp": 2}),
    (4, {"ep": 4, "exchange": "hierarchical", "ranks_per_node": 2}),
    (4, {"ep": 4, "exchange": "deduplicated", "ranks_per_node": 2}),
]


@pytest.mark.parametrize(("world", "settings"), LAYOUTS, ids=lambda x: str(x).replace("'", ""))
def test_tokens_are_those_of_one_rank(
    directory: Path, pools: dict[int, Pool], world: int, settings: dict[str, Any]
) -> None:
    got = pools[world].run(_serve, str(directory), settings, 20)[0]
    assert got == _alone(directory, 20)
