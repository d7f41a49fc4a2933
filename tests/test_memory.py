"""How many blocks are kept, how fast memory is, and what a step must read."""

from pathlib import Path

import pytest
import torch
from engines import CONFIG, ask, drain, engine, model

from coterie.infer import memory
from coterie.infer.memory import count_blocks, free_memory, read_rate, size_of
from coterie.infer.step import Slice, Step
from coterie.infer.traffic import Traffic
from coterie.models.config import ModelConfig
from coterie.models.gpt import GPT

CPU = torch.device("cpu")


def _count(kv_memory: int, **settings: int) -> int:
    settings = {"max_model_len": 1000, "max_sequences": 8} | settings
    return count_blocks(kv_memory, 1 << 10, 16, device=CPU, **settings)


def test_blocks_for_many_of_middling_length_and_one_of_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda _: 10 << 20)
    assert _count(0) == 8 * 16  # a quarter of 1000 tokens is 15.6 blocks
    assert _count(0, max_sequences=1) == 63
    assert _count(0, max_sequences=1000) == 5 << 10, "half of what is free"
    assert _count(100 << 10) == 100
    with pytest.raises(ValueError, match=r"kv_memory 50.0 KiB holds keys and values of 800 tokens.* have 1000"):
        _count(50 << 10)
    monkeypatch.setattr(memory, "free_memory", lambda _: 100 << 10)
    with pytest.raises(ValueError, match=r"the free memory of 100.0 KiB holds .* which take 63.0 KiB: lower"):
        _count(0)


def test_free_memory_is_under_the_limit_of_a_container(tmp_path: Path) -> None:
    assert 0 < free_memory(CPU) < 1 << 50
    assert memory._left_in_group(tmp_path) == 1 << 62
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert memory._left_in_group(tmp_path) == 1 << 62
    (tmp_path / "memory.max").write_text("5000\n")
    assert memory._left_in_group(tmp_path) == 4000
    (tmp_path / "memory.current").write_text("6000\n")
    assert memory._left_in_group(tmp_path) == 0


def test_sizes_are_written_as_people_do() -> None:
    assert [size_of(n) for n in (5, 1536, 3 << 20, 5 << 30)] == ["5 bytes", "1.5 KiB", "3.0 MiB", "5.0 GiB"]


def test_memory_is_touched_only_when_it_is_used() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) << 12

    before = resident()
    served = engine(kv_memory=1 << 30, block_size=16)
    assert served.report()["kv_bytes"] > 0.9 * (1 << 30)
    ask(served, [1, 2, 3])
    drain(served)
    assert resident() - before < 100 << 20


def test_the_rate_of_memory() -> None:
    assert read_rate(model()) == 0.0, "too small to tell"
    big = torch.nn.Linear(4096, 1024)
    assert 1e8 < read_rate(big) < 1e13


@pytest.mark.parametrize("tied", [True, False])
def test_what_a_step_reads(tied: bool) -> None:
    config = ModelConfig(**{**CONFIG.__dict__, "tied_head": tied})
    traffic = Traffic(GPT(config), token=10.0)
    table, expert = 300 * 48 * 4, 3 * 20 * 48 * 4
    assert traffic.experts == [expert, expert]
    assert traffic.head == table
    assert traffic.weights == traffic.dense + 12 * expert + table * (1 if tied else 2)
    pieces = (
        Slice(("a", 0), 0, (1, 2, 3), (0,), False),
        Slice(("b", 0), 7, (1,), (1,), True),
    )
    loads = ((3, 0, 5, 0), (1, 1, 1, 1, 4, 0, 0, 0))
    assert traffic.of(Step(1, pieces), loads) == traffic.dense + table + 7 * expert + 11 * 10
    assert traffic.of(Step(1, pieces[:1]), loads) == traffic.dense + 7 * expert + 3 * 10
