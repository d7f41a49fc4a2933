"""The entry: what it writes, and one sentence for every mistake, before any compute is spent."""

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import write_text

from coterie.models.config import RopeScaling
from coterie.models.gpt import GPT
from coterie.models.params import count_params
from coterie.models.tokenizer import train_bpe
from coterie.models.weights import load_model
from coterie.parallel.launch import Ranks
from coterie.train import session
from coterie.train.config import check, from_dict, to_dict
from coterie.train.metrics import read_metrics
from coterie.train.prepare import prepare
from coterie.train.pretrain import main, parse
from coterie.train.recipes import RECIPES


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    prepare([write_text(folder / "text.txt")], folder / "train", train_vocab=300, split="blank", quiet=True)
    return folder / "train"


def flags(data: Path, run: Path, *more: str) -> list[str]:
    base = ["tiny", "--run-dir", str(run), "--data.train", str(data), "--data.split", "90,10,0"]
    return [*base, "--parallel.device", "cpu", "--parallel.threads", "1", "--log.tensorboard", "False", *more]


def refused(arguments: list[str], capsys, run: Path | None = None) -> str:
    """The one sentence of a refusal; nothing may have been trained."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("coterie: ")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    assert "step 1/" not in out.replace(" ", "")
    if run is not None:
        assert not (run / "metrics.jsonl").exists()
    return err


MISTAKES = {
    "an unknown recipe": (["tinny"], r"no recipe 'tinny'; the nearest is tiny"),
    "another one": (["350m-prmoe"], r"no recipe '350m-prmoe'; the nearest are .*350m_prmoe"),
    "an unknown option": (["tiny", "--optim.lrr", "1"], r"no option --optim.lrr; the nearest (is|are) .*--optim.lr"),
    "a stray word": (["tiny", "steps=3"], r"no option steps=3"),
    "no number": (["tiny", "--optim.lr", "fast"], r"--optim.lr: could not convert string to float: 'fast'"),
    "no value": (["tiny", "--optim.lr"], r"Missing value for argument '--optim.lr'"),
    "no choice": (["tiny", "--model.activation", "relu"], r"invalid choice 'relu'.*swiglu"),
    "top_k over experts": (["tiny", "--model.moe.top-k", "9"], r"top_k=9 is more than the layer's 4 experts"),
    "top_k of zero": (["tiny", "--model.moe.top-k", "0"], r"top_k must be at least 1, but 0 was given"),
    "layers and list": (["tiny", "--model.layers", "3"], r"2 .*3"),
    "no length": (["tiny", "--steps", "0"], r"no length: give --tokens or --steps"),
    "long samples": (["tiny", "--seq-len", "100"], r"seq_len 100 is over model.max_positions 64"),
    "micro batch": (["tiny", "--micro-batch", "3"], r"micro_batch 3 does not divide a rank's 8 sequences"),
    "rates": (["tiny", "--optim.min-lr", "1.0"], r"min_lr 1.0 is not between 0 and optim.lr 0.003"),
    "bad steps": (["tiny", "--max-bad-steps", "0"], r"max_bad_steps is 0: give 1 or more"),
    "negative count": (["tiny", "--eval-batches", "-1"], r"eval_batches is -1: give 0 or more"),
    "negative leaf": (["tiny", "--checkpoint.every", "-5"], r"checkpoint.every is -5: give 0 or more"),
    "clip": (["tiny", "--optim.clip", "-1"], r"optim.clip is -1.0: give 0 or more"),
    "no patience": (["tiny", "--parallel.timeout-s", "0"], r"timeout_s is 0.0: give 1 to 590 seconds"),
    "much patience": (["tiny", "--parallel.timeout-s", "9999"], r"timeout_s is 9999.0: give 1 to 590 seconds"),
    "infinite rate": (["tiny", "--optim.lr", "inf"], r"optim.lr is inf: give a number above 0"),
    "beta": (["tiny", "--optim.beta2", "1"], r"optim.beta2 is 1.0: give a number from 0 to below 1"),
    "tp over ranks": (["tiny", "--parallel.tp", "2"], r"tp=2 does not divide 1 ranks: the nearest that does is 1"),
    "ep over ranks": (["tiny", "--parallel.ep", "2"], r"ep=2 does not divide 1 ranks: the nearest that does is 1"),
    "no data": (["tiny", "--parallel.device", "cpu"], r"no training data: give data.train"),
    "no such checkpoint": (["tiny", "--parallel.device", "cpu", "--checkpoint.resume", "x/step_1"], r"training data"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence(mistake: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, sentence = MISTAKES[mistake]
    assert re.search(sentence, refused(arguments, capsys, tmp_path / "runs" / "tiny"))


@pytest.mark.parametrize(
    ("world", "changes", "sentence"),
    [
        (3, {}, r"batch_size 8 does not divide over 3 ranks: use 6"),
        (16, {}, r"batch_size 8 does not divide over 16 ranks: use 16"),
        (16, {"tp": 2}, None),
        (32, {"tp": 2}, r"batch_size 8 does not divide over 16 data ranks: use 16"),
        (8, {"tp": 8}, r"tp=8 does not divide heads 2: the nearest that does is 2"),
        (8, {"ep": 3}, r"ep=3 does not divide 8 ranks: the nearest that does is 2 or 4"),
        (8, {"ep": 8}, None),  # layers of 4 and 8 experts: degrees 4 and 8
    ],
)
def test_a_world_that_does_not_fit(world: int, changes: dict, sentence: str | None) -> None:
    config = RECIPES["tiny"]()
    config = replace(config, parallel=replace(config.parallel, **changes))
    if sentence is None:
        check(config, world)
        return
    with pytest.raises(ValueError, match=sentence):
        check(config, world)


def test_experts_that_do_not_spread() -> None:
    config = RECIPES["tiny"]()
    model = replace(config.model, experts=(6, 6))
    with pytest.raises(ValueError, match=r"6 experts do not spread over ep=4 of 8 places .* nearest that does is 2"):
        check(replace(config, model=model, parallel=replace(config.parallel, ep=4)), 8)


def test_wrong_and_foreign_data(data: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    assert "nowhere.bin" in refused(flags(tmp_path / "nowhere", run), capsys, run)
    small = refused(flags(data, run, "--model.vocab-size", "120"), capsys, run)
    assert re.search(r"has 300 tokens but the model's vocabulary 120", small)
    for name in (".bin", ".idx"):  # tokens of a larger vocabulary than the tokenizer that lies beside them
        Path(f"{tmp_path / 'mixed'}{name}").write_bytes(Path(f"{data}{name}").read_bytes())
    train_bpe(["ab"], 257).save(tmp_path / "mixed.tokenizer.json")
    mixed = refused(flags(tmp_path / "mixed", run, "--model.vocab-size", "260"), capsys, run)
    assert re.search(r"mixed holds token \d+ but the model's vocabulary ends before 260", mixed)
    for name in (".bin", ".idx"):
        Path(f"{tmp_path / 'empty'}{name}").touch()
    assert "empty" in refused(flags(tmp_path / "empty", run), capsys, run)


def test_a_whole_run_and_what_it_leaves(data: Path, tmp_path: Path, capsys, caplog) -> None:
    """Also: the checkpoint of another model is refused, and the run that is done is left as it is."""
    run = tmp_path / "run"
    more = ["--steps", "3", "--checkpoint.every", "2", "--micro-batch", "4", "--parallel.recompute", "selective"]
    assert main(flags(data, run, *more)) == 0
    out, _ = capsys.readouterr()
    assert out.count("\nstep ") + out.startswith("step ") == 3
    config = from_dict(json.loads((run / "config.json").read_text()))
    assert config.steps == 3
    assert config.parallel.recompute == "selective"
    assert config.model == RECIPES["tiny"]().model
    assert from_dict(to_dict(config)) == config
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert environment["world"] == 1
    assert "commit" in environment
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3]
    assert sorted(p.name for p in (run / "model").iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    model = load_model(run / "model")
    assert isinstance(model, GPT)
    assert sum(p.numel() for p in model.parameters()) == count_params(config.model).total

    files = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
    sentence = refused(flags(data, run, *more, "--model.hidden", "48"), capsys)
    assert re.search(r"step_00000003 holds another model: model.hidden is 64 there and 48 here", sentence)
    assert files == {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}, "nothing is lost"

    newest = run / "checkpoints" / "step_00000003"
    shard = next(newest.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    sentence = refused(flags(data, run, *more, "--checkpoint.resume", str(newest)), capsys)
    assert re.search(r"step_00000003 is damaged.*newest whole one is .*step_00000002", sentence)
    assert main(flags(data, run, *more)) == 0
    _, err = capsys.readouterr()
    assert "passing over it" in err + caplog.text  # pytest takes over a logger that exists already
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3]


def test_full_disk_at_the_last_save_is_an_error(data: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    from coterie.train.checkpoint import Checkpointer

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpointer, "_write_shards", full)
    run = tmp_path / "run"
    assert main(flags(data, run, "--steps", "1", "--eval-batches", "0")) == 2
    _, err = capsys.readouterr()
    load_model(run / "model")  # a third of a checkpoint may still have room, and is what the run was for
    assert "step 1 was not written: [Errno 28] No space left on device; there is no older one" in err.splitlines()[-1]


def test_a_full_disk_leaves_the_config_whole(data: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    run = tmp_path / "run"
    assert main(flags(data, run, "--steps", "1", "--eval-batches", "0")) == 0
    before = (run / "config.json").read_text()
    real = Path.write_text

    def full(self: Path, text: str, *rest: str, **more: str) -> int:
        real(self, text[: len(text) // 2], *rest, **more)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    capsys.readouterr()
    assert main(flags(data, run, "--steps", "2", "--eval-batches", "0")) == 2
    assert "coterie: [Errno 28] No space left on device" in capsys.readouterr().err
    assert (run / "config.json").read_text() == before


def test_a_port_in_use_gets_one_sentence(data: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environment = os.environ | {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        done = subprocess.run(
            [sys.executable, "-m", "coterie.train.pretrain", *flags(data, tmp_path / "run")],
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
        )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("coterie: ")
    assert f"port {port} on 127.0.0.1 is in use" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_environment_that_is_not_torchruns(tmp_path: Path, monkeypatch, capsys) -> None:
    for world in ("two", "", "0"):
        monkeypatch.setenv("WORLD_SIZE", world)
        assert f"WORLD_SIZE={world!r} is not a number of ranks" in refused(["tiny"], capsys)


def test_the_traceback_can_be_asked_for(monkeypatch) -> None:
    monkeypatch.setenv("COTERIE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no recipe"):
        main(["tinny"])


def test_help(capsys) -> None:
    assert main([]) == 0
    listing = capsys.readouterr().out
    assert all(f"  {name}\n" in listing for name in RECIPES)
    assert main(["tiny", "--help"]) == 0
    text = capsys.readouterr().out
    for leaf in ("--optim.lr", "--model.moe.gate.aux-weight", "--checkpoint.resume", "--parallel.ep"):
        assert leaf in text


def test_overrides_reach_every_floor() -> None:
    config = parse(["350m_prmoe", "--model.moe.gate.capacity-factor", "None", "--model.experts", *["0"] * 23, "8"])
    assert config is not None
    assert config.model.moe.gate.capacity_factor is None
    assert config.model.experts == (0,) * 23 + (8,)
    assert config.optim.lr == 3e-4


def test_a_part_that_a_recipe_may_lack_has_leaves_where_it_is(monkeypatch) -> None:
    config = RECIPES["tiny"]()
    config = replace(config, model=replace(config.model, rope_scaling=RopeScaling("linear", 2.0)))
    monkeypatch.setitem(RECIPES, "stretched", lambda: config)
    changed = parse(["stretched", "--model.rope-scaling.factor", "3.0", "--steps", "7"])
    assert changed is not None
    assert changed.model.rope_scaling == RopeScaling("linear", 3.0)
    for wrong in ("--model.rope-scaling.factor", "--model.rope-scaling"):
        with pytest.raises(ValueError, match=f"has no option {wrong}") as refused:
            parse(["tiny", wrong, "3.0"])
        assert str(refused.value).count(f"{wrong},") == 0, "what does not exist is not the nearest"


def test_every_recipe_is_sound() -> None:
    """Fits its own ranks; ablations and the quickstart's twins activate the same parameters."""
    for name, recipe in RECIPES.items():
        config = recipe()
        check(config, config.parallel.ep)
        assert from_dict(to_dict(config)) == config, name
    for group, reference in (("wikitext_", "wikitext_dense"), ("quickstart_", "quickstart_dense")):
        expected = count_params(RECIPES[reference]().model)
        for name in RECIPES:
            if name.startswith(group):
                model = RECIPES[name]().model
                routers = sum(e * model.dim for e in model.experts) + 3 * model.dim * len(model.experts)
                extra = count_params(model).activated - expected.activated
                assert 0 <= extra <= routers, f"{name}: {extra} more than the dense one, routers have {routers}"


def test_paper_recipes_are_the_published_ones() -> None:
    """DeepSpeed-MoE's scripts: 300B tokens, warm-up 375M, batch, rates and their decay by model."""
    config = RECIPES["350m_prmoe"]()
    assert (config.batch_size, config.seq_len, config.tokens) == (256, 2048, 300_000_000_000)
    optim = config.optim
    assert (optim.lr, optim.min_lr, optim.warmup_tokens, optim.decay_tokens) == (3e-4, 1e-6, 375e6, 300e9)
    assert (optim.beta1, optim.beta2, optim.weight_decay, optim.clip, optim.schedule) == (
        0.9,
        0.95,
        0.1,
        1.0,
        "cosine",
    )
    assert sorted(set(config.model.experts)) == [0, 32, 64]
    assert config.model.experts.count(64) == 2
    assert config.model.moe.residual
    assert config.model.moe.gate.aux_weight == 0.01
    dense = RECIPES["1.3b_dense"]()
    assert (dense.batch_size, dense.optim.lr, dense.optim.min_lr, dense.optim.decay_tokens) == (
        512,
        2e-4,
        2e-5,
        260e9,
    )
    assert RECIPES["6.7b_dense"]().model.init_std == 0.01


def test_the_order_of_samples_depends_on_what_was_consumed_alone(data: Path, tmp_path: Path) -> None:
    """steps(16) goes on where steps(0) stands after two steps of 8; two ranks see the halves of one."""
    config = parse(flags(data, tmp_path / "run", "--micro-batch", "2"))
    assert config is not None
    ranks = Ranks(0, 0, 1, torch.device("cpu"))
    flow = session.Data(config, ranks)
    first = [torch.cat([b.tokens_BS for b in step]) for step, _ in zip(flow.steps(0), range(4), strict=False)]
    later = [torch.cat([b.tokens_BS for b in step]) for step, _ in zip(flow.steps(16), range(2), strict=False)]
    assert [tuple(t.shape) for t in first] == [(8, 32)] * 4
    assert torch.equal(first[2], later[0])
    assert torch.equal(first[3], later[1])
    halves = [session.Data(config, Ranks(r, r, 2, torch.device("cpu"))) for r in range(2)]
    parts = [torch.cat([b.tokens_BS for b in next(half.steps(8))]) for half in halves]
    assert torch.equal(torch.cat(parts), first[1])
    assert len(list(flow.valid())) == config.eval_batches * 4


def test_another_length_goes_on_unless_it_changes_the_order_of_samples(data: Path, tmp_path: Path, capsys) -> None:
    """The number of epochs decides in what order megatron-core shuffles them."""
    run = tmp_path / "run"
    for steps in ("2", "3"):
        assert main(flags(data, run, "--eval-batches", "0", "--steps", steps)) == 0
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3]
    capsys.readouterr()
    longer = refused(flags(data, run, "--eval-batches", "0", "--steps", "400"), capsys)
    assert re.search(r"step_00000003 has seen other samples .* length of the run was changed", longer)
