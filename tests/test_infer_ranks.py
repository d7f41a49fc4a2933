"""One model on several ranks gives the tokens that one rank gives, under every layout and every exchange."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import engines
import pytest
import torch
from layouts import pools
from ranks import Pool

from coterie.infer.config import EngineConfig, Exchange
from coterie.infer.engine import Engine
from coterie.infer.ranks import follow
from coterie.models.weights import save_model
from coterie.moe.by_size import WAYS, BySize
from coterie.moe.gate import Routing
from coterie.moe.gathered import Gathered, Own, Turn
from coterie.parallel.launch import Ranks

pytestmark = pytest.mark.timeout(300)
__all__ = ["pools"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    save_model(folder, engines.model(), engines.tokenizer())
    return folder


def _settings(**settings: Any) -> EngineConfig:
    return EngineConfig(**{"block_size": 4, "budget": 24, "max_model_len": 120, "max_sequences": 8} | settings)


def _prompts(count: int) -> list[list[int]]:
    return [engines.prompt(1 + 7 * i % 53, seed=i) for i in range(count)]


def _tokens(engine: Engine, count: int) -> list[Any]:
    asked = [engines.ask(engine, prompt, 9) for prompt in _prompts(count)]
    engines.drain_all(engine)
    return [client.tokens() for client in asked]


def _told(engine: Engine, count: int) -> list[Any]:
    """Seeded samples, logprobs, those of prompts, and routes: all that a step gives back."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.8, "seed": 5, "n": 3},
        {"logprobs": 2, "prompt_logprobs": 1},
        {"routes": True},
        {"repetition_penalty": 1.3},
    ]
    asked = [engines.ask(engine, p, 6, **kinds[i % len(kinds)]) for i, p in enumerate(_prompts(count))]
    engines.drain_all(engine)
    return [
        [
            client.tokens(index),
            [[one.token, one.logprob] for delta in parts for one in delta.logprobs],
            [[one.token, one.logprob] for one in parts[0].prompt_logprobs],
            [[list(ids) for ids in layers] for delta in parts for layers in delta.routes],
        ]
        for client in asked
        for index, parts in sorted(client.deltas.items())
    ]


def _moving(engine: Engine, count: int) -> list[Any]:
    """Tokens of requests that come one by one while experts move, and last how many were sent."""
    replanner, got = engine.core.replanner, []
    assert replanner is not None
    for prompt in _prompts(count):
        got.append(engines.ask(engine, prompt, 9))
        for _ in range(4):
            engine.step()
    engines.drain_all(engine)
    assert engine.core.fleet is not None
    slots = [slots_PC.tolist() for slots_PC in engine.core.fleet.movers.slots if slots_PC is not None]
    return [*(client.tokens() for client in got), [replanner.plans, replanner.moves, slots]]


CASES = {"tokens": _tokens, "told": _told, "moving": _moving}


def _serve(rank: int, world: int, folder: str, settings: dict[str, Any], case: str, count: int) -> list[Any]:
    """What a case gives, on the first rank."""
    config, ranks = _settings(**settings), Ranks(rank, rank, world, torch.device("cpu"))
    if rank:
        follow(folder, config, ranks)
        return []
    engine = Engine.open(folder, config, ranks)
    got = CASES[case](engine, count)
    got.append(engine.core.scheduler.counts().preemptions)
    engine.stop()
    return got


def _alone(folder: Path, case: str, count: int) -> list[Any]:
    return CASES[case](Engine.open(folder, _settings()), count)


LAYOUTS = [
    (2, {"ep": 2}),
    (2, {"tp": 2}),
    (2, {"etp": 2}),
    (2, {"tp": 2, "ep": 2}),
    (2, {"ep": 2, "exchange": "flat"}),
    (2, {"tp": 2, "ep": 2, "exchange": "flat"}),
    (2, {}),
    (4, {"ep": 4, "tp": 2}),
    (4, {"ep": 2, "etp": 2, "exchange": "flat"}),
    (4, {"ep": 4, "exchange": "hierarchical", "ranks_per_node": 2}),
    (4, {"ep": 4, "exchange": "deduplicated", "ranks_per_node": 2}),
]
MORE = [
    *LAYOUTS,
    (4, {"ep": 4, "tp": 2, "exchange": "gathered"}),
    (4, {"ep": 4, "tp": 2, "exchange": "deduplicated", "ranks_per_node": 2}),
    (4, {"ep": 2, "etp": 2}),
    (8, {"ep": 8, "tp": 2}),
    (8, {"ep": 4, "etp": 2, "tp": 2, "exchange": "hierarchical", "ranks_per_node": 4}),
    (8, {"ep": 8, "exchange": "flat"}),
    (8, {"ep": 8, "exchange": "deduplicated", "ranks_per_node": 2}),
    (8, {"ep": 4, "etp": 2}),
]


@pytest.mark.parametrize(("world", "settings"), LAYOUTS, ids=str)
def test_tokens_are_those_of_one_rank(
    directory: Path, pools: dict[int, Pool], world: int, settings: dict[str, Any]
) -> None:
    *got, _ = pools[world].run(_serve, str(directory), settings, "tokens", 20)[0]
    assert got == _alone(directory, "tokens", 20)


@pytest.mark.long
@pytest.mark.parametrize(("world", "settings"), MORE, ids=str)
def test_tokens_of_200_prompts(directory: Path, pools: dict[int, Pool], world: int, settings: dict[str, Any]) -> None:
    *got, _ = pools[world].run(_serve, str(directory), settings, "tokens", 200)[0]
    assert got == _alone(directory, "tokens", 200)


@pytest.mark.parametrize("settings", [{"ep": 2}, {"tp": 2, "ep": 2}], ids=str)
def test_all_that_is_told_is_that_of_one_rank(
    directory: Path, pools: dict[int, Pool], settings: dict[str, Any]
) -> None:
    *got, _ = pools[2].run(_serve, str(directory), settings, "told", 12)[0]
    expected = _alone(directory, "told", 12)
    assert len(got) == len(expected) > 12
    for (tokens, logprobs, prompt, routes), (tokens_1, logprobs_1, prompt_1, routes_1) in zip(
        got, expected, strict=True
    ):
        assert (tokens, routes) == (tokens_1, routes_1)
        for mine, its in ((logprobs, logprobs_1), (prompt, prompt_1)):
            assert [token for token, _ in mine] == [token for token, _ in its]
            assert [logprob for _, logprob in mine] == pytest.approx([logprob for _, logprob in its], abs=1e-4)


def test_sequences_give_way_in_their_own_lane(directory: Path, pools: dict[int, Pool]) -> None:
    room = 30 * 4 * engines.BLOCK
    *got, preempted = pools[2].run(_serve, str(directory), {"ep": 2, "kv_memory": room}, "tokens", 30)[0]
    assert got == _alone(directory, "tokens", 30)
    assert preempted > 0


MOVING = [
    (2, {"ep": 2, "spare_experts": 1}),
    (2, {"ep": 2, "exchange": "flat"}),
    (2, {"ep": 2, "tp": 2, "spare_experts": 2}),
    (4, {"ep": 2, "etp": 2, "spare_experts": 1, "exchange": "flat"}),
    (4, {"ep": 4, "spare_experts": 1, "ranks_per_node": 2, "exchange": "deduplicated"}),
    (4, {"ep": 4, "tp": 2, "spare_experts": 1}),
    (4, {"ep": 2, "spare_experts": 1}),
]


@pytest.mark.parametrize(("world", "settings"), MOVING, ids=str)
def test_no_token_changes_while_experts_move(
    directory: Path, pools: dict[int, Pool], world: int, settings: dict[str, Any]
) -> None:
    settings = {"replan_steps": 12, "move_bytes": 5000, **settings}
    *got, (plans, moves, slots), _ = pools[world].run(_serve, str(directory), settings, "moving", 24)[0]
    assert got == _alone(directory, "tokens", 24)
    assert plans > 0
    assert moves > 0
    for experts, where in zip((4, 8), slots, strict=True):
        assert {expert for row in where for expert in row} - {-1} == set(range(experts))


def test_experts_on_one_rank_cannot_move(directory: Path, pools: dict[int, Pool]) -> None:
    with pytest.raises(AssertionError, match="experts can move where every MoE layer has them on the same ranks"):
        pools[2].run(_serve, str(directory), {"tp": 2, "replan_steps": 5}, "tokens", 1)


@pytest.mark.parametrize(
    ("settings", "world", "why"),
    [
        ({"ep": 4, "tp": 2}, 2, "tp=2, ep=4, etp=1 need 4 ranks or a multiple of them, not 2"),
        ({"ep": 3}, 2, "need 3 ranks"),
        ({"draft": "somewhere"}, 2, "a draft model guesses on one rank alone"),
        ({"replan_steps": 9}, 1, "experts move between ranks: give ep over 1"),
        ({"spare_experts": 1}, 1, "experts move between ranks: give ep over 1"),
    ],
    ids=str,
)
def test_ranks_that_do_not_fit_are_refused(settings: dict[str, Any], world: int, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        _settings(**settings).check_ranks(world)


def test_several_ranks_are_not_forgotten(directory: Path) -> None:
    with pytest.raises(ValueError, match="need 2 ranks or a multiple of them, not 1"):
        Engine.open(directory, _settings(ep=2))


def test_an_exchange_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="exchange 'wild' is not one of auto, gathered, flat"):
        _settings(exchange="wild")
    assert get_args(Exchange) == ("auto", *WAYS)


def _wrong(rank: int, world: int) -> list[str]:
    """What is said of wrong tokens and wrong placements."""
    group = torch.distributed.group.WORLD
    assert group is not None
    turn, own, told = Turn(), Own(group, 4), []
    ids_TK = torch.zeros(3, 1, dtype=torch.int64)
    routing = Routing(ids_TK, ids_TK, torch.ones(3, 1), *[None] * 3)  # type: ignore[arg-type]
    turn.begin([3, 2])
    wrong = torch.zeros(2 if rank == 0 else 3, 8)
    for call in (
        lambda: Gathered(own, turn).start(wrong, routing),
        lambda: own.place(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0, 0, 1, 0], [0, 0, 1, 1]])),
        lambda: Own(group, 3),
    ):
        try:
            call()
        except ValueError as error:
            told.append(str(error))
    return told


def _given(rank: int, world: int) -> list[list[int]]:
    """The slots that experts are called with, for two tokens of the first rank and one of the second. The ranks hold
    experts 0 and 1, 2 and 3, and both a copy of expert 0 or 2 of the other."""
    group = torch.distributed.group.WORLD
    assert group is not None
    turn, own, called = Turn(), Own(group, 4, slots=3), []
    own.place(torch.tensor([[0, 1, 2], [2, 3, 0]]), torch.tensor([[0, 0, 0, 1], [1, 0, 1, 1]]))
    turn.begin([2, 1])
    ids_TK = torch.tensor([[0, 3], [2, 1]] if rank == 0 else [[2, 0]])
    routing = Routing(ids_TK, ids_TK, torch.ones(ids_TK.shape), *[None] * 3)  # type: ignore[arg-type]

    def experts(x_AD: torch.Tensor, ids_AK: torch.Tensor, *_: object, own: bool) -> torch.Tensor:
        called.append(ids_AK.tolist())
        return x_AD

    Gathered(own, turn).start(torch.zeros(len(ids_TK), 8), routing)(experts)
    return called[0]


def test_a_copy_computes_for_its_own_tokens_and_nobody_for_none(pools: dict[int, Pool]) -> None:
    first, second = pools[2].run(_given)
    assert first == [[0, -1], [2, 1], [-1, -1], [-1, -1]]
    assert second == [[-1, 1], [-1, -1], [0, 2], [-1, -1]]


def test_what_ranks_would_not_agree_on_is_told(pools: dict[int, Pool]) -> None:
    for tokens, told in zip((2, 3), pools[2].run(_wrong), strict=True):
        assert told == [
            f"{tokens} tokens came to a layer, but all ranks were told [3, 2]",
            "a share is to compute an expert that it does not hold",
            "3 experts in 1 slices do not spread evenly over 2 ranks",
        ]


def test_the_way_follows_the_fullest_lane() -> None:
    turn, used = Turn(), []
    ways = {name: SimpleNamespace(start=lambda x, r, name=name: used.append(name)) for name in ("gathered", "flat")}
    by_size = BySize(ways, turn, {1: "gathered", 16: "gathered", 64: "flat", 256: "gathered"})
    for lanes in ((1, 0), (31, 2), (0, 33), (5, 127), (129, 0), (5000, 5000)):
        turn.begin(lanes)
        by_size.start(torch.zeros(0), None)  # type: ignore[arg-type]
    assert used == ["gathered", "gathered", "flat", "flat", "gathered", "gathered"]


def test_a_turn_shares_a_lanes_tokens_out() -> None:
    turn = Turn(tp=2)
    turn.begin([5, 0, 1])
    assert turn.tokens == (3, 2, 0, 0, 1, 0)
