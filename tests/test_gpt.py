"""The decoder: parity with Hugging Face's models, causality, losses, recomputation and initial values."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close_rms
from torch import Tensor, nn

from coterie.models.config import ModelConfig
from coterie.models.gpt import GPT
from coterie.models.init import draw
from coterie.moe.config import GateConfig, MoEConfig

MODERN = ModelConfig(
    vocab_size=41,
    max_positions=24,
    layers=3,
    dim=48,
    heads=6,
    kv_heads=2,
    head_dim=10,
    hidden=28,
    norm_eps=1e-6,
    qk_norm="head",
    tied_head=False,
    experts=(4, 0, 6),
    moe=MoEConfig(top_k=2, hidden=20),
)
GPT2 = ModelConfig(
    vocab_size=41,
    max_positions=24,
    layers=3,
    dim=48,
    heads=6,
    hidden=28,
    activation="gelu",
    norm="layernorm",
    positions="learned",
    attention_bias="all",
    mlp_bias=True,
)
NOISY = GateConfig(noise="gumbel", capacity_factor=1.0, min_capacity=1, drop_policy="random")


def _model(config: ModelConfig, seed: int = 5) -> GPT:
    model = GPT(config)
    model.init_weights(seed)
    return model


def _tokens(config: ModelConfig, batch: int = 3, length: int = 11) -> Tensor:
    return torch.randint(0, config.vocab_size, (batch, length))


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _randomise(model: nn.Module) -> None:
    """Norms and biases too: their initial ones and zeros hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


def _copy_gpt2(ours: GPT, theirs: nn.Module) -> None:
    """Hugging Face's Conv1D keeps a transposed weight."""
    source = dict(theirs.named_parameters())

    def take(parameter: nn.Parameter | None, name: str, transpose: bool = False) -> None:
        assert parameter is not None
        value = source[f"transformer.{name}"]
        parameter.copy_((value.T if transpose else value).view_as(parameter))

    take(ours.embed.weight, "wte.weight")
    take(ours.positions.weight, "wpe.weight")
    for i, block in enumerate(ours.blocks):
        for norm, name in ((block.attention_norm, "ln_1"), (block.mlp_norm, "ln_2")):
            take(norm.weight, f"h.{i}.{name}.weight")
            take(norm.bias, f"h.{i}.{name}.bias")
        attention = block.attention
        for kind in ("weight", "bias"):
            value = source[f"transformer.h.{i}.attn.c_attn.{kind}"]
            for part, rows in zip((attention.q, attention.kv), value.t().split([48, 96]), strict=True):
                getattr(part, kind).copy_(rows.view_as(getattr(part, kind)))
        take(attention.out.weight, f"h.{i}.attn.c_proj.weight", True)
        take(attention.out_bias, f"h.{i}.attn.c_proj.bias")
        take(block.mlp.w_in, f"h.{i}.mlp.c_fc.weight", True)
        take(block.mlp.b_in, f"h.{i}.mlp.c_fc.bias")
        take(block.mlp.w_out, f"h.{i}.mlp.c_proj.weight", True)
        take(block.mlp.b_out, f"h.{i}.mlp.c_proj.bias")
    take(ours.final_norm.weight, "ln_f.weight")
    take(ours.final_norm.bias, "ln_f.bias")


def test_equals_hugging_face_gpt2() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=41, n_positions=24, n_embd=48, n_layer=3, n_head=6, n_inner=28, attn_implementation="eager"
        )
    ).eval()
    _randomise(theirs)
    ours = _model(GPT2)
    with torch.no_grad():
        _copy_gpt2(ours, theirs)
    tokens_BS = _tokens(GPT2)
    logits_BSV = ours(tokens_BS).logits_BSV
    expected_BSV = theirs(tokens_BS).logits
    assert_close_rms(logits_BSV, expected_BSV, 1e-5, "logits")
    weight_BSV = torch.randn_like(expected_BSV)
    (logits_BSV * weight_BSV).sum().backward()
    (expected_BSV * weight_BSV).sum().backward()
    assert_close_rms(ours.embed.weight.grad, theirs.transformer.wte.weight.grad, 1e-5, "embedding's gradient")
    own = ours.blocks[0].attention
    grad = torch.cat([own.q.weight.grad.flatten(0, -2), own.kv.weight.grad.flatten(0, -2)])
    assert_close_rms(grad.T, theirs.transformer.h[0].attn.c_attn.weight.grad, 1e-5, "q's and kv's")


def _copy_qwen3(ours: GPT, theirs: nn.Module) -> None:
    base = theirs.model
    ours.embed.weight.copy_(base.embed_tokens.weight)
    ours.head.weight.copy_(theirs.lm_head.weight)
    ours.final_norm.weight.copy_(base.norm.weight)
    for block, layer in zip(ours.blocks, base.layers, strict=True):
        block.attention_norm.weight.copy_(layer.input_layernorm.weight)
        block.mlp_norm.weight.copy_(layer.post_attention_layernorm.weight)
        attention = layer.self_attn
        q, kv = block.attention.q.weight, block.attention.kv.weight
        q.copy_(attention.q_proj.weight.view_as(q))
        kv.copy_(torch.cat([attention.k_proj.weight, attention.v_proj.weight]).view_as(kv))
        block.attention.out.weight.copy_(attention.o_proj.weight)
        block.attention.q_norm.weight.copy_(attention.q_norm.weight)
        block.attention.k_norm.weight.copy_(attention.k_norm.weight)
        if block.moe is None:
            block.mlp.w_in.copy_(torch.stack([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]))
            block.mlp.w_out.copy_(layer.mlp.down_proj.weight)
        else:
            block.moe.gate.weight.copy_(layer.mlp.gate.weight)
            w_in = block.moe.experts.w_in
            w_in.copy_(layer.mlp.experts.gate_up_proj.view_as(w_in))
            block.moe.experts.w_out.copy_(layer.mlp.experts.down_proj)


def test_equals_hugging_face_qwen3_moe() -> None:
    """GQA, QK-norm, rotary positions, a head width of its own, dense and MoE layers together."""
    transformers = pytest.importorskip("transformers")
    config = replace(MODERN, experts=(6, 0, 6))
    theirs = transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            vocab_size=41,
            max_position_embeddings=24,
            hidden_size=48,
            intermediate_size=28,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=10,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            mlp_only_layers=[1],
            num_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=20,
            norm_topk_prob=True,
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
    ).eval()
    _randomise(theirs)
    ours = _model(config)
    with torch.no_grad():
        _copy_qwen3(ours, theirs)
    tokens_BS = _tokens(config)
    expected_BSV = theirs(tokens_BS).logits
    assert_close_rms(ours(tokens_BS).logits_BSV, expected_BSV, 1e-5, "logits")
    shifted_BS = torch.full_like(tokens_BS, -100)
    shifted_BS[:, :-1] = tokens_BS[:, 1:]
    lm = ours(tokens_BS, targets_BS=shifted_BS).lm
    lm.backward()
    F.cross_entropy(expected_BSV[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten(), reduction="sum").backward()
    layer, block = theirs.model.layers[2].mlp, ours.blocks[2].moe
    assert_close_rms(
        block.experts.w_in.grad.flatten(1, 2), layer.experts.gate_up_proj.grad, 1e-5, "experts' gradient"
    )
    assert_close_rms(block.gate.weight.grad, layer.gate.weight.grad, 1e-5, "router's gradient")
    assert_close_rms(ours.embed.weight.grad, theirs.model.embed_tokens.weight.grad, 1e-5, "embedding's gradient")


@pytest.mark.parametrize("config", [MODERN, GPT2], ids=["modern", "gpt2"])
def test_no_token_sees_the_future(config: ModelConfig) -> None:
    model, tokens_BS = _model(config), _tokens(config)
    before = model(tokens_BS).logits_BSV
    tokens_BS[:, 7] = (tokens_BS[:, 7] + 1) % config.vocab_size
    after = model(tokens_BS).logits_BSV
    assert_close_rms(after[:, :7], before[:, :7], 1e-5)
    assert (after[:, 7:] - before[:, 7:]).abs().amax(-1).min() > 0


def test_loss_is_the_sum_over_counted_targets() -> None:
    model, tokens_BS = _model(MODERN), _tokens(MODERN)
    targets_BS = _tokens(MODERN)
    targets_BS[1, 4:] = -100
    out = model(tokens_BS, targets_BS=targets_BS)
    assert out.logits_BSV is None
    logits_BSV = model(tokens_BS).logits_BSV
    expected = F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten(), reduction="sum")
    assert_close_rms(out.lm, expected, 1e-5)
    assert len(out.stats) == len(out.routes) == 2
    assert [s.asked_E.shape[0] for s in out.stats] == [4, 6]
    assert all(int(s.asked_E.sum()) == 33 * 2 for s in out.stats)
    assert out.routes[1].shape == (33, 2)


def test_padding_changes_nothing() -> None:
    """Sequences with padding behind them give the losses of the bare sequences, whatever the padding holds."""
    model, tokens_BS = _model(MODERN), _tokens(MODERN, 2, 9)
    targets_BS = _tokens(MODERN, 2, 9)
    bare = model(tokens_BS, targets_BS=targets_BS)
    wide_BS = torch.cat([tokens_BS, _tokens(MODERN, 2, 4)], 1)
    wide_targets_BS = F.pad(targets_BS, (0, 4), value=-100)
    valid_BS = (torch.arange(13) < 9).expand(2, -1)
    padded = model(wide_BS, targets_BS=wide_targets_BS, valid_BS=valid_BS)
    for name in ("lm", "aux", "z"):
        assert_close_rms(getattr(padded, name), getattr(bare, name), 1e-5, name)
    for ours, expected in zip(padded.stats, bare.stats, strict=True):
        assert torch.equal(ours.asked_E, expected.asked_E)
        assert int(ours.tokens) == 18


def test_positions_move_the_window() -> None:
    """Rotary attention sees differences of positions alone; learned positions see the positions."""
    tokens_BS = _tokens(MODERN, 2, 6)
    shifted_S = torch.arange(6) + 13
    rotary, learned = _model(MODERN), _model(GPT2)
    assert_close_rms(rotary(tokens_BS, shifted_S).logits_BSV, rotary(tokens_BS).logits_BSV, 1e-4)
    assert (learned(tokens_BS, shifted_S).logits_BSV - learned(tokens_BS).logits_BSV).abs().max() > 1e-3
    own_BS = torch.stack([torch.arange(6), shifted_S])
    rows = rotary(tokens_BS, own_BS * torch.tensor([[1], [2]])).logits_BSV
    assert_close_rms(rows[0], rotary(tokens_BS).logits_BSV[0], 1e-5)


def test_routes_replay() -> None:
    """Recorded routes are followed, also by other weights, and a replay of a model's own routes changes nothing."""
    model, other, tokens_BS = _model(MODERN), _model(MODERN, seed=6), _tokens(MODERN)
    first = model(tokens_BS, targets_BS=tokens_BS)
    again = model(tokens_BS, targets_BS=tokens_BS, routes=first.routes)
    assert torch.equal(again.lm, first.lm)
    followed = other(tokens_BS, routes=first.routes)
    assert all(torch.equal(a, b) for a, b in zip(followed.routes, first.routes, strict=True))
    own = other(tokens_BS)
    assert not torch.equal(own.routes[0], first.routes[0])
    assert (followed.logits_BSV - own.logits_BSV).abs().max() > 1e-4


def _gates() -> list[GateConfig]:
    jitter = GateConfig(noise="jitter", aux_weight=0.1, z_weight=0.1)
    return [GateConfig(), NOISY, jitter, replace(NOISY, renormalize="after_drop", drop_policy="probability")]


@pytest.mark.parametrize("gate", _gates(), ids=["plain", "gumbel-random", "jitter", "gumbel-probability"])
def test_recomputation_repeats_the_same_pass(gate: GateConfig) -> None:
    """Two passes before their backwards, as in a rollout: each must be repeated with its own noise and drops."""
    config = replace(MODERN, moe=replace(MODERN.moe, residual=True, gate=gate))
    batches = [(_tokens(config), _tokens(config)) for _ in range(2)]
    gradients, outputs = [], []
    for recompute in ("none", "selective", "full"):
        model = _model(config)
        model.recompute = recompute
        outs = [model(tokens_BS, targets_BS=targets_BS) for tokens_BS, targets_BS in batches]
        for out in outs:
            (out.lm + 0.1 * out.aux + 0.01 * out.z).backward()
        gradients.append(_gradients(model))
        outputs.append(outs)
    for kept, *repeated in zip(*outputs, strict=True):
        for again in repeated:
            assert torch.equal(kept.lm, again.lm)
            for a, b in zip(kept.stats, again.stats, strict=True):
                assert torch.equal(a.asked_E, b.asked_E)
                assert torch.equal(a.kept_E, b.kept_E)
    for again in gradients[1:]:
        assert gradients[0].keys() == again.keys()
        for name, grad in gradients[0].items():
            assert_close_rms(again[name], grad, 1e-6, name)


def test_noise_would_route_otherwise() -> None:
    """What makes the test above worth its name: without a replay a second pass goes elsewhere and drops others."""
    config = replace(MODERN, moe=replace(MODERN.moe, gate=NOISY))
    model, tokens_BS = _model(config), _tokens(config)
    first, second = model(tokens_BS), model(tokens_BS)
    assert not torch.equal(first.routes[0], second.routes[0])
    assert (first.stats[0].kept_E.sum() < first.stats[0].asked_E.sum()).item()


def test_recomputation_keeps_less() -> None:
    sizes = []
    for recompute in ("none", "selective", "full"):
        model = _model(MODERN)
        model.recompute = recompute
        kept: list[int] = []
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(tensor: Tensor, kept: list[int] = kept, parameters: set[int] = parameters) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in parameters:
                kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(_tokens(MODERN), targets_BS=_tokens(MODERN))
        sizes.append(sum(kept))
    assert sizes[2] < sizes[0] / 4
    assert sizes[2] < sizes[1] < sizes[0] * 0.8


def test_initial_values() -> None:
    config = replace(MODERN, init_std=0.05, layers=8, experts=(4,) * 8, vocab_size=400)
    model = _model(config)
    state = model.state_dict()
    assert state["embed.weight"].std().item() == pytest.approx(0.05, rel=0.02)
    assert state["blocks.3.attention.q.weight"].std().item() == pytest.approx(0.05, rel=0.02)
    for name in ("attention.out.weight", "moe.experts.w_out"):
        assert state[f"blocks.3.{name}"].std().item() == pytest.approx(0.05 / 4, rel=0.03)
    assert (state["blocks.0.mlp_norm.weight"] == 1).all()
    w_in = state["blocks.3.moe.experts.w_in"]
    expected = draw(5, "blocks.3.moe.experts.w_in.2", tuple(w_in.shape[1:]), 0.05)
    assert torch.equal(w_in[2], expected)
    experts = torch.cat([state["blocks.3.moe.experts.w_in"], state["blocks.4.moe.experts.w_in"]]).flatten(1)
    assert (torch.corrcoef(experts) - torch.eye(8)).abs().max() < 0.2, "experts must start different"
    assert torch.equal(_model(config).embed.weight, model.embed.weight)
    assert not torch.equal(_model(config, seed=6).embed.weight, model.embed.weight)


def test_initial_loss_is_that_of_a_uniform_guess() -> None:
    for config in (MODERN, GPT2):
        model = _model(config)
        out = model(_tokens(config, 8, 20), targets_BS=_tokens(config, 8, 20))
        assert out.lm.item() / 160 == pytest.approx(torch.tensor(41.0).log().item(), rel=0.03)


def test_biases_follow_the_counts() -> None:
    config = replace(MODERN, moe=replace(MODERN.moe, gate=GateConfig(bias_update=0.01)))
    model = _model(config)
    counts = (torch.tensor([9, 1, 1, 1]), torch.tensor([2, 2, 2, 2, 2, 2]))
    model.update_biases(counts)
    first, second = (moe.gate.bias_E for moe in model.moe_layers)
    assert first[0] < 0 < first[1]
    assert (second == 0).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": 5, "head_dim": 0}, "48 does not split into 5 heads"),
        ({"kv_heads": 4}, "6 heads do not share 4 kv_heads"),
        ({"head_dim": 9}, "even head_dim"),
        ({"experts": (4, 0)}, "lists 2 layers, but the model has 3"),
        ({"activation": "relu"}, "activation='relu' is not one of swiglu, gelu"),
        ({"positions": "alibi"}, "positions='alibi' is not one of rotary, learned"),
        ({"heads": 0}, "heads must be 1 or more, but 0 was given"),
        ({"dim": -48}, "dim must be 1 or more, but -48"),
        ({"layers": 0, "experts": ()}, "layers must be 1 or more"),
        ({"kv_heads": -2}, "kv_heads must be 0"),
        ({"norm_eps": float("nan")}, "norm_eps must be a number over 0, but nan"),
        ({"rope_theta": 0.0}, "rope_theta must be a number over 0"),
        ({"experts": (4, 0, -1)}, r"experts cannot be negative, but \[4, 0, -1\]"),
        ({"experts": (4, 0, 1)}, "top_k=2 is more than the layer's 1 experts"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(MODERN, **change)


def test_too_long_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="25 tokens pass the model's 24 positions"):
        _model(GPT2)(_tokens(GPT2, 1, 25))


@pytest.mark.gpu
@pytest.mark.parametrize("config", [MODERN, GPT2], ids=["modern", "gpt2"])
def test_cuda_equals_cpu(config: ModelConfig) -> None:
    """Loss and every gradient, on the routes that the CPU took; recomputing blocks and not."""
    expected, tokens_BS, targets_BS = _model(config), _tokens(config), _tokens(config)
    out = expected(tokens_BS, targets_BS=targets_BS)
    (out.lm + 0.1 * out.aux).backward()
    routes = tuple(route.cuda() for route in out.routes)
    for recompute in ("none", "selective", "full"):
        model = GPT(config, device="cuda")
        model.init_weights(5)
        model.recompute = recompute
        got = model(tokens_BS.cuda(), targets_BS=targets_BS.cuda(), routes=routes)
        (got.lm + 0.1 * got.aux).backward()
        assert_close_rms(got.lm, out.lm, 1e-5, "loss")
        for name, grad in _gradients(expected).items():
            assert_close_rms(_gradients(model)[name], grad, 1e-4, name)
