"""Entries take a model of the hub by name; here its cache is a folder that the test made."""

from pathlib import Path

import pytest
import torch
from deepspeed_files import TOP2, small_model, write

from coterie import cli
from coterie.models.config import ModelConfig
from coterie.models.gpt import GPT
from coterie.models.weights import load_model, save_model
from coterie.train.pretrain import parse

NAME = "hf://org/small@main"
CONFIG = ModelConfig(vocab_size=48, max_positions=32, layers=2, dim=16, heads=2, hidden=24)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "0123abc"
    model = GPT(CONFIG)
    model.init_weights(0)
    save_model(folder, model)
    monkeypatch.setattr("coterie.models.hub._download", lambda name, repo, revision: str(folder))
    return folder


def test_convert_and_upcycle(hub: Path, tmp_path: Path) -> None:
    cli.main(["convert", NAME, str(tmp_path / "out")])
    tokens = torch.arange(20).view(2, 10)
    there, here = (load_model(folder)(tokens).logits_BSV for folder in (tmp_path / "out", hub))
    assert torch.equal(there, here)
    cli.main(["upcycle", NAME, str(tmp_path / "moe"), "--experts", "4"])
    assert load_model(tmp_path / "moe").config.experts == (4, 4)


def test_a_run_starts_from_it(hub: Path) -> None:
    config = parse(["tiny", "--init", NAME])
    assert config is not None
    assert (config.init, config.model) == (str(hub), CONFIG)


def test_a_checkpoint_of_deepspeed(tmp_path: Path) -> None:
    model = small_model(TOP2)
    write(tmp_path / "theirs", model, 2, order="split", args=None)
    hints = ["--heads", "4", "--top-k", "2", "--qkv", "split"]
    cli.main(["convert", str(tmp_path / "theirs"), str(tmp_path / "out"), "--from", "deepspeed", *hints])
    tokens = torch.arange(18).view(2, 9)
    assert torch.equal(load_model(tmp_path / "out").eval()(tokens).logits_BSV, model(tokens).logits_BSV)


def test_hints_need_a_checkpoint_of_deepspeed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["convert", str(tmp_path), str(tmp_path / "out"), "--heads", "2"])
    assert "are for --from deepspeed alone" in capsys.readouterr().err
