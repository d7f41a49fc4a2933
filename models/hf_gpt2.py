"""GPT-2: layer norms with biases, learned positions, queries, keys and values in one matrix stored transposed.

Source: the config.json and the safetensors names that it is published with.
D model, F hidden.
"""

from __future__ import annotations

from typing import Any

from .config import ModelConfig
from .hf_family import LAYERS, Family, Fields
from .parts import Part, Table


def _read(f: Fields) -> ModelConfig:
    dim = f.whole("n_embd")
    f.only("activation_function", "gelu_new", "gelu_pytorch_tanh")  # two names of one function
    f.only("scale_attn_weights", True, absent=True)
    f.only("scale_attn_by_inverse_layer_idx", False, absent=False)
    f.only("add_cross_attention", False, absent=False)
    for name in ("reorder_and_upcast_attn", "n_ctx"):  # the same numbers in another order; never read
        f.value(name, absent=None)
    for name in ("type", "use_proj", "activation", "proj_to_labels", "first_dropout"):  # of another model's head
        f.value(f"summary_{name}", absent=None)
    return ModelConfig(
        vocab_size=f.whole("vocab_size"),
        max_positions=f.whole("n_positions"),
        layers=f.whole("n_layer", most=LAYERS),
        dim=dim,
        heads=f.whole("n_head"),
        hidden=f.whole("n_inner", absent=4 * dim),
        activation="gelu",
        norm="layernorm",
        norm_eps=f.number("layer_norm_epsilon"),
        positions="learned",
        attention_bias="all",
        mlp_bias=True,
        tied_head=f.flag("tie_word_embeddings", absent=True),
        init_std=f.number("initializer_range", absent=ModelConfig().init_std),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.max_positions,
        "n_layer": config.layers,
        "n_embd": config.dim,
        "n_head": config.heads,
        "n_inner": config.hidden,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "initializer_range": config.init_std,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def _table(config: ModelConfig, fused: bool) -> Table:
    dim, words = config.dim, (config.vocab_size, config.dim)
    table = {
        "embed.weight": [Part("transformer.wte.weight", words)],
        "positions.weight": [Part("transformer.wpe.weight", (config.max_positions, dim))],
    }
    for layer in range(config.layers):
        ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        table |= _norm(f"{ours}.attention_norm", f"{theirs}.ln_1", dim)
        table |= _attention(f"{ours}.attention", f"{theirs}.attn", dim)
        table |= _norm(f"{ours}.mlp_norm", f"{theirs}.ln_2", dim)
        table |= _mlp(f"{ours}.mlp", f"{theirs}.mlp", dim, config.hidden)
    table |= _norm("final_norm", "transformer.ln_f", dim)
    if not config.tied_head:
        table["head.weight"] = [Part("lm_head.weight", words)]
    return table


def _norm(ours: str, theirs: str, dim: int) -> dict[str, list[Part]]:
    return {f"{ours}.{kind}": [Part(f"{theirs}.{kind}", (dim,))] for kind in ("weight", "bias")}


def _attention(ours: str, theirs: str, dim: int) -> dict[str, list[Part]]:
    weight, bias = Part(f"{theirs}.c_attn.weight", (dim, 3 * dim), transposed=True), f"{theirs}.c_attn.bias"
    return {
        f"{ours}.q.weight": [weight._replace(rows=(0, dim))],
        f"{ours}.q.bias": [Part(bias, (3 * dim,), rows=(0, dim))],
        f"{ours}.kv.weight": [weight._replace(rows=(dim, 3 * dim))],
        f"{ours}.kv.bias": [Part(bias, (3 * dim,), rows=(dim, 3 * dim))],
        f"{ours}.out.weight": [Part(f"{theirs}.c_proj.weight", (dim, dim), transposed=True)],
        f"{ours}.out_bias": [Part(f"{theirs}.c_proj.bias", (dim,))],
    }


def _mlp(ours: str, theirs: str, dim: int, hidden: int) -> dict[str, list[Part]]:
    return {
        f"{ours}.w_in": [Part(f"{theirs}.c_fc.weight", (dim, hidden), at=(0,), transposed=True)],
        f"{ours}.b_in": [Part(f"{theirs}.c_fc.bias", (hidden,), at=(0,))],
        f"{ours}.w_out": [Part(f"{theirs}.c_proj.weight", (hidden, dim), transposed=True)],
        f"{ours}.b_out": [Part(f"{theirs}.c_proj.bias", (dim,))],
    }


GPT2 = Family("gpt2", "GPT2LMHeadModel", _read, _write, _table, r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias")
