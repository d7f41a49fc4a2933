"""Models that transformers made, opened by coterie: the same logits, at once and token by token, in every layout
that they are stored in."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_close_rms, stepwise
from hf_models import CASES, FAMILIES, opened, saved, tokens_for
from safetensors.torch import load_file, save_file
from torch import Tensor

from coterie.models.gpt import GPT
from coterie.models.weights import load_model, open_model

pytestmark = pytest.mark.filterwarnings("ignore")


def _check(ours: GPT, theirs: Any, tokens_BS: Tensor) -> None:
    with torch.no_grad():
        assert_close_rms(ours.eval()(tokens_BS).logits_BSV, theirs(tokens_BS).logits, 1e-5, "logits")


def _in_memory(model: Any) -> dict[str, Tensor]:
    """Its tensors as transformers holds them: experts stacked."""
    state = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def _old(folder: Path) -> None:
    """config.json as it was before rope_parameters, where the names of experts' numbers differed too."""
    data = json.loads((folder / "config.json").read_text())
    rope = data.pop("rope_parameters", None)
    if rope is not None:
        data["rope_theta"] = rope.pop("rope_theta")
        kind = rope.pop("rope_type")
        data["rope_scaling"] = (
            None if kind == "default" else rope | {"type" if kind == "linear" else "rope_type": kind}
        )
    data["torch_dtype"] = data.pop("dtype")
    if data["model_type"] == "qwen3_moe":
        data["num_experts"] = data.pop("num_local_experts")
    (folder / "config.json").write_text(json.dumps(data))


@pytest.mark.parametrize(("family", "seed"), CASES)
def test_logits_and_decoding(tmp_path: Path, family: str, seed: int) -> None:
    theirs = saved(tmp_path, family, seed)
    ours, tokens_BS = load_model(tmp_path), tokens_for(theirs)
    _check(ours, theirs, tokens_BS)

    past, pieces = None, [5] + [1] * (tokens_BS.shape[1] - 5)
    with torch.no_grad():
        for step_BS, mine in zip(tokens_BS.split(pieces, 1), stepwise(ours, tokens_BS, pieces), strict=True):
            out = theirs(step_BS, past_key_values=past, use_cache=True)
            past = out.past_key_values
            assert_close_rms(mine[:, -1], out.logits[:, -1], 1e-5, "logits of a step")


@pytest.mark.parametrize(("family", "seed"), CASES)
def test_every_layout_on_disk(tmp_path: Path, family: str, seed: int) -> None:
    """Stacked experts, files cut by an index, names without their first word, and the older config.json."""
    theirs = saved(tmp_path / "one", family, seed)
    expected = load_model(tmp_path / "one").state_dict()
    saved(tmp_path / "cut", family, seed, max_shard_size="1KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1
    saved(tmp_path / "stacked", family, seed)
    save_file(_in_memory(theirs), tmp_path / "stacked" / "model.safetensors")
    saved(tmp_path / "bare", family, seed)
    file = tmp_path / "bare" / "model.safetensors"
    save_file({n.removeprefix("model.").removeprefix("transformer."): t for n, t in load_file(file).items()}, file)
    saved(tmp_path / "old", family, seed)
    _old(tmp_path / "old")
    for layout in ("cut", "stacked", "bare", "old"):
        found = load_model(tmp_path / layout)
        assert found.config == load_model(tmp_path / "one").config
        for name, tensor in found.state_dict().items():
            assert torch.equal(tensor, expected[name]), f"{layout} {name}"
    _check(found, theirs, tokens_for(theirs))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_holds_no_weight_is_passed_over(tmp_path: Path, family: str) -> None:
    theirs = saved(tmp_path, family, 0)
    tensors = load_file(tmp_path / "model.safetensors")
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    if family == "gpt2":  # as it was published: no first word, and its mask beside it
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        more = {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(tensors | more, tmp_path / "model.safetensors")
    _check(load_model(tmp_path), theirs, tokens_for(theirs))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stored_head_beside_a_tied_one(tmp_path: Path, family: str) -> None:
    """It is taken if it is the embedding; else one of the two would be lost, and is refused."""
    theirs = saved(tmp_path, family, 0 if family == "gpt2" else 1)
    assert theirs.config.tie_word_embeddings
    tensors = load_file(tmp_path / "model.safetensors")
    head = theirs.get_input_embeddings().weight.detach().clone()
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    ours = load_model(tmp_path)
    assert ours.head is None
    _check(ours, theirs, tokens_for(theirs))
    head[-1, -1] += 1
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds an lm_head\.weight that differs from .*tie_word_embeddings"):
        load_model(tmp_path)
    save_file(tensors | {"lm_head.weight": head[:-1].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds an lm_head\.weight that differs"):
        load_model(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_read_as_it_is_stored(tmp_path: Path, family: str) -> None:
    saved(tmp_path, family, 2, torch.bfloat16)
    ours = load_model(tmp_path)
    _, stored = open_model(tmp_path)
    for name, tensor in ours.state_dict().items():
        assert tensor.dtype == (torch.float32 if ".gate." in name else torch.bfloat16), name
        assert torch.equal(tensor, stored.read(name, ()).to(tensor.dtype)), name
    theirs = opened(tmp_path)
    _check(load_model(tmp_path, dtype=torch.float32), theirs, tokens_for(theirs))


def test_all_wrong_tensors_are_named_at_once(tmp_path: Path) -> None:
    saved(tmp_path, "mixtral", 0)
    tensors = load_file(tmp_path / "model.safetensors")
    expert = "model.layers.0.block_sparse_moe.experts.1"
    del tensors[f"{expert}.w2.weight"]
    tensors[f"{expert}.w1.weight"] = torch.ones(2, 2)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    tensors["model.layers.99.colour"] = torch.ones(1)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit its config\.json") as caught:
        load_model(tmp_path)
    for words in (
        f"{expert}.w2.weight is missing",
        f"{expert}.w1.weight has shape [2, 2], expected [",
        "model.norm.weight is stored as F8_E4M3, expected one of F64, F32, F16, BF16",
        "model.layers.99.colour is unknown",
    ):
        assert words in str(caught.value)


def test_a_config_that_asks_for_too_much_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    saved(tmp_path, "mixtral", 0)
    data = json.loads((tmp_path / "config.json").read_text())
    for change, words in (
        ({"num_local_experts": 60000}, "that asks for more than"),
        ({"num_hidden_layers": 16000}, "that asks for more than"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000, expected a whole number from 1 to"),
        ({"hidden_size": 2**31 - 1}, r"model\.embed_tokens\.weight has shape"),
        (
            {"hidden_size": 2**31 - 1, "intermediate_size": 2**31 - 1, "vocab_size": 2**31 - 1},
            "larger than any can be|has shape",
        ),
    ):
        (tmp_path / "config.json").write_text(json.dumps(data | change))
        with pytest.raises(ValueError, match=words):
            load_model(tmp_path)
