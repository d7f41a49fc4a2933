"""Model directories: what is written comes back, and what does not fit is refused whole."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from coterie.models.config import ModelConfig
from coterie.models.gpt import GPT
from coterie.models.presets import PRESETS
from coterie.models.tokenizer import Tokenizer, train_bpe
from coterie.models.weights import (
    config_from_dict,
    config_to_dict,
    full_state_dict,
    load_model,
    read_config,
    save_model,
)
from coterie.moe.config import GateConfig, MoEConfig

CONFIG = ModelConfig(
    vocab_size=300,
    max_positions=16,
    layers=2,
    dim=24,
    heads=4,
    kv_heads=2,
    hidden=20,
    experts=(0, 4),
    moe=MoEConfig(top_k=2, hidden=12, residual=True, gate=GateConfig(bias_update=0.01)),
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = GPT(CONFIG)
    model.init_weights(4)
    with torch.no_grad():
        model.moe_layers[0].gate.bias_E.copy_(torch.tensor([0.03, -0.01, 0.0, 0.02]))
    save_model(tmp_path / "model", model, train_bpe(["some text"], 300))
    return tmp_path / "model"


def _change(folder: Path, **changes: torch.Tensor | None) -> None:
    state = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor
    save_file(state, folder / "model.safetensors")


def test_a_model_comes_back(saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (saved / "model.safetensors").stat().st_mode == (saved / "config.json").stat().st_mode
    original = GPT(CONFIG)
    original.init_weights(4)
    loaded = load_model(saved, device="cpu")
    assert loaded.config == CONFIG
    for name, parameter in original.named_parameters():
        assert torch.equal(dict(loaded.named_parameters())[name], parameter), name
    assert loaded.moe_layers[0].gate.bias_E.tolist() == pytest.approx([0.03, -0.01, 0.0, 0.02])
    tokens_BS = torch.randint(0, 300, (2, 5))
    original.moe_layers[0].gate.bias_E.copy_(loaded.moe_layers[0].gate.bias_E)
    assert torch.equal(loaded(tokens_BS).logits_BSV, original(tokens_BS).logits_BSV)
    assert Tokenizer(saved).vocab_size <= 300


def test_a_tied_head_is_stored_once(saved: Path) -> None:
    assert "head.weight" not in load_file(saved / "model.safetensors")
    untied = GPT(replace(CONFIG, tied_head=False))
    untied.init_weights(4)
    save_model(saved, untied)
    assert torch.equal(load_model(saved).head.weight, untied.head.weight)


@pytest.mark.parametrize("when", ["saving", "loading"])
def test_bf16_leaves_the_router_in_fp32(saved: Path, when: str) -> None:
    if when == "saving":
        save_model(saved, load_model(saved), dtype=torch.bfloat16)
        loaded = load_model(saved)
    else:
        loaded = load_model(saved, dtype=torch.bfloat16)
    kinds = {name: tensor.dtype for name, tensor in loaded.state_dict().items()}
    wide = {name for name, kind in kinds.items() if kind == torch.float32}
    assert wide == {"blocks.1.moe.gate.weight", "blocks.1.moe.gate.bias_E"}
    assert set(kinds.values()) == {torch.float32, torch.bfloat16}
    out = loaded(torch.randint(0, 300, (2, 5)))
    assert out.logits_BSV.dtype == torch.bfloat16
    assert load_model(saved, dtype=torch.float32).embed.weight.dtype == torch.float32


def test_all_that_does_not_fit_is_named_at_once(saved: Path) -> None:
    _change(
        saved,
        **{
            "final_norm.weight": None,
            "stranger.weight": torch.zeros(3),
            "blocks.1.moe.experts.w_in": torch.zeros(3, 2, 12, 24),
        },
    )
    with pytest.raises(ValueError, match="does not fit the model") as caught:
        load_model(saved)
    message = str(caught.value)
    assert "final_norm.weight is missing" in message
    assert "stranger.weight is unknown" in message
    assert "blocks.1.moe.experts.w_in has shape [3, 2, 12, 24], expected [4, 2, 12, 24]" in message


def test_a_damaged_file_is_refused(saved: Path) -> None:
    data = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_model(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        load_model(saved)


def test_a_failed_save_leaves_the_old_model(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (saved / "model.safetensors").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("coterie.models.weights.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(saved, load_model(saved))
    assert (saved / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize("name", PRESETS)
def test_configs_come_back(name: str) -> None:
    config = PRESETS[name]()
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llama"}, "model_type 'llama', expected 'coterie'"),
        ({"layers": "two"}, "layers is 'two', expected int"),
        ({"colour": 1}, "unknown field colour"),
        ({"norm": "batchnorm"}, "norm is 'batchnorm'"),
        ({"bias": 1}, "bias is 1, expected bool"),
        ({"experts": [0, "4"]}, "experts is"),
        (
            {"moe": {"gate": {"score": "relu", "scale": 2}}},
            "moe.gate.score is 'relu'.*; unknown field moe.gate.scale",
        ),
        ({"heads": 5}, "24 does not split into 5 heads"),
    ],
)
def test_wrong_configs_are_refused(saved: Path, change: dict, words: str) -> None:
    data = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(data | change))
    with pytest.raises(ValueError, match=words):
        read_config(saved)


def test_files_that_are_no_config(saved: Path, tmp_path: Path) -> None:
    (saved / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds no JSON object"):
        read_config(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_config(saved)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        read_config(tmp_path)


def test_full_state_dict_of_a_plain_model() -> None:
    model = GPT(CONFIG)
    model.init_weights(1)
    state = full_state_dict(model)
    assert state.keys() == model.state_dict().keys()
    state["embed.weight"].zero_()
    assert model.embed.weight.abs().sum() > 0, "the dict must be a copy"
