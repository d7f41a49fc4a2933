"""Llama and its children: Qwen2, Qwen3, Mixtral, OLMoE, Qwen2-MoE and Qwen3-MoE are one decoder with few options.

Sources: the config.json files and the safetensors names that these models are published with.
D model, H heads, G key-value heads, d head width, F hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any, Literal, NamedTuple

from ..moe.config import GateConfig, MoEConfig
from .config import ModelConfig
from .hf_family import LAYERS, Family, Fields
from .parts import Part, Table


class Style(NamedTuple):
    """What sets one of these architectures apart."""

    model_type: str
    architecture: str
    heads: Literal["split", "free", "given"] = "split"
    """Head width: hidden_size / num_attention_heads always, or unless head_dim is there, or always head_dim."""
    shared_heads: bool = False
    """num_key_value_heads may be absent: as many as heads."""
    bias: Literal["none", "qkv", "attention_bias", "qkv_bias"] = "none"
    """Which attention projections have biases, or the field that says so."""
    mlp_bias: bool = False
    """There is a field mlp_bias."""
    qk_norm: Literal["none", "head", "all"] = "none"
    window: Literal["none", "always", "switched"] = "none"
    """sliding_window is in force whenever it is there, or only under use_sliding_window."""
    theta: float | None = None
    """What an absent rope_theta means; None: it may not be absent."""
    experts: str = ""
    """Names of the experts' tensors: w1 (Mixtral) or gate_proj; "": a dense model."""
    own_width: bool = False
    """Experts have moe_intermediate_size and layers may be dense; else all are sparse, of intermediate_size."""
    renormalize: bool = False
    """Weights of the chosen experts are always divided by their sum; else norm_topk_prob says it."""
    shared: bool = False
    """A shared expert behind a sigmoid gate."""


STYLES = (
    Style("llama", "LlamaForCausalLM", "free", True, bias="attention_bias", mlp_bias=True, theta=10000.0),
    Style("qwen2", "Qwen2ForCausalLM", shared_heads=True, bias="qkv", window="switched"),
    Style("qwen3", "Qwen3ForCausalLM", "given", True, bias="attention_bias", qk_norm="head", window="switched"),
    Style("mixtral", "MixtralForCausalLM", "free", True, window="always", experts="w1", renormalize=True),
    Style("olmoe", "OlmoeForCausalLM", shared_heads=True, bias="attention_bias", qk_norm="all", experts="gate_proj"),
    Style(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "free",
        bias="attention_bias",
        qk_norm="head",
        window="switched",
        experts="gate_proj",
        own_width=True,
    ),
    Style(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        bias="qkv_bias",
        window="switched",
        experts="gate_proj",
        own_width=True,
        shared=True,
    ),
)


def _read(style: Style, f: Fields) -> ModelConfig:
    heads, layers = f.whole("num_attention_heads"), f.whole("num_hidden_layers", most=LAYERS)
    positions = f.whole("max_position_embeddings")
    f.only("hidden_act", "silu")
    _window(style, f, positions)
    width = f.whole("head_dim", **({} if style.heads == "given" else {"absent": 0})) if style.heads != "split" else 0
    values: dict[str, Any] = {
        "vocab_size": f.whole("vocab_size"),
        "max_positions": positions,
        "layers": layers,
        "dim": f.whole("hidden_size"),
        "heads": heads,
        "kv_heads": f.whole("num_key_value_heads", **({"absent": heads} if style.shared_heads else {})),
        "head_dim": width,
        "hidden": f.whole("intermediate_size"),
        "norm_eps": f.number("rms_norm_eps"),
        "tied_head": f.flag("tie_word_embeddings"),
        "init_std": f.number("initializer_range", absent=ModelConfig().init_std),
        "qk_norm": style.qk_norm,
        "attention_bias": _bias(style, f),
        "mlp_bias": style.mlp_bias and f.flag("mlp_bias", absent=False),
        **f.rope(**({} if style.theta is None else {"absent": style.theta})),
    }
    if style.experts:
        values |= _moe(style, f, layers, values["hidden"])
    return ModelConfig(**values)


def _bias(style: Style, f: Fields) -> str:
    if style.bias == "attention_bias":
        return "all" if f.flag("attention_bias", absent=False) else "none"
    if style.bias == "qkv_bias":  # it came years after the model, whose layers have always had it
        return "qkv" if f.flag("qkv_bias", absent=True) else "none"
    return style.bias


def _window(style: Style, f: Fields, positions: int) -> None:
    """Refuses a window that would hide any token from another."""
    if style.window == "none":
        return
    window = f.whole("sliding_window", absent=0, least=0)
    used = style.window == "always"
    if style.window == "switched":
        used = f.flag("use_sliding_window", absent=False)
        f.value("max_window_layers", absent=None)
        kinds = f.value("layer_types", absent=[])
        kinds = set(map(str, kinds)) if isinstance(kinds, list) else {str(kinds)}
        for kind in sorted(kinds - {"full_attention", "sliding_attention"}):
            f.problems.append(f"layer_types has {kind!r}, which coterie lacks")
        used = "sliding_attention" in kinds if kinds else used
    if used and 0 < window < positions:
        f.problems.append(f"sliding_window is {window} of {positions} positions, which coterie lacks")


def _moe(style: Style, f: Fields, layers: int, hidden: int) -> dict[str, Any]:
    experts = f.whole("num_experts", "num_local_experts", most=2**16)
    renormalize = style.renormalize or f.flag("norm_topk_prob")
    chosen = f.whole("num_experts_per_tok")
    if renormalize and chosen == 1:
        f.problems.append("num_experts_per_tok is 1 and its weight is divided by itself, which coterie lacks")
    jitter = f.number("router_jitter_noise", absent=0.0) if style.renormalize else 0.0
    gate = GateConfig(
        renormalize="before_drop" if renormalize else "none",
        noise="jitter" if jitter else "none",
        jitter_eps=jitter or GateConfig().jitter_eps,
        aux_weight=f.number("router_aux_loss_coef", absent=0.0),
        aux_scope="micro",
        aux_over="model",
    )
    shared = f.whole("shared_expert_intermediate_size") if style.shared else 0
    width = f.whole("moe_intermediate_size") if style.own_width else hidden
    moe = MoEConfig(top_k=chosen, hidden=width, shared_hidden=shared, shared_gate=style.shared, gate=gate)
    sparse = [True] * layers
    if style.own_width:
        step, dense = f.whole("decoder_sparse_step"), set(f.wholes("mlp_only_layers"))
        sparse = [i not in dense and (i + 1) % step == 0 for i in range(layers)]
    return {"moe": moe, "experts": tuple(experts * is_sparse for is_sparse in sparse)}


def _write(style: Style, config: ModelConfig) -> dict[str, Any]:
    if style.model_type == "llama" and config.dim % config.heads:
        raise ValueError(f"transformers opens no Llama whose hidden_size {config.dim} is no multiple of its heads")
    data: dict[str, Any] = {
        "architectures": [style.architecture],
        "model_type": style.model_type,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "num_hidden_layers": config.layers,
        "hidden_size": config.dim,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.hidden,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "initializer_range": config.init_std,
        **_write_rope(config),
    }
    if style.heads != "split":
        data["head_dim"] = config.width_per_head
    if style.bias in ("attention_bias", "qkv_bias"):
        data[style.bias] = config.attention_bias != "none"
    if style.mlp_bias:
        data["mlp_bias"] = config.mlp_bias
    if style.window != "none":
        data["sliding_window"] = None
    if style.window == "switched":
        data["use_sliding_window"] = False
    return data | (_write_moe(style, config) if style.experts else {})


def _write_rope(config: ModelConfig) -> dict[str, Any]:
    """In the words of transformers 5, and in those of all before, which would not read the new ones."""
    scaling = None
    if config.rope_scaling is not None:
        scaling = asdict(config.rope_scaling)
        scaling = {"rope_type": scaling.pop("kind"), "factor": scaling.pop("factor")} | scaling
        scaling["original_max_position_embeddings"] = scaling.pop("original_max_positions")
        if scaling["rope_type"] == "linear":
            scaling = {"rope_type": "linear", "factor": scaling["factor"]}
    parameters = {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})}
    return {"rope_theta": config.rope_theta, "rope_scaling": scaling, "rope_parameters": parameters}


def _write_moe(style: Style, config: ModelConfig) -> dict[str, Any]:
    moe, gate = config.moe, config.moe.gate
    data: dict[str, Any] = {
        "num_local_experts" if style.experts == "w1" else "num_experts": max(config.experts, default=0),
        "num_experts_per_tok": moe.top_k,
        "router_aux_loss_coef": gate.aux_weight,
        "output_router_logits": False,
    }
    if style.renormalize:
        data["router_jitter_noise"] = gate.jitter_eps if gate.noise == "jitter" else 0.0
    else:
        data["norm_topk_prob"] = gate.renormalize != "none"
    if style.own_width:
        data["moe_intermediate_size"] = config.expert_hidden
        data["decoder_sparse_step"] = 1
        data["mlp_only_layers"] = [i for i in range(config.layers) if not config.experts_of(i)]
    else:
        data["intermediate_size"] = config.expert_hidden
    if style.shared:
        data["shared_expert_intermediate_size"] = moe.shared_hidden
    return data


def _table(style: Style, config: ModelConfig, fused: bool) -> Table:
    dim, words = config.dim, (config.vocab_size, config.dim)
    table = {"embed.weight": [Part("model.embed_tokens.weight", words)]}
    for layer in range(config.layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        table[f"{ours}.attention_norm.weight"] = [Part(f"{theirs}.input_layernorm.weight", (dim,))]
        table |= _attention(config, f"{ours}.attention", f"{theirs}.self_attn")
        table[f"{ours}.mlp_norm.weight"] = [Part(f"{theirs}.post_attention_layernorm.weight", (dim,))]
        if config.experts_of(layer):
            table |= _sparse(style, config, config.experts_of(layer), fused, f"{ours}.moe", theirs)
        else:
            table |= _mlp(f"{ours}.mlp", f"{theirs}.mlp", dim, config.hidden, config.mlp_bias)
    table["final_norm.weight"] = [Part("model.norm.weight", (dim,))]
    if not config.tied_head:
        table["head.weight"] = [Part("lm_head.weight", words)]
    return table


def _attention(config: ModelConfig, ours: str, theirs: str) -> dict[str, list[Part]]:
    dim, width = config.dim, config.width_per_head
    rows = {"q": config.heads * width, "k": config.num_kv_heads * width, "v": config.num_kv_heads * width}
    table: dict[str, list[Part]] = {}
    for kind, size in (("weight", (dim,)), ("bias", ())):
        if kind == "bias" and config.attention_bias == "none":
            break
        parts = {name: Part(f"{theirs}.{name}_proj.{kind}", (rows[name], *size)) for name in rows}
        table[f"{ours}.q.{kind}"] = [parts["q"]]
        table[f"{ours}.kv.{kind}"] = [parts["k"]._replace(at=(0,)), parts["v"]._replace(at=(1,))]
    table[f"{ours}.out.weight"] = [Part(f"{theirs}.o_proj.weight", (dim, rows["q"]))]
    if config.attention_bias == "all":
        table[f"{ours}.out_bias"] = [Part(f"{theirs}.o_proj.bias", (dim,))]
    if config.qk_norm != "none":
        for name in ("q", "k"):
            size = width if config.qk_norm == "head" else rows[name]
            table[f"{ours}.{name}_norm.weight"] = [Part(f"{theirs}.{name}_norm.weight", (size,))]
    return table


def _mlp(ours: str, theirs: str, dim: int, hidden: int, bias: bool = False) -> dict[str, list[Part]]:
    first = [f"{theirs}.{name}_proj" for name in ("gate", "up")]
    table = {
        f"{ours}.w_in": [Part(f"{name}.weight", (hidden, dim), at=(i,)) for i, name in enumerate(first)],
        f"{ours}.w_out": [Part(f"{theirs}.down_proj.weight", (dim, hidden))],
    }
    if bias:
        table[f"{ours}.b_in"] = [Part(f"{name}.bias", (hidden,), at=(i,)) for i, name in enumerate(first)]
        table[f"{ours}.b_out"] = [Part(f"{theirs}.down_proj.bias", (dim,))]
    return table


def _sparse(
    style: Style, config: ModelConfig, experts: int, fused: bool, ours: str, layer: str
) -> dict[str, list[Part]]:
    dim, hidden = config.dim, config.expert_hidden
    mixtral = style.experts == "w1"
    theirs = f"{layer}.block_sparse_moe" if mixtral and not fused else f"{layer}.mlp"
    table = {f"{ours}.gate.weight": [Part(f"{theirs}.gate.weight", (experts, dim))]}
    if fused:
        table[f"{ours}.experts.w_in"] = [Part(f"{theirs}.experts.gate_up_proj", (experts, 2 * hidden, dim))]
        table[f"{ours}.experts.w_out"] = [Part(f"{theirs}.experts.down_proj", (experts, dim, hidden))]
    else:
        gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
        names = [(e, f"{theirs}.experts.{e}") for e in range(experts)]
        table[f"{ours}.experts.w_in"] = [
            Part(f"{name}.{one}.weight", (hidden, dim), at=(e, i))
            for e, name in names
            for i, one in enumerate((gate, up))
        ]
        table[f"{ours}.experts.w_out"] = [Part(f"{name}.{down}.weight", (dim, hidden), at=(e,)) for e, name in names]
    if style.shared:
        table |= _mlp(f"{ours}.shared", f"{theirs}.shared_expert", dim, config.moe.shared_hidden)
        table[f"{ours}.shared_gate.weight"] = [Part(f"{theirs}.shared_expert_gate.weight", (1, dim))]
    return table


def families() -> Iterator[Family]:
    """All of them, the plainest first."""
    for style in STYLES:
        yield Family(
            style.model_type,
            style.architecture,
            partial(_read, style),
            partial(_write, style),
            partial(_table, style),
            r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
        )
