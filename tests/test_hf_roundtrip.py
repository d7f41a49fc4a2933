"""From transformers into coterie and back: the very same file, and a config that means an equal model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import Held, assert_close_rms
from hf_models import CASES, FAMILIES, opened, saved, tokens_for
from safetensors.torch import load_file, save_file

from coterie.models.config import ModelConfig
from coterie.models.gpt import GPT
from coterie.models.hf import FAMILIES as TABLE
from coterie.models.hf import config_of, inward, outward, same_function, shapes_of, upstream
from coterie.models.presets import PRESETS
from coterie.models.stored import StoredTensors
from coterie.models.weights import load_model, open_model
from coterie.moe.config import GateConfig, MoEConfig

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "seed"), CASES)
def test_the_same_file_comes_back(tmp_path: Path, family: str, seed: int, dtype: torch.dtype) -> None:
    saved(tmp_path, family, seed, dtype)
    file = load_file(tmp_path / "model.safetensors")
    config, stored = open_model(tmp_path)
    assert set(stored.names()) == set(shapes_of(config))
    for ours in (stored, Held(load_model(tmp_path).state_dict())):
        back = outward(TABLE[family], config, ours)
        assert sorted(back.names()) == sorted(file)
        for name, tensor in file.items():
            assert back.shape(name) == tuple(tensor.shape)
            assert back.dtype(name) == dtype or ours is not stored  # a model holds its routers in fp32
            assert torch.equal(back.read(name, ()).to(dtype), tensor), name


@pytest.mark.parametrize(("family", "seed"), CASES)
def test_the_config_comes_back(tmp_path: Path, family: str, seed: int) -> None:
    theirs = saved(tmp_path, family, seed)
    config = config_of(json.loads((tmp_path / "config.json").read_text()))
    found = upstream(config)
    assert found is not None
    # A model of which no layer turned out sparse is one of a plainer architecture.
    assert found.model_type == (family if any(config.experts) else family.removesuffix("_moe"))
    data = found.write(config)
    assert data["architectures"] == [found.architecture]
    again = config_of(json.loads(json.dumps(data)))
    assert same_function(again, config)
    assert again.init_std == config.init_std
    if any(config.experts):
        assert again.moe.gate == config.moe.gate

    (tmp_path / "config.json").write_text(json.dumps(data))
    reopened, tokens_BS = opened(tmp_path), tokens_for(theirs)
    assert type(reopened).__name__ == found.architecture
    with torch.no_grad():
        assert_close_rms(reopened(tokens_BS).logits, theirs(tokens_BS).logits, 1e-6, "logits")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_our_own_leaves(tmp_path: Path, family: str) -> None:
    """Weights that coterie made, written by the table, opened by transformers."""
    saved(tmp_path, family, 2)
    config = config_of(json.loads((tmp_path / "config.json").read_text()))
    model = GPT(config).eval()
    model.init_weights(7)
    back = outward(TABLE[family], config, Held(model.state_dict()))
    save_file({name: back.read(name, ()).contiguous() for name in back.names()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(TABLE[family].write(config)))
    theirs = opened(tmp_path)
    with torch.no_grad():
        tokens_BS = tokens_for(theirs)
        assert_close_rms(theirs(tokens_BS).logits, model(tokens_BS).logits_BSV, 1e-5, "logits")


def _changes() -> dict[str, ModelConfig]:
    """What no upstream architecture computes."""
    dense = ModelConfig(vocab_size=50, dim=16, heads=4, hidden=12, layers=3)
    moe = MoEConfig(hidden=8, top_k=2)
    sparse = replace(dense, experts=(4, 4, 4), moe=moe)
    assert upstream(dense) is TABLE["llama"]
    assert upstream(sparse) is TABLE["mixtral"]
    assert upstream(replace(sparse, moe=replace(moe, gate=GateConfig(renormalize="none")))) is None  # OLMoE norms qk

    def gated(**options: object) -> ModelConfig:
        return replace(sparse, moe=replace(moe, gate=GateConfig(**options)))

    return {
        "a pyramid": replace(sparse, experts=(4, 4, 8)),
        "a dense layer": replace(sparse, experts=(0, 4, 4)),
        "residual experts": replace(sparse, moe=replace(moe, residual=True)),
        "a shared expert without a gate": replace(sparse, moe=replace(moe, shared_hidden=4)),
        "experts with biases": replace(sparse, moe=replace(moe, bias=True)),
        "experts of gelu": replace(sparse, moe=replace(moe, activation="gelu")),
        "one expert": replace(sparse, moe=replace(moe, top_k=1)),
        "sigmoid scores": gated(score="sigmoid"),
        "a selection bias": gated(bias_update=0.1),
        "drops outside training": gated(eval_capacity_factor=1.0),
        "groups of experts": gated(groups=2, topk_groups=1),
        "scaled weights": gated(route_scale=2.5),
        "layer norms": replace(dense, norm="layernorm"),
        "learned positions": replace(dense, positions="learned"),
        "heads of another width": replace(dense, dim=18, head_dim=4),
        "gelu": replace(dense, activation="gelu"),
        "few keys in GPT-2": replace(LIKE_GPT2, kv_heads=1),
    }


LIKE_GPT2 = ModelConfig(
    vocab_size=50,
    dim=16,
    heads=4,
    hidden=12,
    layers=3,
    activation="gelu",
    norm="layernorm",
    positions="learned",
    attention_bias="all",
    mlp_bias=True,
)


@pytest.mark.parametrize("name", _changes())
def test_what_no_other_architecture_computes(name: str) -> None:
    assert upstream(_changes()[name]) is None


def test_what_only_training_looks_at_does_not_matter() -> None:
    assert upstream(LIKE_GPT2) is TABLE["gpt2"]
    gate = GateConfig(capacity_factor=1.25, noise="gumbel", aux_weight=0.5, z_weight=0.1, renormalize="after_drop")
    sparse = ModelConfig(
        vocab_size=50, dim=16, heads=4, layers=2, experts=(4, 4), moe=MoEConfig(gate=gate), init_std=0.5
    )
    assert upstream(sparse) is TABLE["mixtral"]
    assert upstream(replace(sparse, experts=(0, 0), moe=MoEConfig(residual=True))) is TABLE["llama"]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_find_their_family_or_none(name: str) -> None:
    found = upstream(PRESETS[name]())
    if found is not None:
        assert same_function(config_of(found.write(PRESETS[name]())), PRESETS[name]())


def test_a_view_of_a_table_reads_boxes(tmp_path: Path) -> None:
    """Any rank's box of any tensor is that part of the whole, in the stacked layout too."""
    theirs = saved(tmp_path, "qwen2_moe", 0)
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    (tmp_path / "stacked").mkdir()
    save_file(state, tmp_path / "stacked" / "model.safetensors")
    config, split = open_model(tmp_path)
    stacked = inward(TABLE["qwen2_moe"], config, StoredTensors(tmp_path / "stacked"))
    for name in split.names():
        shape = split.shape(name)
        box = tuple(slice(size // 3, size - size // 4) for size in shape)
        whole = split.read(name, ())
        assert torch.equal(split.read(name, box), whole[box]), name
        assert torch.equal(stacked.read(name, box), whole[box]), name
