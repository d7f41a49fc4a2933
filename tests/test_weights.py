"""Model directories: what is written comes back, and what does not fit is refused whole."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from coterie.models import stored
from coterie.models.config import ModelConfig
from coterie.models.config_file import config_from_dict, config_to_dict
from coterie.models.gpt import GPT
from coterie.models.presets import PRESETS
from coterie.models.tensor_files import split_names
from coterie.models.tokenizer import Tokenizer, train_bpe
from coterie.models.weights import full_state_dict, load_model, read_config, save_model
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

    monkeypatch.setattr("coterie.models.tensor_files.Drafts._open", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(saved, load_model(saved))
    assert (saved / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_a_full_disk_is_an_os_error(saved: Path, tmp_path: Path) -> None:
    """The library has an error of its own, which no caller expects."""
    script = """
import resource, signal, sys
from coterie.models.weights import load_model, save_model
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = load_model(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
try:
    save_model(sys.argv[2], model)
except OSError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(saved), str(tmp_path / "new")], capture_output=True, text=True, timeout=120
    )
    assert "model.safetensors could not be written" in done.stdout, done.stderr
    assert list((tmp_path / "new").iterdir()) == []


FILES = [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]


def _split(saved: Path) -> Path:
    save_model(saved, load_model(saved), file_bytes=18_000)
    return saved


def test_a_large_model_is_cut_into_files(saved: Path) -> None:
    """As Hugging Face does: an index names each tensor's file; the two forms replace each other without leftovers."""
    whole = load_file(saved / "model.safetensors")
    others = ["config.json", "tokenizer.json"]
    _split(saved)
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    assert sorted(p.name for p in saved.iterdir()) == sorted([*others, *FILES, "model.safetensors.index.json"])
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert index["weight_map"].keys() == whole.keys()
    for file in FILES:
        part = load_file(saved / file)
        assert {name for name, home in index["weight_map"].items() if home == file} == part.keys()
        assert sum(tensor.nbytes for tensor in part.values()) <= 18_000 or len(part) == 1
        assert all(torch.equal(tensor, whole[name]) for name, tensor in part.items())
    loaded = load_model(saved)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in loaded.state_dict().items())
    save_model(saved, loaded)
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert torch.equal(load_model(saved).embed.weight, loaded.embed.weight)


def test_what_a_killed_save_left_is_taken_away(saved: Path) -> None:
    (saved / ".partial").mkdir()
    (saved / ".partial" / "model.safetensors").write_bytes(b"half")
    save_model(saved, load_model(saved))
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_files_are_filled_in_order() -> None:
    assert split_names({"a": 3, "b": 4}, 7) == {"model.safetensors": ["a", "b"]}
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    groups = [["a"], ["b"], ["c", "d"]]
    assert split_names({"a": 3, "b": 40, "c": 3, "d": 4}, 7) == dict(zip(names, groups, strict=True))


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("{", "is not JSON"),
        ('{"weight_map": 3}', "is damaged or no index"),
        ("[]", "holds no JSON object"),
        ('{"weight_map": {"a": "../other/model.safetensors"}}', "names '../other/model.safetensors', expected a"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "names '/etc/passwd', expected a .safetensors file beside it"),
        ('{"weight_map": {"a": 3}}', "names 3, expected a"),
    ],
)
def test_an_index_that_leads_astray_is_refused(saved: Path, index: str, words: str) -> None:
    (_split(saved) / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=words):
        load_model(saved)


def test_files_of_an_index_must_be_there_and_hold_each_tensor_once(saved: Path) -> None:
    first, second = (_split(saved) / file for file in FILES[:2])
    kept = load_file(second)
    save_file(kept | {"final_norm.weight": torch.zeros(24)}, second)
    with pytest.raises(
        ValueError, match=r"what model-00002-of-00004\.safetensors holds: it lacks final_norm\.weight"
    ):
        load_model(saved)
    missing = next(iter(kept))
    save_file({name: tensor for name, tensor in kept.items() if name != missing}, second)
    with pytest.raises(ValueError, match=f"it has '{missing}' in model-00002-of-00004.safetensors, which lacks it"):
        load_model(saved)
    first.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model-00001-of-00004\.safetensors"):
        load_model(saved)


def test_integers_are_no_weights(saved: Path) -> None:
    _change(saved, **{"embed.weight": torch.zeros(300, 24, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"embed\.weight is stored as I64, expected one of"):
        load_model(saved)


def test_a_config_of_another_size_takes_no_memory(saved: Path) -> None:
    """A wrong number in config.json is refused before anything of that size is made."""
    data = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(data | {"vocab_size": 10**13}))
    with pytest.raises(ValueError, match=r"embed\.weight has shape \[300, 24\], expected \[10000000000000, 24\]"):
        load_model(saved)
    (saved / "config.json").write_text(json.dumps(data | {"layers": 10**9, "experts": []}))
    with pytest.raises(ValueError, match="1000000000 layers need more tensors"):
        load_model(saved)


@pytest.mark.parametrize("name", PRESETS)
def test_configs_come_back(name: str) -> None:
    config = PRESETS[name]()
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "rwkv"}, "model_type 'rwkv', which coterie does not know: coterie reads coterie, llama"),
        ({"layers": "two"}, "layers is 'two', expected int"),
        ({"colour": 1}, "unknown field colour"),
        ({"norm": "batchnorm"}, "norm is 'batchnorm'"),
        ({"mlp_bias": 1}, "mlp_bias is 1, expected bool"),
        ({"attention_bias": True}, "attention_bias is True, expected"),
        ({"rope_scaling": 2}, "rope_scaling is 2, expected"),
        (
            {"rope_scaling": {"kind": "linear", "factor": "2", "base": 1}},
            "factor is '2'.*; unknown field rope_scaling.base",
        ),
        ({"rope_scaling": {"kind": "linear"}}, "rope_scaling lacks factor"),
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


@pytest.mark.parametrize("shape", [(), (7,), (5, 6), (3, 4, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("piece", [1, 40, 1 << 24])
def test_any_box_of_a_stored_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], piece: int
) -> None:
    """Rows are read in pieces, by several threads, into memory of any stride and type."""
    monkeypatch.setattr(stored, "PIECE", piece)
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    save_file({"before": torch.ones(3), "it": tensor}, tmp_path / "model.safetensors")
    there, chosen = stored.StoredTensors(tmp_path), random.Random(0)
    assert torch.equal(there.read("it", ()), tensor)
    for _ in range(30):
        cuts = [sorted(chosen.choices(range(size + 1), k=2)) for size in shape]
        box = tuple(slice(*cut) for cut in cuts)
        assert torch.equal(there.read("it", box), tensor[box])
        strided = torch.zeros(*tensor[box].shape, 2, dtype=torch.float64)[..., 0]
        there.fill(strided, "it", box)
        assert torch.equal(strided, tensor[box].double())


def test_a_file_that_becomes_shorter_is_told(tmp_path: Path) -> None:
    save_file({"it": torch.ones(1000)}, tmp_path / "model.safetensors")
    there = stored.StoredTensors(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 2000)
    with pytest.raises(ValueError, match=r"model\.safetensors has become shorter while it was read"):
        there.read("it", ())
