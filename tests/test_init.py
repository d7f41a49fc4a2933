"""`coterie pretrain --init DIR`: the run starts from the directory's model, on any layout, and only once."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import build, write_text

from coterie.models.config import ModelConfig
from coterie.models.tokenizer import train_bpe
from coterie.models.upcycle import Upcycling
from coterie.models.weights import load_model, read_config, save_model
from coterie.moe.config import GateConfig
from coterie.train.config import TrainConfig
from coterie.train.metrics import read_metrics
from coterie.train.prepare import prepare
from coterie.train.pretrain import main, parse
from coterie.train.upcycle import upcycle

TIMEOUT = 240  # seconds
DENSE = ModelConfig(vocab_size=300, max_positions=32, layers=2, dim=24, heads=4, hidden=48, init_std=0.1)
PLAIN = Upcycling((4, 4), 2, granularity=2, gate=GateConfig(aux_weight=0.0))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files, a dense model with their tokenizer, and a MoE made of it."""
    folder = tmp_path_factory.mktemp("made")
    prepare([write_text(folder / "text.txt")], folder / "train", train_vocab=300, split="blank", quiet=True)
    save_model(folder / "dense", build(DENSE))
    (folder / "dense" / "tokenizer.json").write_bytes((folder / "train.tokenizer.json").read_bytes())
    upcycle(folder / "dense", folder / "moe", PLAIN)
    return folder


def flags(made: Path, run: Path, model: str, *more: str) -> list[str]:
    base = ["tiny", "--init", str(made / model), "--run-dir", str(run), "--data.train", str(made / "train")]
    base += ["--data.split", "90,10,0", "--parallel.device", "cpu", "--parallel.threads", "1"]
    return [*base, "--log.tensorboard", "False", "--eval-batches", "0", *more]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run)]


def test_a_run_starts_from_the_model_of_a_directory(made: Path, tmp_path: Path, capsys) -> None:
    """The first loss is the directory's; the recipe's own model is not there any more."""
    for model in ("dense", "moe"):
        assert main(flags(made, tmp_path / model, model, "--steps", "3")) == 0
        assert f"starts from the weights of {made / model}" in capsys.readouterr().err
        assert read_config(tmp_path / model / "model") == read_config(made / model)
    assert losses(tmp_path / "moe")[0] == pytest.approx(losses(tmp_path / "dense")[0], rel=1e-5)
    assert losses(tmp_path / "moe")[2] != pytest.approx(losses(tmp_path / "dense")[2], rel=1e-5)
    assert main(["tiny", *flags(made, tmp_path / "seed", "moe", "--steps", "1")[3:]]) == 0
    assert abs(losses(tmp_path / "seed")[0] - losses(tmp_path / "moe")[0]) > 1e-3, "another model has another loss"


@pytest.mark.dist
def test_every_rank_reads_its_own_experts(made: Path, tmp_path: Path) -> None:
    """Two ranks with two of four experts each train as one rank does."""
    assert main(flags(made, tmp_path / "one", "moe", "--steps", "3")) == 0
    words = flags(made, tmp_path / "two", "moe", "--steps", "3", "--parallel.ep", "2")
    command = [sys.executable, "-m", "coterie.cli", "pretrain", *words, "--ranks", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    one, two = (load_model(tmp_path / run / "model").state_dict() for run in ("one", "two"))
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-3


def test_a_run_that_goes_on_does_not_read_the_weights_again(made: Path, tmp_path: Path, capsys) -> None:
    save_model(tmp_path / "dense", load_model(made / "dense"))
    assert main(flags(tmp_path, tmp_path / "run", "dense", "--data.train", str(made / "train"), "--steps", "2")) == 0
    (tmp_path / "dense" / "model.safetensors").unlink()
    capsys.readouterr()
    assert main(flags(tmp_path, tmp_path / "run", "dense", "--data.train", str(made / "train"), "--steps", "3")) == 0
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3]
    assert "starts from" not in capsys.readouterr().err
    assert main(flags(tmp_path, tmp_path / "new", "dense", "--data.train", str(made / "train"), "--steps", "3")) == 2
    assert "model.safetensors" in capsys.readouterr().err


def test_settings_of_the_directory_go_before_the_recipes(made: Path) -> None:
    config = parse(flags(made, Path("run"), "moe", "--model.moe.gate.aux-weight", "0.5"))
    assert isinstance(config, TrainConfig)
    assert config.model.experts == (4, 4)
    assert config.model.moe.gate.aux_weight == 0.5, "a setting of the loss can be given"
    assert config.init == str(made / "moe")
    joined = parse(["continue", f"--init={made / 'dense'}"])
    assert joined is not None
    assert joined.model == DENSE


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (
            ["--model.hidden", "40"],
            r"the model of --init .*moe has model.hidden 48, but 40 was given: leave the option",
        ),
        (["--model.moe.top-k", "1"], r"has model.moe.top_k 2, but 1 was given"),
        (["--model.moe.gate.bias-update", "0.001"], r"has model.moe.gate.bias_update 0.0, but 0.001 was given"),
        (["--seq-len", "40"], r"seq_len 40 is over model.max_positions 32"),
        (["--init", "nowhere"], r"nowhere is not a model directory: it has no config.json"),
        (
            ["--data.tokenizer", "OTHER"],
            r"another tokenizer than the model of --init .* prepare the data with --token",
        ),
    ],
)
def test_what_contradicts_it_is_one_sentence(
    more: list[str], sentence: str, made: Path, tmp_path: Path, capsys
) -> None:
    if "OTHER" in more:
        train_bpe(["other words entirely"], 290).save(tmp_path / "other.json")
        more = [more[0], str(tmp_path / "other.json")]
    assert main(flags(made, tmp_path / "run", "moe", *more)) == 2
    err = capsys.readouterr().err
    assert re.search(sentence, err), err
    assert err.count("\n") == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_data_of_a_larger_vocabulary_is_refused(made: Path, tmp_path: Path, capsys) -> None:
    save_model(tmp_path / "small", build(ModelConfig(**{**vars(DENSE), "vocab_size": 260})))
    assert main(flags(tmp_path, tmp_path / "run", "small", "--data.train", str(made / "train"))) == 2
    err = capsys.readouterr().err
    assert "has 300 tokens but the model's vocabulary 260" in err
    assert "prepare the data with the model's tokenizer" in err


def test_the_recipe_for_going_on_needs_a_model(capsys) -> None:
    assert main(["continue"]) == 2
    assert "goes on from a model: give its directory with --init" in capsys.readouterr().err
    assert main(["continue", "--help"]) == 0


def test_a_directory_of_hugging_face_is_a_start_too(made: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
        vocab_size=300,
        hidden_size=24,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    transformers.OlmoeForCausalLM(config).save_pretrained(tmp_path / "olmoe")
    words = flags(tmp_path, tmp_path / "run", "olmoe", "--data.train", str(made / "train"), "--steps", "2")
    assert main(words) == 0
    told = json.loads((tmp_path / "run" / "config.json").read_text())
    assert told["model"]["experts"] == [4, 4]
    assert told["init"] == str(tmp_path / "olmoe")
    assert load_model(tmp_path / "run" / "model").config == read_config(tmp_path / "olmoe")
