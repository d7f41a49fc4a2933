"""What checkpoints from elsewhere need: values and gradients equal transformers', refusals are one sentence."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import assert_close_rms
from oracle import Route, model_aux, route
from torch import Tensor, nn

from coterie.models.attention import scaled
from coterie.models.config import ModelConfig, RopeScaling
from coterie.models.config_file import config_from_dict, config_to_dict
from coterie.models.gpt import GPT
from coterie.moe.balance import balance_loss, fractions, model_balance_loss
from coterie.moe.config import GateConfig, MoEConfig
from coterie.moe.gate import Gate
from coterie.train.config import TrainConfig, from_dict, to_dict

transformers = pytest.importorskip("transformers")

GATE = GateConfig(aux_over="model", aux_weight=0.7)
CONFIG = ModelConfig(
    vocab_size=41,
    max_positions=64,
    layers=3,
    dim=30,
    heads=6,
    kv_heads=2,
    head_dim=10,
    hidden=28,
    norm_eps=1e-6,
    tied_head=False,
    experts=(5, 5, 5),
    moe=MoEConfig(top_k=2, hidden=28, gate=GATE),
)
# As transformers counts: the published names of the same sizes.
SIZES: dict[str, Any] = {
    "vocab_size": 41,
    "max_position_embeddings": 64,
    "hidden_size": 30,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def _randomised(theirs: nn.Module) -> nn.Module:
    """Norms and biases too: their initial ones and zeros hide mistakes."""
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return theirs.eval()


def _of_theirs(named: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Values, or gradients, by our names and in our shapes."""
    d = config.width_per_head
    found = {
        "embed.weight": named["model.embed_tokens.weight"],
        "final_norm.weight": named["model.norm.weight"],
        "head.weight": named["lm_head.weight"],
    }
    for layer in range(config.layers):
        theirs, ours = f"model.layers.{layer}.", f"blocks.{layer}."
        found[f"{ours}attention_norm.weight"] = named[f"{theirs}input_layernorm.weight"]
        found[f"{ours}mlp_norm.weight"] = named[f"{theirs}post_attention_layernorm.weight"]
        own = {
            n.removeprefix(f"{theirs}self_attn."): v for n, v in named.items() if n.startswith(f"{theirs}self_attn.")
        }
        for kind in ("weight", "bias"):
            if f"q_proj.{kind}" in own:
                found[f"{ours}attention.q.{kind}"] = own[f"q_proj.{kind}"].unflatten(0, (-1, d))
                kv = torch.stack([own[f"k_proj.{kind}"], own[f"v_proj.{kind}"]])
                found[f"{ours}attention.kv.{kind}"] = kv.unflatten(1, (-1, d))
        found[f"{ours}attention.out.weight"] = own["o_proj.weight"]
        names = {"o_proj.bias": "out_bias", "q_norm.weight": "q_norm.weight", "k_norm.weight": "k_norm.weight"}
        found |= {f"{ours}attention.{ours_name}": own[name] for name, ours_name in names.items() if name in own}
        mlp = {n.removeprefix(f"{theirs}mlp."): v for n, v in named.items() if n.startswith(f"{theirs}mlp.")}
        found |= {f"{ours}{name}": value for name, value in _feed_forward(mlp).items()}
    return found


def _feed_forward(mlp: dict[str, Tensor]) -> dict[str, Tensor]:
    if "gate.weight" in mlp:
        w_in = mlp["experts.gate_up_proj"].unflatten(1, (2, -1))
        experts = {"w_in": w_in, "w_out": mlp["experts.down_proj"]}
        return {"moe.gate.weight": mlp["gate.weight"]} | {f"moe.experts.{n}": v for n, v in experts.items()}
    found = {"mlp.w_in": torch.stack([mlp["gate_proj.weight"], mlp["up_proj.weight"]])}
    found["mlp.w_out"] = mlp["down_proj.weight"]
    if "up_proj.bias" in mlp:
        found["mlp.b_in"] = torch.stack([mlp["gate_proj.bias"], mlp["up_proj.bias"]])
        found["mlp.b_out"] = mlp["down_proj.bias"]
    return found


def _ours(theirs: nn.Module, config: ModelConfig) -> GPT:
    model = GPT(config)
    model.load_state_dict(_of_theirs(dict(theirs.named_parameters()), config))
    return model


def _batch(padded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets, validity; transformers moves its labels by one itself."""
    tokens_BS = torch.randint(0, 41, (4, 13))
    valid_BS = torch.arange(13) < torch.tensor([13, 4, 9, 1] if padded else [13] * 4)[:, None]
    targets_BS = torch.full_like(tokens_BS, -100)
    targets_BS[:, :-1] = tokens_BS[:, 1:].masked_fill(~valid_BS[:, 1:], -100)
    return tokens_BS, targets_BS, valid_BS


def _moe(family: str) -> tuple[nn.Module, ModelConfig]:
    more = {"router_aux_loss_coef": GATE.aux_weight, "output_router_logits": True, "experts_implementation": "eager"}
    more |= {"pad_token_id": None}  # its row would get no gradient
    if family == "mixtral":
        config = transformers.MixtralConfig(
            **SIZES, **more, head_dim=10, num_local_experts=5, num_experts_per_tok=2, rope_parameters=ROPE
        )
        return _randomised(transformers.MixtralForCausalLM(config)), CONFIG
    config = transformers.OlmoeConfig(
        **SIZES, **more, num_experts=5, num_experts_per_tok=3, norm_topk_prob=False, rope_parameters=ROPE
    )
    moe = MoEConfig(top_k=3, hidden=28, gate=replace(GATE, renormalize="none"))
    ours = replace(CONFIG, head_dim=0, dim=36, qk_norm="all", moe=moe)
    config.hidden_size = 36
    return _randomised(transformers.OlmoeForCausalLM(config)), ours


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_gradients_with_hugging_faces_router_loss(family: str, padded: bool) -> None:
    """The loss as `labels` gives it, router loss included, and the gradient of every parameter."""
    theirs, config = _moe(family)
    ours = _ours(theirs, config)
    tokens_BS, targets_BS, valid_BS = _batch(padded)
    labels_BS = tokens_BS.masked_fill(~valid_BS, -100)
    expected = theirs(tokens_BS, attention_mask=valid_BS.long() if padded else None, labels=labels_BS)
    out = ours(tokens_BS, targets_BS=targets_BS, valid_BS=valid_BS)
    assert out.lm is not None
    loss = out.lm / (targets_BS >= 0).sum() + GATE.aux_weight * out.aux / valid_BS.sum()
    assert_close_rms(out.aux / valid_BS.sum(), expected.aux_loss, 1e-5, "router loss")
    assert_close_rms(loss, expected.loss, 1e-5, "loss")
    expected.loss.backward()
    loss.backward()
    grads = _of_theirs({name: p.grad for name, p in theirs.named_parameters()}, config)
    assert grads.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert_close_rms(parameter.grad, grads[name], 1e-5, f"gradient of {name}")


DENSE = replace(CONFIG, experts=())
SCALINGS = {
    "linear": ({"rope_type": "linear", "factor": 3.0}, RopeScaling("linear", 3.0)),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.5,
            "high_freq_factor": 3.0,
            "original_max_position_embeddings": 64,
        },
        RopeScaling("llama3", 8.0, 1.5, 3.0, 64),
    ),
}


def _same_logits(theirs: nn.Module, config: ModelConfig) -> None:
    tokens_BS = torch.randint(0, 41, (2, 50))
    assert_close_rms(_ours(theirs, config)(tokens_BS).logits_BSV, theirs(tokens_BS).logits, 1e-5, "logits")


@pytest.mark.parametrize("kind", SCALINGS)
def test_equals_llama_with_scaled_rotations_and_biases(kind: str) -> None:
    rope, scaling = SCALINGS[kind]
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **SIZES, head_dim=10, attention_bias=True, mlp_bias=True, rope_parameters={"rope_theta": 500.0} | rope
        )
    )
    config = replace(DENSE, attention_bias="all", mlp_bias=True, rope_theta=500.0, rope_scaling=scaling)
    _same_logits(_randomised(theirs), config)


def test_equals_qwen2() -> None:
    """Biases of queries, keys and values, none behind attention."""
    sizes = SIZES | {"hidden_size": 36}
    theirs = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes, rope_parameters=ROPE))
    _same_logits(_randomised(theirs), replace(DENSE, dim=36, head_dim=0, attention_bias="qkv"))


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("theta", [500.0, 10000.0, 500000.0])
def test_rates_are_those_of_transformers(kind: str, theta: float) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope, scaling = SCALINGS[kind]
    config = transformers.LlamaConfig(head_dim=64, rope_parameters={"rope_theta": theta} | rope)
    expected, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    assert factor == 1
    plain = theta ** (-torch.arange(0, 64, 2) / 64)
    found = scaled(plain, scaling)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    if kind == "llama3":
        stays, slowed = (found == plain).sum(), (found == plain / 8).sum()
        assert min(stays, slowed, len(plain) - stays - slowed) > 0, "all three kinds of rates"


def _route(gate: Gate, x_TD: Tensor) -> Route:
    return route(x_TD.double(), gate.weight.double(), gate.top_k, gate.config)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_one_loss_for_all_layers(score: Any) -> None:
    gates = [Gate(9, 7, 3, replace(GATE, score=score)) for _ in range(4)]
    parts, routes = [], []
    for gate in gates:
        nn.init.normal_(gate.weight, std=0.8)
        x_TD = torch.randn(17, 9)
        out = gate(x_TD)
        assert out.aux == 0
        assert out.balance is not None
        parts.append(out.balance)
        routes.append(_route(gate, x_TD))
    ours, expected = model_balance_loss(parts, 3), model_aux(routes, 3)
    assert_close_rms(ours, expected, 1e-6)
    found = torch.autograd.grad(ours, [gate.weight for gate in gates])
    for one, other in zip(found, torch.autograd.grad(expected, [gate.weight for gate in gates]), strict=True):
        assert_close_rms(one, other, 1e-5)
    mean = sum(3 * balance_loss(p.probs_E[None], fractions(p.counts_E)) for p in parts) / 4
    assert abs(mean - ours) > 1e-3 * ours, "layers by themselves should differ, else the test says nothing"


def test_top_k_at_balance() -> None:
    gate = Gate(7, 7, 1, GATE)
    gate.weight.data.copy_(torch.eye(7))
    parts = [gate(torch.eye(7).repeat(3, 1)).balance for _ in range(2)]
    assert_close_rms(model_balance_loss(parts, 1), torch.tensor(21.0))


@pytest.mark.parametrize("scope", ["micro", "global"])
def test_scopes_of_the_loss_over_all_layers(scope: Any) -> None:
    """Ranks and earlier micro-batches count in the global scope alone, and no rank is asked outside training."""
    gate, x_TD = Gate(9, 7, 2, replace(GATE, aux_scope=scope)), torch.randn(11, 9)
    history_E, ranks_E = torch.arange(7), torch.tensor([5] * 7)
    gate.reduce_counts = lambda counts_E: counts_E + ranks_E
    own_E = gate(x_TD).stats.asked_E
    balance = gate(x_TD, history_E=history_E).balance
    assert balance is not None
    expected_E = own_E + history_E + ranks_E if scope == "global" else own_E
    assert torch.equal(balance.counts_E, expected_E)
    assert torch.equal(gate.eval()(x_TD, history_E=history_E).balance.counts_E, own_E)


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_keeps_the_loss_over_all_layers(recompute: Any) -> None:
    tokens_BS, targets_BS, valid_BS = _batch(True)
    grads = []
    for way in ("none", recompute):
        model = GPT(CONFIG)
        model.init_weights(3)
        model.recompute = way
        model(tokens_BS, targets_BS=targets_BS, valid_BS=valid_BS).aux.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert grads[0]["blocks.2.moe.gate.weight"].abs().sum() > 0
    for name, grad in grads[0].items():
        if grad is not None:
            assert_close_rms(grads[1][name], grad, 1e-6, name)


WRONG: dict[str, tuple[Any, str]] = {
    "qk_norm": (lambda: replace(CONFIG, qk_norm=True), "qk_norm=True is not one of none, head, all"),
    "bias": (lambda: replace(CONFIG, attention_bias="q"), "attention_bias='q' is not one of none, qkv, all"),
    "kind": (lambda: RopeScaling("yarn", 2.0), "rope_scaling.kind='yarn' is not one of linear, llama3"),  # type: ignore[arg-type]
    "factor": (lambda: RopeScaling("linear", 0.5), "rope_scaling.factor must be 1 or more, not 0.5"),
    "infinite": (lambda: RopeScaling("linear", float("inf")), "rope_scaling.factor must be 1 or more, not inf"),
    "nan": (lambda: RopeScaling("linear", float("nan")), "rope_scaling.factor must be 1 or more, not nan"),
    "low": (lambda: RopeScaling("llama3", 8.0, 0.0), "rope_scaling.low_freq_factor must be over 0, not 0.0"),
    "high": (
        lambda: RopeScaling("llama3", 8.0, 4.0, 4.0),
        "high_freq_factor must be over low_freq_factor=4.0, not 4.0",
    ),
    "original": (lambda: RopeScaling("llama3", 8.0, 1.0, 4.0, 0), "original_max_positions must be 1 or more, not 0"),
    "learned": (
        lambda: replace(CONFIG, positions="learned", rope_scaling=RopeScaling("linear", 2.0)),
        "rope_scaling needs positions='rotary', not 'learned'",
    ),
    "aux_over": (lambda: GateConfig(aux_over="all"), "aux_over='all' is not one of layer, model"),  # type: ignore[arg-type]
    "sequence": (lambda: replace(GATE, aux_scope="sequence"), "aux_over='model' has no loss per sequence"),
    "pyramid": (
        lambda: replace(CONFIG, experts=(0, 4, 8)),
        "aux_over='model' needs as many experts in every MoE layer, not 4, 8",
    ),
}


@pytest.mark.parametrize(("make", "words"), WRONG.values(), ids=WRONG)
def test_wrong_options_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        make()


@pytest.mark.parametrize("scaling", [None, *(ours for _, ours in SCALINGS.values())])
def test_options_survive_their_files(scaling: RopeScaling | None) -> None:
    config = replace(CONFIG, rope_scaling=scaling, qk_norm="all", attention_bias="qkv")
    assert config_from_dict(config_to_dict(config)) == config
    run = TrainConfig(model=config)
    assert from_dict(to_dict(run)) == run
