"""The quickstart's stages: each leaves its result behind, and none is done twice."""

import json
from pathlib import Path

import pytest

pytest.importorskip("megatron.core", reason="the quickstart reads its tokens through megatron-core")
from coterie.train import quickstart
from coterie.train.corpus import Corpus
from coterie.train.launch import launch
from coterie.train.metrics import read_metrics
from coterie.train.prepare import outputs

TEXT = "def add(first, second):\n    return first + second\n\nclass Empty:\n    pass\n"
CORPUS = Corpus([TEXT * (20 + i) for i in range(30)], [TEXT * 40], [f"{i}.py" for i in range(30)], ["held.py"])
LEAVES = {
    "steps": 6,
    "batch-size": 4,
    "seq-len": 32,
    "eval-batches": 2,
    "eval-every": 3,
    "checkpoint.every": 3,
    "optim.warmup-tokens": 0,
    "model.layers": 2,
    "model.dim": 32,
    "model.heads": 2,
    "model.hidden": 64,
    "model.moe.hidden": 32,
}
SMALL = [word for name, value in LEAVES.items() for word in (f"--{name}", str(value))]


@pytest.mark.dist
def test_stages_end_to_end_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    calls = []

    def start(ranks: int, arguments: list[str]) -> int:
        calls.append(arguments)
        experts = ["--model.experts", "0", "4"] if arguments[0] == "quickstart_prmoe" else []
        return launch(ranks, [*arguments, *SMALL, *experts])

    monkeypatch.setattr(quickstart, "stdlib_corpus", lambda: CORPUS)
    monkeypatch.setattr(quickstart, "VOCABULARY", 300)
    monkeypatch.setattr(quickstart, "launch", start)
    quickstart.quickstart(tmp_path, seed=7)
    assert len(calls) == 2
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"PR-MoE", "dense", "unigram", "bigram", "trigram"}
    assert results["bigram"]["tokens"] == results["PR-MoE"]["tokens"] == 6 * 4 * 32
    assert all(f"{row['valid_loss']:.3f}" in shown for row in results.values())
    assert shown.count("completion") == 3
    assert "quickstart_dense" in (tmp_path / "quickstart_prmoe" / "report.html").read_text()
    assert len(read_metrics(tmp_path / "quickstart_dense")) == 6

    before = outputs(tmp_path / "data" / "train")[1].stat().st_mtime_ns
    quickstart.quickstart(tmp_path, seed=7)
    assert len(calls) == 2, "a finished run was started again"
    assert outputs(tmp_path / "data" / "train")[1].stat().st_mtime_ns == before
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_a_run_that_fails_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "launch", lambda *_: 3)
    with pytest.raises(ChildProcessError, match="status 3"):
        quickstart._pretrain("quickstart_dense", tmp_path / "run", tmp_path / "a", tmp_path / "b", 1)
