"""config.json of other projects: published ones read right, and what coterie lacks refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from hf_models import FAMILIES, config_for
from hf_published import LLAMA, PUBLISHED

from coterie.models.config import RopeScaling
from coterie.models.hf import config_of
from coterie.models.weights import read_config

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name: str, tmp_path: Path) -> None:
    data, expected = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert read_config(tmp_path) == expected


def test_what_an_old_llama_leaves_out() -> None:
    """As the first ones were published: as many keys as heads, no theta, no biases."""
    config = config_of(LLAMA | {"pretraining_tp": 2, "use_cache": True})
    assert (config.kv_heads, config.rope_theta, config.attention_bias, config.mlp_bias) == (4, 10000.0, "none", False)
    assert config.rope_scaling is None


def test_both_spellings_of_rope() -> None:
    numbers = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    old = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **numbers}}
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **numbers}}
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    for said in (old, new, old | new):
        config = config_of(LLAMA | said)
        assert (config.rope_theta, config.rope_scaling) == (5e5, scaling)
    linear = config_of(LLAMA | {"rope_scaling": {"type": "linear", "factor": 2}})
    assert linear.rope_scaling == RopeScaling("linear", 2.0)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("mixtral", {"sliding_window": 256}),  # no token is that far from another
        ("qwen2_moe", {"sliding_window": 32, "use_sliding_window": False, "max_window_layers": 1}),
        ("qwen2_moe", {"sliding_window": 32, "use_sliding_window": True, "layer_types": ["full_attention"] * 2}),
        ("mixtral", {"logit_softcap": None, "is_encoder_decoder": False, "pruned_heads": {}, "note": ""}),
        ("mixtral", {"id2label": {"0": "a"}, "temperature": 0.7, "_attn_implementation_autoset": True}),
        ("mixtral", {"num_experts": 4}),  # both names, one number
        ("olmoe", {"partial_rotary_factor": 1.0}),
    ],
)
def test_what_changes_nothing_is_taken(kind: str, change: dict[str, Any]) -> None:
    data = next(data for name, (data, _) in PUBLISHED.items() if data["model_type"] == kind and "tiny" in name)
    assert config_of(data | change) == config_of(data)


def test_router_noise_is_for_training() -> None:
    data, expected = PUBLISHED["a tiny Mixtral"]
    gate = config_of(data | {"router_jitter_noise": 0.25}).moe.gate
    assert (gate.noise, gate.jitter_eps) == ("jitter", 0.25)
    assert config_of(data | {"router_jitter_noise": 0.0}) == expected


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("a tiny Mixtral", {"sliding_window": 255}, "sliding_window is 255 of 256 positions, which coterie lacks"),
        ("a tiny Qwen2-MoE", {"sliding_window": 32, "use_sliding_window": True}, "sliding_window is 32 of 256"),
        (
            "a tiny Qwen2-MoE",
            {"sliding_window": 32, "layer_types": ["full_attention", "sliding_attention"]},
            "sliding_window is 32",
        ),
        ("a tiny Qwen2-MoE", {"layer_types": ["linear_attention"] * 2}, "layer_types has 'linear_attention'"),
        (
            "a tiny Mixtral",
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope_type is 'yarn', which coterie lacks",
        ),
        ("a tiny Mixtral", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope_type is 'dynamic'"),
        ("a tiny Mixtral", {"rope_scaling": {"rope_type": "longrope"}}, "rope_type is 'longrope'"),
        ("a tiny Mixtral", {"rope_scaling": {"type": "linear"}}, "rope: factor is missing"),
        ("a tiny Mixtral", {"rope_scaling": {"type": "linear", "factor": 0.5}}, r"rope: .*factor must be 1 or more"),
        (
            "a tiny Mixtral",
            {"rope_scaling": {"type": "linear", "factor": 2, "mrope_section": [1, 2]}},
            r"rope: mrope_section is \[1, 2\], and coterie does not know",
        ),
        (
            "a tiny Mixtral",
            {"rope_parameters": {"rope_theta": 5.0}},
            r"rope_theta is 10000.0, but rope_parameters say 5",
        ),
        (
            "a tiny Mixtral",
            {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}},
            "expected one set of numbers",
        ),
        ("a tiny Mixtral", {"rope_theta": None}, "rope: rope_theta is missing"),
        ("a tiny Mixtral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, which coterie lacks"),
        (
            "a tiny Mixtral",
            {"num_experts_per_tok": 1},
            "num_experts_per_tok is 1 and its weight is divided by itself",
        ),
        ("a tiny Mixtral", {"num_experts_per_tok": 5}, "top_k=5 is more than the layer's 4 experts"),
        ("a tiny Mixtral", {"num_experts": 5}, "num_experts is 5 but num_local_experts is 4"),
        ("a tiny Mixtral", {"hidden_act": "gelu"}, r"hidden_act is 'gelu', which coterie lacks \(it has 'silu'\)"),
        ("a tiny Mixtral", {"quantization_config": {"bits": 4}}, "quantization_config: its weights are quantized"),
        ("a tiny Mixtral", {"auto_map": {"AutoModel": "x.Y"}}, "auto_map: it brings code of its own"),
        (
            "a tiny Mixtral",
            {"final_logit_softcapping": 30.0},
            "final_logit_softcapping is 30.0, and coterie does not",
        ),
        ("a tiny Mixtral", {"tie_word_embeddings": None}, "tie_word_embeddings is missing"),
        ("a tiny Mixtral", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected true or false"),
        ("a tiny Mixtral", {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', expected a number"),
        ("a tiny Mixtral", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a number"),
        ("a tiny Mixtral", {"hidden_size": True}, "hidden_size is True, expected a whole number"),
        ("a tiny Mixtral", {"vocab_size": -1}, "vocab_size is -1, expected a whole number from 1"),
        ("a tiny OLMoE", {"clip_qkv": 8.0}, "clip_qkv: queries, keys and values are clipped"),
        ("a tiny OLMoE", {"norm_topk_prob": None}, "norm_topk_prob is missing"),
        (
            "a tiny Qwen3-MoE",
            {"mlp_only_layers": "all"},
            "mlp_only_layers is 'all', expected a list of whole numbers",
        ),
        ("GPT-2", {"activation_function": "relu"}, "activation_function is 'relu', which coterie lacks"),
        ("GPT-2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True, which"),
        ("GPT-2", {"scale_attn_weights": False}, "scale_attn_weights is False, which"),
        ("GPT-2", {"add_cross_attention": True}, "add_cross_attention is True, which"),
        ("GPT-2", {"n_head": 7}, "dim 768 does not split into 7 heads"),
    ],
)
def test_what_coterie_lacks_is_refused_by_name(name: str, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config_of(PUBLISHED[name][0] | change)


def test_all_problems_are_told_at_once() -> None:
    data = PUBLISHED["a tiny Mixtral"][0] | {"hidden_act": "relu", "vocab_size": "many", "softcap": 3, "head_dim": 7}
    del data["rms_norm_eps"]
    with pytest.raises(ValueError, match=r"config\.json of a mixtral model: ") as caught:
        config_of(data)
    for words in ("hidden_act is 'relu'", "vocab_size is 'many'", "softcap is 3", "rms_norm_eps is missing"):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            {"model_type": "deepseek_v3"},
            "'deepseek_v3', which coterie does not read yet, because of its latent attention",
        ),
        ({"model_type": "gpt_oss"}, "'gpt_oss', which coterie does not read yet"),
        (
            {"model_type": "phimoe", "input_jitter_noise": 0.01},
            "'phimoe', which coterie does not know: coterie reads",
        ),
        ({"dim": 2048, "n_routed_experts": 64}, "has no model_type: coterie reads coterie, llama, qwen2"),
        ({"model_type": ["llama"]}, "does not know"),
    ],
)
def test_unknown_architectures(data: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        config_of(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_value_is_taken_from_a_default(family: str) -> None:
    """Without any one of its fields a config is refused, or means the same to transformers."""
    data = json.loads(config_for(family, 2).to_json_string())
    whole = config_of(data)
    changed = set()
    for name in data:
        less = {key: value for key, value in data.items() if key != name}
        try:
            found = config_of(less)
        except ValueError:
            continue
        if found != whole:
            changed.add(name)
    # What stands for something when it is absent: in old files, or in training alone.
    assert changed <= {
        "head_dim",
        "num_key_value_heads",
        "attention_bias",
        "mlp_bias",
        "qkv_bias",
        "mlp_only_layers",
        "rope_parameters",
        "router_aux_loss_coef",
        "n_inner",
        "tie_word_embeddings" if family == "gpt2" else "",
    }, changed
