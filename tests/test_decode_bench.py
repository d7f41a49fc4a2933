"""The decode benchmark: its arithmetic, its model, and one small run with all engines."""

import json

import pytest

from coterie.benchmarks import decode, decode_shapes, decode_worker
from coterie.benchmarks.decode_model import SHAPES, config, make
from coterie.benchmarks.rows import read
from coterie.kernels import native
from coterie.models.gpt import GPT

needs_native = pytest.mark.skipif(native.library() is None, reason="recording needs the native kernels")


def test_bytes_of_decoding_by_hand() -> None:
    # Prompt 3, 3 new tokens: two decode steps, which see 4 and 5 tokens of each of 2 sequences.
    sizes = decode.Sizes(prompt=3, new=3, prefill=1)
    first, all_ = {"bytes": 100.0}, {"bytes": 250.0, "kv_token": 7.0}
    assert decode.read_bytes(first, all_, 2, sizes) == 150 + 2 * (4 + 5) * 7


def test_prompts_share_no_beginning_and_repeat() -> None:
    made = decode.prompts(3, 8, 20, 50257)
    assert made == decode.prompts(3, 8, 20, 50257) != decode.prompts(4, 8, 20, 50257)
    assert len({tuple(prompt[:4]) for prompt in made}) == 8
    assert all(100 <= token < 50157 for prompt in made for token in prompt)
    assert all(0 <= token < 40 for prompt in decode.prompts(3, 2, 9, 40) for token in prompt)


class Fake:
    """Takes a second for the prompts and `per` seconds for each token after the first."""

    def __init__(self, impl: str, per: float) -> None:
        self.impl, self.per, self.startup, self.peak = impl, per, 3.0, 1 << 30

    def ask(self, prompts, new):
        told = {"bytes": 1000.0 * new, "kv_token": 10.0, "distinct": 2.5}
        return {"tokens": [[5] * new for _ in prompts], "seconds": 1 + self.per * (new - 1), **told}


class Memory:
    def rate(self) -> float:
        return 1e5


def test_speeds_limits_and_fractions_by_hand() -> None:
    sizes, kept = decode.Sizes(prompt=4, new=11, prefill=30), []
    bench = decode.Bench([Fake("coterie", 0.2), Fake("transformers", 0.4)], Memory(), 512, "tiny", sizes, 3)
    rows = bench.run((2,), [], lambda found: kept.append(len(found)))
    found = {(row.case.rpartition(", ")[2], row.impl, row.metric): row for row in rows}
    # 10 steps of weights, and the keys and values of 5 to 14 tokens of 2 sequences.
    least = (10 * 1000 + 2 * sum(range(5, 15)) * 10) / 1e5
    for impl, speed in (("coterie", 2 * 10 / 2.0), ("transformers", 2 * 10 / 4.0)):
        row = found["batch 2", impl, "decode"]
        assert row.value == pytest.approx(speed)
        assert row.limit == pytest.approx(20 / least)
        assert row.fraction == pytest.approx(speed * least / 20)
        assert found["prefill 30", impl, "prefill"].value == pytest.approx(30.0)
        assert found["tiny", impl, "startup"].value == 3
        assert found["tiny", impl, "peak_memory"].value == 1
    assert found["batch 2", "machine", "memory_rate"].value == pytest.approx(1e-4)
    assert found["batch 2", "coterie", "distinct_experts"].value == 2.5
    assert found["batch 2", "coterie", "distinct_tokens"].value == 1 / 22
    assert kept == sorted(kept), "what was measured is kept after each part"


def test_a_quick_run(tmp_path, capsys) -> None:
    rows = decode.main(json=tmp_path / "rows.json", quick=True, device="cpu", peer=False)
    assert read(tmp_path / "rows.json") == rows
    found = {(row.case.rpartition(", ")[2], row.metric): row for row in rows if row.impl == "coterie"}
    for batch in (1, 4):
        row = found[f"batch {batch}", "decode"]
        assert row.value > 0
        assert row.fraction is not None
        assert 0 < row.fraction < 1
    # One token visits two experts in each layer; four visit two to four.
    assert found["batch 1", "distinct_experts"].value == 2
    assert 2 < found["batch 4", "distinct_experts"].value <= 4
    assert 0 < found["random-mixtral bfloat16 on cpu", "startup"].value < 60
    assert found["random-mixtral bfloat16 on cpu", "peak_memory"].value > 0.05
    assert found["prefill 40", "prefill"].value > 0
    assert "random-mixtral" in capsys.readouterr().out


@pytest.mark.slow
def test_a_quick_run_beside_transformers() -> None:
    pytest.importorskip("transformers", reason="the peer of this test")
    rows = decode.main(quick=True, device="cpu")
    assert [row.value for row in rows if row.metric.startswith("tokens like")] == [4 * 64]
    assert {row.impl for row in rows if row.metric == "decode"} == {"coterie", "transformers"}


def test_wrong_tokens_are_not_timed(monkeypatch, tmp_path) -> None:
    class Wrong:
        def __init__(self, impl, *given) -> None:
            self.impl = impl

        def ask(self, prompts, new):
            return {"tokens": [[len(self.impl)] * new for _ in prompts]}

        def close(self) -> None:
            pass

    monkeypatch.setattr(decode, "Worker", Wrong)
    with pytest.raises(ValueError, match=r"differ from transformers' after \[0, 0, 0, 0\]"):
        decode.main(quick=True, device="cpu")


def test_a_worker_that_fails_says_why(tmp_path) -> None:
    with pytest.raises(RuntimeError, match="nowhere"):
        decode_worker.Worker("coterie", tmp_path / "nowhere", "float32", "cpu")


def test_the_peak_is_of_this_process() -> None:
    before = decode_worker.peak_bytes()
    block = bytearray(64 << 20)
    assert decode_worker.peak_bytes() >= before
    assert before > 10 << 20
    del block


def test_the_model_is_a_mixtral_and_repeats(tmp_path) -> None:
    for name in ("a", "b"):
        make(tmp_path / name, config(quick=True))
    assert json.loads((tmp_path / "a" / "config.json").read_text())["model_type"] == "mixtral"
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert one == other
    assert len(one) > 100_000


@pytest.mark.parametrize("wrong", [{"batches": (0,)}, {"batches": ()}, {"repeats": 0}])
def test_settings_that_mean_nothing_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match="--batches"):
        decode.main(**wrong)


@pytest.mark.parametrize(("name", "total", "active"), [("olmoe", 6.92e9, 1.28e9), ("qwen3_30b", 30.5e9, 3.35e9)])
def test_published_shapes_have_their_published_sizes(name, total, active) -> None:
    shape = SHAPES[name]()
    model = GPT(shape, device="meta")
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(total, rel=0.01)
    idle = sum(p.numel() for layer in model.moe_layers for p in layer.experts.parameters())
    idle *= 1 - shape.moe.top_k / shape.experts[0]
    assert total - idle == pytest.approx(active, rel=0.03)


def test_a_shape_is_served_in_this_process(tmp_path) -> None:
    rows = decode_shapes.main("tiny", "tiny", json=tmp_path / "rows.json", quick=True, batches=(1, 4), device="cpu")
    assert read(tmp_path / "rows.json") == rows
    found = {(row.case.rpartition(", ")[2], row.impl, row.metric): row for row in rows}
    for impl in ("coterie", "coterie, not recorded"):
        assert found["batch 4", impl, "decode"].fraction is not None
        assert found["tiny bfloat16 on cpu", impl, "startup"].value > 0
    assert found["batch 1", "coterie", "distinct_experts"].value == 8
    assert len(rows) == 2 * len({(row.case, row.impl, row.metric) for row in rows})


@needs_native
def test_a_shape_is_served_with_and_without_recordings() -> None:
    served = decode_shapes.engine("tiny", "cpu")
    both = decode_shapes._contenders(served)
    decodes = served.core.runner.decodes
    assert [one.impl for one in both] == ["coterie", "coterie, not recorded"]
    assert set(decodes._recordings) == {1}
    plain = both[1].ask([[5, 6, 7], [8, 9, 10]], 6)
    assert set(decodes._recordings) == {1}
    assert both[0].ask([[5, 6, 7], [8, 9, 10]], 6)["tokens"] == plain["tokens"]
    assert set(decodes._recordings) == {1, 2}


def test_a_shape_whose_steps_cannot_be_recorded_is_measured_without(monkeypatch, capsys) -> None:
    def refuse(*_):
        raise RuntimeError("no graphs here")

    monkeypatch.setattr("coterie.infer.decodes.record", refuse)
    rows = decode_shapes.main("tiny", quick=True, batches=(1,), device="cpu")
    assert {row.impl for row in rows} == {"coterie, not recorded", "coterie", "machine"}
    assert "no graphs here" in capsys.readouterr().out


def test_a_shape_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ValueError, match="no shape 'huge': give one of olmoe"):
        decode_shapes.main("huge", device="cpu")
