"""Random tiny models of every family, made by transformers: the oracle of what coterie reads and writes."""

import os
import random
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
import transformers
from torch import Tensor

transformers.utils.logging.disable_progress_bar()

FAMILIES = ("llama", "qwen2", "qwen3", "mixtral", "olmoe", "qwen3_moe", "qwen2_moe", "gpt2")
SEEDS = range(6)
CASES = [(family, seed) for family in FAMILIES for seed in SEEDS]
POSITIONS = 64


def config_for(family: str, seed: int) -> Any:
    """A config of odd sizes; `seed` walks through the family's options, so that six of them meet all."""
    r = random.Random(f"{family} {seed}")
    if family == "gpt2":
        heads, width = r.randint(1, 5), r.randint(3, 7)
        inner = None if seed % 3 == 0 else r.randint(5, 30)
        return transformers.GPT2Config(
            vocab_size=r.randint(31, 67),
            n_embd=heads * width,
            n_head=heads,
            n_layer=r.randint(1, 3),
            n_inner=inner,
            n_positions=POSITIONS,
            tie_word_embeddings=seed % 2 == 0,
            layer_norm_epsilon=10.0 ** -r.randint(3, 6),
            bos_token_id=0,
            eos_token_id=1,
        )
    groups, ratio, width = r.randint(1, 3), (1, 2, 3)[seed % 3], 2 * r.randint(1, 6)
    heads, layers = groups * ratio, r.randint(2, 4)
    values: dict[str, Any] = {
        "vocab_size": r.randint(31, 67),
        "num_hidden_layers": layers,
        "hidden_size": heads * width,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": r.randint(5, 30),
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": 10.0 ** -r.randint(3, 6),
        "tie_word_embeddings": seed % 2 == 1,
        "rope_parameters": _rope(r, seed),
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    if family in ("mixtral", "qwen3", "qwen3_moe"):
        values |= {"hidden_size": r.randint(9, 33), "head_dim": width}
    if family == "llama":
        values |= {"hidden_size": heads * r.randint(5, 11), "head_dim": width, "mlp_bias": seed % 3 == 2}
    if family in ("llama", "qwen3", "olmoe", "qwen3_moe"):
        values["attention_bias"] = seed % 2 == 0
    return getattr(transformers, _NAMES[family] + "Config")(**values, **_moe(r, family, seed, layers))


def _rope(r: random.Random, seed: int) -> dict[str, Any]:
    kinds: list[dict[str, Any]] = [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": r.choice((1.5, 4.0))},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": r.randint(20, 40),
        },
    ]
    return {"rope_theta": r.choice((100.0, 10000.0, 5e5)), **kinds[(seed + seed // 3) % 3]}


def _moe(r: random.Random, family: str, seed: int, layers: int) -> dict[str, Any]:
    if family not in ("mixtral", "olmoe", "qwen3_moe", "qwen2_moe"):
        return {}
    experts = r.choice((3, 5, 6, 7))
    values: dict[str, Any] = {
        "num_local_experts" if family == "mixtral" else "num_experts": experts,
        "num_experts_per_tok": r.randint(2, experts),
        "router_aux_loss_coef": 0.0625,
    }
    if family != "mixtral":
        values["norm_topk_prob"] = seed % 3 == 1
        if seed == 3:
            values["num_experts_per_tok"] = 1
    if family.startswith("qwen"):
        values |= {
            "moe_intermediate_size": r.randint(3, 17),
            "decoder_sparse_step": 2 if seed in (2, 5) else 1,
            "mlp_only_layers": [r.randrange(layers)] if seed in (1, 4, 5) else [],
        }
    if family == "qwen2_moe":
        values |= {"shared_expert_intermediate_size": r.randint(3, 17), "qkv_bias": seed != 4}
    return values


_NAMES = {
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "mixtral": "Mixtral",
    "olmoe": "Olmoe",
    "qwen3_moe": "Qwen3Moe",
    "qwen2_moe": "Qwen2Moe",
}


def model_of(config: Any, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose every tensor matters: matrices of unit gain, norms and biases unlike one and zero."""
    config._experts_implementation = "eager"  # its grouped products want widths of 16 bytes
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                std = 1.5 / max(parameter.shape[-1], 2) ** 0.5 if "embed" not in name else 1.0
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            else:
                noise = torch.randn(parameter.shape, generator=generator) * 0.3
                parameter.copy_(noise if name.endswith("bias") else 1 + noise)
    return model.to(dtype)


def saved(folder: Path, family: str, seed: int, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The model of a case, written into `folder` as transformers writes it."""
    model = model_of(config_for(family, seed), seed, dtype)
    model.save_pretrained(folder, **options)
    return model


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """What transformers opens."""
    config = transformers.AutoConfig.from_pretrained(folder)
    config._experts_implementation = "eager"
    return transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype).eval()


def tokens_for(model: Any, batch: int = 2, length: int = 13) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=generator)
