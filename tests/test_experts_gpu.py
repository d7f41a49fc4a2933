"""The benchmark of a layer's experts on a GPU, at a tiny size through Triton's interpreter."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from coterie.benchmarks import experts_gpu
from coterie.benchmarks.decode_model import SHAPES
from coterie.benchmarks.rows import read
from coterie.kernels import expert_decode_triton as decode
from coterie.kernels.backend import HAS_TRITON, forced

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="needs triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs where there is no GPU"),
]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # The interpreter's products in bf16 are wrong.
    monkeypatch.setattr(torch, "bfloat16", torch.float32)
    shape = SHAPES["tiny"]()
    small = replace(shape, dim=32, experts=(4, 4), moe=replace(shape.moe, top_k=2, hidden=16))
    monkeypatch.setitem(SHAPES, "tiny", lambda: small)
    monkeypatch.setattr(decode, "MOST_TOKENS", 2)
    monkeypatch.setattr(experts_gpu, "_LAYERS", 1)
    monkeypatch.setattr(experts_gpu, "_TURNS", 1)
    with forced("interpret"):
        yield


def test_all_contenders_compute_the_same(tmp_path, capsys) -> None:
    rows = experts_gpu.main("tiny", json=tmp_path / "rows.json", quick=True, device="cpu", tokens=(1, 3))
    assert read(tmp_path / "rows.json") == rows
    speeds = {(row.case, row.impl): row for row in rows if row.unit == "GB/s"}
    assert {impl for case, impl in speeds if case == "tiny T1"} >= {"coterie few", "coterie many"}
    assert ("tiny T3", "coterie few") not in speeds
    assert ("tiny T3", "coterie many") in speeds
    assert all(row.limit and row.fraction == row.value / row.limit for row in speeds.values())
    distinct = {row.case: row.value for row in rows if row.metric == "distinct experts"}
    assert distinct["tiny T1"] == 2
    assert 2 <= distinct["tiny T3"] <= 4
    assert "without vllm fused_moe: No module named 'vllm'" in capsys.readouterr().out


def test_torchs_grouped_product_is_one_of_them(capsys) -> None:
    bench = _bench()
    try:
        experts_gpu.grouped_mm(*bench._calls(2)[0][0])
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"torch's grouped_mm does not run here: {error}")
    rows = bench.case(3, {"torch grouped_mm": experts_gpu.grouped_mm})
    assert rows[0].value > 0, capsys.readouterr().out


def _bench() -> experts_gpu.Bench:
    layers = [experts_gpu._layer(SHAPES["tiny"](), "cpu")]
    return experts_gpu.Bench("tiny", layers, 2, _Memory(), "cpu", 1)  # type: ignore[arg-type]


class _Memory:
    def rate(self) -> float:
        return 1e9


def test_bytes_are_those_of_the_experts_visited(monkeypatch) -> None:
    monkeypatch.setattr(experts_gpu, "seconds", lambda run, device: 2.0)
    rows = _bench().case(1, {"coterie few": experts_gpu.few})
    assert rows[0].value == pytest.approx(2 * 3 * 32 * 16 * 4 / 2.0 / 1e9)
    assert rows[1].value == pytest.approx(2e6)


def test_wrong_answers_are_told(capsys) -> None:
    def wrong(x_TD, *rest):
        return experts_gpu.many(x_TD, *rest) * 1.1

    with pytest.raises(ValueError, match=r"differ from a plain loop's by 0\.1"):
        _bench().case(2, {"coterie many": wrong})
    rows = _bench().case(2, {"coterie many": experts_gpu.many, "peer": wrong})
    assert {row.impl for row in rows} == {"coterie many", "machine"}
    assert "without peer: its answers differ" in capsys.readouterr().out


def test_tiles_take_turns_and_are_put_back(monkeypatch, capsys) -> None:
    before = decode.UP, decode.DOWN
    monkeypatch.setattr(experts_gpu, "TILES", ((16, 16, 4, 2), (16, 32, 4, 2), (24, 16, 4, 2)))
    rows = experts_gpu.main("tiny", quick=True, device="cpu", tokens=(1,), tiles=True)
    assert {row.impl for row in rows} == {"coterie few 16x16x4x2", "coterie few 16x32x4x2", "machine"}
    assert "without coterie few 24x16x4x2" in capsys.readouterr().out
    assert before == (decode.UP, decode.DOWN)
