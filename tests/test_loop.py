"""The training loop: what it divides by, what it skips, what it leaves alone, how it stops and goes on."""

import json
import os
import signal
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_close_rms
from ranks import run_ranks
from runs import ONE, batch_steps, build, make_batch, make_trainer, small_config, small_model
from torch import nn

from coterie.models.parallelize import parallelize
from coterie.moe.balance import update_bias
from coterie.parallel.launch import Ranks
from coterie.parallel.mesh import build_mesh
from coterie.train.clock import peak_flops
from coterie.train.faults import first_bad_layer
from coterie.train.manifest import list_checkpoints
from coterie.train.metrics import MetricsWriter, read_metrics
from coterie.train.objective import LanguageModelling, Losses, Term


def losses_of(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder)]


def gradients(config: Any, batches: list[Any], model: nn.Module) -> dict[str, torch.Tensor]:
    trainer = make_trainer(config, model)  # type: ignore[arg-type]
    trainer._accumulate(batches, trainer._global_counts(batches))
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("gate", [{"aux_weight": 0.0, "z_weight": 0.1}, {"aux_weight": 0.5, "aux_scope": "sequence"}])
def test_gradients_do_not_depend_on_the_micro_batch(gate: dict, tmp_path: Path) -> None:
    """Targets are spread unevenly, so a mean of micro-batch means would differ."""
    config = small_config(tmp_path, small_model(**gate))
    whole = gradients(config, [make_batch(3, 8, config)], build(config.model))
    parts = gradients(config, [make_batch(i, 2, config) for i in range(3, 11, 2)], build(config.model))
    uneven = gradients(config, [make_batch(3, 1, config), make_batch(4, 7, config)], build(config.model))
    assert parts.keys() == whole.keys()
    for name, grad in whole.items():
        assert_close_rms(parts[name], grad, 2e-5, name)
        assert_close_rms(uneven[name], grad, 2e-5, name)


def test_gradient_is_that_of_the_mean_over_targets(tmp_path: Path) -> None:
    config = small_config(tmp_path, small_model(aux_weight=0.3, z_weight=0.2))
    batch = make_batch(0, 4, config)
    got = gradients(config, [batch], build(config.model))
    model = build(config.model)
    model.train()
    out = model(batch.tokens_BS, targets_BS=batch.targets_BS)
    targets, tokens = int((batch.targets_BS != -100).sum()), batch.tokens_BS.numel()
    assert targets < tokens
    (out.lm / targets + (0.3 * out.aux + 0.2 * out.z) / tokens).backward()
    for name, parameter in model.named_parameters():
        assert_close_rms(got[name], parameter.grad, 1e-5, name)


class Spy(LanguageModelling):
    """Remembers the history of each micro-batch and its counts."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, Any]] = []

    def __call__(self, model: nn.Module, batch: Any, history: Any) -> Losses:
        losses = super().__call__(model, batch, history)
        self.seen.append((history, tuple(s.asked_E.clone() for s in losses.stats)))
        return losses


def test_later_micro_batches_see_the_counts_of_earlier_ones(tmp_path: Path) -> None:
    config = small_config(tmp_path, steps=1)
    spy = Spy()
    trainer = make_trainer(config, objective=spy)
    trainer.step(trainer.steps(0))
    assert len(spy.seen) == 4
    assert spy.seen[0][0] is None
    total = [torch.zeros_like(c) for c in spy.seen[0][1]]
    for (_, counts), (history, _) in zip(spy.seen, spy.seen[1:], strict=False):
        total = [t + c for t, c in zip(total, counts, strict=True)]
        for expected, got in zip(total, history, strict=True):
            assert torch.equal(expected, got)


def test_bias_is_updated_once_a_step_by_the_whole_batch(tmp_path: Path) -> None:
    config = small_config(tmp_path, small_model(bias_update=0.01), steps=1)
    spy = Spy()
    trainer = make_trainer(config, objective=spy)
    trainer.step(trainer.steps(0))
    for layer, moe in enumerate(trainer.model.moe_layers):  # type: ignore[attr-defined]
        expected = torch.zeros_like(moe.gate.bias_E)
        update_bias(expected, sum(counts[layer] for _, counts in spy.seen), 0.01)  # type: ignore[arg-type]
        assert (expected.abs().sum() > 0) == (layer == 1), "two of two experts are always in balance"
        assert torch.equal(moe.gate.bias_E, expected)


def test_it_learns_and_tells(tmp_path: Path, capsys) -> None:
    config = small_config(tmp_path, steps=60, eval_every=20, eval_batches=1)
    config = replace(config, log=replace(config.log, every=1))
    valid = [make_batch(1000, 8, config)]
    summary = make_trainer(config, valid=lambda: valid, flops_per_token=1e4).run()
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert [row["step"] for row in rows if "valid_loss" in row] == [20, 40, 60]
    assert summary.valid_loss == rows[-1]["valid_loss"]
    assert summary.finished
    row = rows[7]
    assert row["tokens"] == 8 * 80
    assert row["layers"] == [1, 2]
    assert [len(load) for load in row["loads"]] == [2, 4]
    assert [sum(load) for load in row["loads"]] == [160, 160], "80 tokens choose two experts each"
    assert row["max_mean"] == pytest.approx(max(max(x) * len(x) / sum(x) for x in row["loads"]))
    assert row["drop"] == 0
    assert set(row["time"]) == {"data", "forward", "alltoall", "backward", "optimizer"}
    assert all(v >= 0 for v in row["time"].values())
    assert row["time"]["forward"] > 0
    assert row["mfu"] > 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert len(lines) == 60
    for part in ("loss", "lr", "norm", "tok/s", "mfu", "load", "drop", "eta"):
        assert part in lines[19]
    assert "valid" in lines[19]


def test_evaluation_leaves_training_alone(tmp_path: Path) -> None:
    model = small_model(bias_update=0.01, noise="jitter", capacity_factor=1.0, drop_policy="random")
    quiet = small_config(tmp_path / "quiet", model)
    watched = small_config(tmp_path / "watched", model, eval_every=1, eval_batches=1)
    one, two = build(model), build(model)
    make_trainer(quiet, one).run()
    seen: list[bool] = []

    class Watch(LanguageModelling):
        def __call__(self, model: nn.Module, batch: Any, history: Any) -> Losses:
            seen.append(model.training)
            return super().__call__(model, batch, history)

    make_trainer(watched, two, objective=Watch(), valid=lambda: [make_batch(500, 8, watched)]).run()
    assert seen == [True, True, True, True, False] * 6
    assert losses_of(tmp_path / "quiet") == losses_of(tmp_path / "watched")
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name]), name


class Poison(LanguageModelling):
    """Makes the loss of some steps NaN, or its gradient infinite, on one rank."""

    def __init__(self, steps: set[int], kind: str, rank: int = 0) -> None:
        self.bad, self.kind, self.rank, self.calls = steps, kind, rank, 0

    def __call__(self, model: nn.Module, batch: Any, history: Any) -> Losses:
        losses = super().__call__(model, batch, history)
        step, self.calls = self.calls, self.calls + 1
        if step not in self.bad:
            return losses
        term = losses.terms["loss"]
        value = term.value * float("nan")
        if self.kind == "gradient":
            value = term.value + Explode.apply(term.value)  # type: ignore[operator]
        return losses._replace(terms={**losses.terms, "loss": term._replace(value=value)})


class Explode(torch.autograd.Function):
    """Zero forward, infinite backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * float("inf")


SKIPPED = [[True, False, True, False, True], 2, 40, 0, "the output of blocks.2.moe.gate"]


def _poisoned_steps(rank: int, world: int, folder: str, kind: str) -> list[Any]:
    """Steps 1 and 3 are bad on the last rank only. Returns, per step, whether the model moved, and the skip count."""
    ranks = Ranks(rank, rank, world, torch.device("cpu"))
    config = small_config(Path(folder), small_model(bias_update=0.01), micro_batch=0, max_bad_steps=2)
    model = build(config.model)
    if world > 1:
        model = parallelize(model, build_mesh("cpu", ep=2))
    objective = Poison({1, 3} if rank == world - 1 else set(), kind)
    trainer = make_trainer(config, model, ranks, objective=objective)
    data, moved = trainer.steps(0), []
    for _ in range(5):
        before = {n: t.clone() for n, t in model.state_dict().items()}
        trainer.step(data)
        moved.append(any(not torch.equal(_local(t), _local(before[n])) for n, t in model.state_dict().items()))
    if rank == world - 1:
        model.blocks[2].moe.gate.register_forward_hook(_spoil)  # type: ignore[union-attr]
    batch = make_batch(0, 4, config)
    found = first_bad_layer(model, lambda: LanguageModelling()(model, batch, None).terms["loss"].value)
    return [moved, trainer.progress.skipped, trainer.progress.samples, trainer.bad_in_a_row, found]


def _spoil(_module: nn.Module, _inputs: Any, routing: Any) -> Any:
    return routing._replace(weights_TK=routing.weights_TK * float("nan"))


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_bad_step_is_skipped_and_counted(kind: str, tmp_path: Path) -> None:
    assert _poisoned_steps(0, 1, str(tmp_path), kind) == SKIPPED


@pytest.mark.dist
def test_a_bad_step_is_skipped_on_all_ranks_alike(tmp_path: Path) -> None:
    results = run_ranks(_poisoned_steps, 2, str(tmp_path), "loss")
    assert results == [SKIPPED] * 2, "the layer is bad on the second rank alone; both must name it"


def test_too_many_bad_steps_name_the_first_bad_layer(tmp_path: Path) -> None:
    config = small_config(tmp_path, steps=9, max_bad_steps=3)
    model = build(config.model)
    calls = [0]

    def explode(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return output * (float("inf") if calls[0] > 4 else 1.0)  # the first step's four micro-batches are good

    model.blocks[1].attention.register_forward_hook(explode)
    trainer = make_trainer(config, model)
    with pytest.raises(ArithmeticError, match=r"3 steps in a row, the last is step 4.*of blocks\.1\.attention"):
        trainer.run()
    rows = read_metrics(tmp_path)
    assert [row["bad"] for row in rows] == [False, True, True, True]
    assert [row["skipped"] for row in rows] == [0, 1, 2, 3]
    assert rows[1]["loss"] is None, "metrics.jsonl is JSON: it has no NaN"


def test_first_bad_layer_of_weights_and_gradients(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    batch = make_batch(0, 4, config)

    def run(model: nn.Module) -> Any:
        return lambda: LanguageModelling()(model, batch, None).terms["loss"].value

    model = build(config.model)
    assert first_bad_layer(model, run(model)).startswith("no layer")
    with torch.no_grad():
        model.blocks[2].moe.experts.w_out[1, 2, 3] = float("nan")  # type: ignore[union-attr,index]
    assert first_bad_layer(model, run(model)) == "the weights of blocks.2.moe.experts.w_out"
    model = build(config.model)
    model.blocks[0].mlp.register_forward_hook(lambda m, i, o: o + Explode.apply(o))  # type: ignore[union-attr]
    found = first_bad_layer(model, run(model))
    assert found.startswith("the gradient of blocks.0.mlp."), found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_and_the_run_goes_on(number: int, tmp_path: Path) -> None:
    model = small_model(noise="gumbel", bias_update=0.01)
    whole = small_config(tmp_path / "whole", model, steps=7)
    expected = build(model)
    make_trainer(whole, expected).run()
    config = small_config(tmp_path / "cut", model, steps=7)

    def steps(consumed: int):
        for i, batches in enumerate(batch_steps(config)(consumed)):
            if i == 2 and consumed == 0:
                os.kill(os.getpid(), number)
            yield batches

    before = signal.getsignal(number)
    summary = make_trainer(config, steps=steps).run()
    assert signal.getsignal(number) is before
    assert not summary.finished
    assert summary.progress.step in (3, 4), "it stops at the boundary of a step"
    assert [p.name for p in list_checkpoints(tmp_path / "cut" / "checkpoints")] == [
        f"step_{summary.progress.step:08d}"
    ]
    resumed = build(model, seed=99)
    trainer = make_trainer(config, resumed, steps=steps)
    trainer.resume()
    assert trainer.progress == summary.progress
    assert trainer.run().finished
    assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "whole")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_rows_after_the_checkpoint_are_written_again(tmp_path: Path) -> None:
    config = small_config(tmp_path, steps=6)
    config = replace(config, checkpoint=replace(config.checkpoint, every=2, keep=9))
    make_trainer(config).run()
    first = losses_of(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # cut by a crash
    start = str(tmp_path / "checkpoints" / "step_00000004")
    again = make_trainer(replace(config, checkpoint=replace(config.checkpoint, resume=start)))
    again.resume()
    again.run()
    assert losses_of(tmp_path) == first
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["aside_step_00000006", *(f"step_0000000{i}" for i in (2, 4, 6))]


def test_a_full_disk_is_told_and_the_run_goes_on(tmp_path: Path, monkeypatch, caplog) -> None:
    from coterie.train.checkpoint import Checkpointer

    config = small_config(tmp_path, steps=6)
    config = replace(config, checkpoint=replace(config.checkpoint, every=2))
    real = Checkpointer._write_shards
    calls: list[int] = []

    def full(self: Checkpointer, *arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(self, *arguments)

    monkeypatch.setattr(Checkpointer, "_write_shards", full)
    monkeypatch.setattr(ONE.log, "propagate", True)
    assert make_trainer(config).run().finished
    assert "step 4 was not written: [Errno 28] No space left on device; step_00000002 is intact" in caplog.text
    assert [p.name for p in list_checkpoints(tmp_path / "checkpoints")] == ["step_00000006", "step_00000002"]


def test_an_objective_without_a_router(tmp_path: Path) -> None:
    """Distillation, SFT and PPO bring their own model, batches and losses."""

    class Regression:
        def counts(self, batch: Any) -> dict[str, torch.Tensor]:
            return {"rows": torch.tensor(len(batch[0]))}

        def __call__(self, model: nn.Module, batch: Any, history: Any) -> Losses:
            return Losses({"square": Term((model(batch[0]) - batch[1]).square().sum(), 2.0, "rows")})

    x = torch.randn(8, 3)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]])
    config = replace(small_config(tmp_path, steps=300), optim=small_config(tmp_path).optim)
    config = replace(config, optim=replace(config.optim, lr=0.1, weight_decay=0.0))
    model = nn.Linear(3, 1)
    trainer = make_trainer(config, model, objective=Regression(), steps=lambda _: iter([[(x, y)]] * 300))  # type: ignore[arg-type]
    trainer.run()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["square"] < 1e-3


def test_a_full_disk_costs_rows_and_no_others(tmp_path: Path, capsys) -> None:
    """Half a row is left by the failed write; the rows after it must not be lost with it."""
    writer = MetricsWriter(tmp_path, start=0, tensorboard=False)

    class Board:
        def add_scalar(self, *_: Any) -> None:
            raise OSError(28, "No space left on device")

        close = add_scalar

    row = {"loss": 1.0, "lr": 1.0, "grad_norm": 1.0, "tokens_per_s": 1.0, "mfu": 1.0, "loads": [], "time": {}}
    writer.write({"step": 1} | row, total_steps=4)
    real, writer._file = writer._file, tmp_path  # a folder cannot be written
    writer.write({"step": 2} | row, total_steps=4)
    with real.open("a") as file:
        file.write('{"step": 2, "lo')
    writer._file, writer._board = real, Board()
    writer.write({"step": 3} | row, total_steps=4)
    writer.write({"step": 4} | row, total_steps=4)
    writer.close()
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 3, 4]
    out, err = capsys.readouterr()
    assert out.count("step") == 4
    assert err.count("cannot be written") == 2, "the rows and the board are told of once each"


def test_starting_anew_keeps_the_rows_of_before(tmp_path: Path) -> None:
    config = small_config(tmp_path, steps=2)
    make_trainer(config).run()
    before = (tmp_path / "metrics.jsonl").read_text()
    again = make_trainer(replace(config, checkpoint=replace(config.checkpoint, resume="never")))
    again.resume()
    again.run()
    assert (tmp_path / "aside_metrics.jsonl").read_text() == before
    assert losses_of(tmp_path) == [row["loss"] for row in map(json.loads, before.splitlines())]


def test_the_board_is_closed_when_the_run_fails(tmp_path: Path, monkeypatch) -> None:
    closed: list[int] = []
    monkeypatch.setattr(MetricsWriter, "close", lambda self: closed.append(1))
    with pytest.raises(ArithmeticError):
        make_trainer(small_config(tmp_path, max_bad_steps=1), objective=Poison(set(range(99)), "loss")).run()
    assert closed == [1]


def test_data_that_ends_early_is_told(tmp_path: Path) -> None:
    """A run resumed with smaller batches has consumed more samples than the new settings have."""
    config = small_config(tmp_path, steps=6)
    with pytest.raises(ValueError, match=r"the data ended after step 2 of 6, at 16 samples: .*batch_size"):
        make_trainer(config, steps=lambda consumed: islice(batch_steps(config)(consumed), 2)).run()


def test_a_checkpoint_named_by_another_path_keeps_its_place(tmp_path: Path, monkeypatch) -> None:
    """Relative or absolute, and one that was set aside before: only what is newer goes out of the way."""
    config = small_config(tmp_path, steps=6)
    config = replace(config, checkpoint=replace(config.checkpoint, every=2, keep=9))
    make_trainer(config).run()
    folder = tmp_path / "checkpoints"

    def resume(start: str | Path) -> list[str]:
        trainer = make_trainer(replace(config, checkpoint=replace(config.checkpoint, resume=str(start))))
        trainer.resume()
        assert trainer.progress.step == 4
        return sorted(p.name for p in folder.iterdir())

    monkeypatch.chdir(tmp_path)
    expected = ["aside_step_00000006", "step_00000002", "step_00000004"]
    assert resume("checkpoints/step_00000004") == expected
    (folder / "step_00000004").rename(folder / "aside_step_00000004")
    expected = ["aside_step_00000004", "aside_step_00000006", "step_00000002"]
    assert resume(folder / "aside_step_00000004") == expected
    (folder / "elsewhere").mkdir()
    (folder / "aside_step_00000004").rename(folder / "elsewhere" / "the best")
    assert resume(folder / "elsewhere" / "the best")[-1] == "elsewhere"
    assert list_checkpoints(folder) == [], "none of this folder's is older than a start from elsewhere"


def test_a_peak_is_measured_however_busy_the_machine_is() -> None:
    """The warm-up may take longer than all of the time that is given."""
    assert peak_flops(torch.device("cpu"), torch.float32, budget=0.0) > 0
