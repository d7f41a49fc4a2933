"""The decode benchmark: its arithmetic, its model, and one small run with all engines."""

import json

import pytest

from coterie.benchmarks import decode, decode_worker
from coterie.benchmarks.decode_model import config, make
from coterie.benchmarks.rows import read


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
    bench = decode._Bench([Fake("coterie", 0.2), Fake("transformers", 0.4)], Memory(), 512, "tiny", sizes, 3)
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
