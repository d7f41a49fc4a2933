"""Plans, their table and their command."""

import itertools
import json

import pytest

pytest.importorskip("tyro", reason="the command needs tyro")
from plans import H200

from coterie import cli
from coterie.models.fit import sizes
from coterie.parallel.layout import Layout, divisors
from coterie.train.machines import GIB, MACHINES
from coterie.train.plan import DEGREES, candidates, plan, row_of
from coterie.train.plan_table import tidy, torchrun_line
from coterie.train.pretrain import parse
from coterie.train.recipes import RECIPES


def test_candidates_are_every_factorisation() -> None:
    found = list(candidates(8, (4,), {}))
    brute = [
        (dp, 8 // tp // dp, tp, ep, etp)
        for tp, dp, ep, etp in itertools.product(divisors(8), repeat=4)
        if 8 % (tp * dp) == 0 and 8 % (ep * etp) == 0 and ep <= 4
    ]
    assert {(c.dp_replicate, c.dp_shard, c.tp, c.ep, c.etp) for c in found} == set(brute)
    assert len(found) == len(brute)
    assert [c.tp for c in candidates(8, (), {"tp": 2})] == [2, 2, 2]
    assert [(c.dp_replicate, c.dp_shard) for c in candidates(8, (), {"tp": 1, "dp_shard": 4})] == [(2, 4)]


def test_a_plan_accounts_for_every_layout() -> None:
    config = RECIPES["350m_prmoe"]()
    found = plan(config, 16, MACHINES["a100-40"], 8)
    number = len(list(candidates(16, sizes(config.model).experts, {})))
    assert len(found.rows) + found.undivided.total() + found.too_large.total() == number
    totals = [row.step.total for row in found.rows]
    assert totals == sorted(totals)
    assert found.smallest in found.rows
    limit = 0.9 * 39.4 * GIB
    assert all(row.memory.peak <= limit for row in found.rows)


@pytest.mark.parametrize(("name", "published"), [("1.3b_moe128", 372), ("6.7b_dense", 70)])
def test_predictions_lie_above_what_deepspeed_measured(name: str, published: float) -> None:
    """Samples per second on 128 A100 (DeepSpeed-MoE, table 3). The plan counts no imbalance and no small kernels, so
    it must be faster, and not by more than three times."""
    config = RECIPES[name]()
    layout = Layout(1, 128, ep=128 if config.model.experts else 1)
    row = row_of(config, layout, MACHINES["a100-40"], 8)
    assert published <= config.batch_size / row.step.total <= 3 * published


def test_the_command_of_a_plan_is_understood() -> None:
    config = RECIPES["1.3b_prmoe"]()
    row = row_of(config, Layout(1, 128, ep=32), MACHINES["a100-40"], 8)
    line = torchrun_line("1.3b_prmoe", row, 8, ["--seq-len", "1024", "--micro-batch=2", "--micro_batch", "3"])
    start, _, rest = line.partition(" -m coterie.train.pretrain ")
    assert start.startswith("torchrun --nnodes 16 ")
    assert start.endswith("--nproc-per-node 8")
    parsed = parse(rest.split())
    assert parsed is not None
    assert (parsed.parallel.ep, parsed.seq_len, parsed.micro_batch) == (32, 1024, 4)
    assert torchrun_line("tiny", row_of(RECIPES["tiny"](), Layout(1, 2), H200, 8), 8).startswith(
        "torchrun --standalone"
    )


def test_rows_are_flat_and_add_up() -> None:
    config = RECIPES["350m_prmoe"]()
    row = row_of(config, Layout(1, 16, ep=16), H200, 8)
    record = json.loads(json.dumps(tidy(config, row, H200)))
    assert all(isinstance(value, int | float | str) for value in record.values())
    assert set(DEGREES) <= set(record)
    seconds = {part: record[f"seconds_{part}"] for part in row.step._fields}
    hidden = seconds.pop("hidden")
    assert hidden == min(seconds["compute"], seconds["fsdp"]) > 0
    assert record["seconds_step"] == pytest.approx(sum(seconds.values()) - hidden)
    assert 0 < record["mfu"] < H200.fraction


def test_the_command_prints_a_table_and_writes_rows(tmp_path, capsys) -> None:
    path = tmp_path / "rows.json"
    cli.main(["plan", "tiny", "--gpus", "4", "--node=4", "--gpu", "cpu", "--json", str(path), "--batch-size", "16"])
    out = capsys.readouterr().out
    rows = json.loads(path.read_text())
    assert f"{len(rows)} layouts fit" in out
    assert "16 x 32 tokens a step" in out
    assert "torchrun --standalone --nproc-per-node 4 -m coterie.train.pretrain tiny --batch-size 16" in out
    assert "do not divide: tp=4 does not divide heads 2" in out
    assert {"tp", "ep", "bytes_peak", "seconds_step", "gather_sent", "exchange_messages"} <= set(rows[0])
    cli.main(["plan", "tiny", "--gpus", "4", "--gpu", "cpu", "--parallel.tp", "2", "--json", str(path)])
    assert {row["tp"] for row in json.loads(path.read_text())} == {2}


H8 = ["--gpus", "8", "--gpu", "h200"]
WRONG = {
    "no such recipe": (["tinny", *H8], "tiny"),
    "no such leaf": (["tiny", *H8, "--seqlen", "3"], "--seq-len"),
    "no such gpu": (["tiny", "--gpus", "8", "--gpu", "H20"], "choose among a100-40"),
    "no gpu": (["tiny", "--gpus", "8"], "plan needs --gpu"),
    "no number": (["tiny", "--gpus", "many", "--gpu", "h200"], "--gpus 'many'"),
    "no gpus": (["tiny", "--gpus", "0", "--gpu", "h200"], "--gpus 0"),
    "not whole nodes": (["tiny", "--gpus", "12", "--gpu", "h200"], "use 8 or 16"),
    "fits nowhere": (["1.3b_moe128", "--gpus", "2", "--gpu", "h200"], "of the usable 125.8; 8 would do"),
    "divides nowhere": (["tiny", "--gpus", "7", "--gpu", "h200", "--node", "7"], "divides over no layout"),
    "a degree that divides nothing": (["tiny", *H8, "--parallel.tp", "3"], "tp=3"),
    "a degree that is no number": (["tiny", *H8, "--parallel.ep", "x"], "--parallel.ep 'x'"),
}


@pytest.mark.parametrize(("argv", "said"), WRONG.values(), ids=WRONG)
def test_one_sentence_and_status_two(argv, said, capsys) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["plan", *argv])
    error = capsys.readouterr().err
    assert left.value.code == 2
    assert error.startswith("coterie: ")
    assert said in error
    assert error.count("\n") == 1
