"""The MoE layer on one rank against the oracle: outputs, all gradients, padding, replay, statistics."""

import math

import pytest
import torch
from helpers import assert_close_rms
from oracle import draw, feed_forward, layer, parameters, route
from torch import Tensor

from coterie.moe import metrics
from coterie.moe.config import GateConfig, MoEConfig
from coterie.moe.experts import FeedForward
from coterie.moe.gate import Gate, Stats
from coterie.moe.layer import MoE

B, S, D, E, F = 3, 7, 10, 6, 14

CASES = {
    "plain": MoEConfig(hidden=F),
    "top1 residual": MoEConfig(hidden=F, top_k=1, residual=True),
    "gelu bias": MoEConfig(hidden=F, top_k=3, activation="gelu", bias=True),
    "swiglu bias residual": MoEConfig(hidden=F, bias=True, residual=True),
    "shared": MoEConfig(hidden=F, shared_hidden=9),
    "gated shared": MoEConfig(hidden=F, shared_hidden=9, shared_gate=True, activation="gelu"),
    "everything": MoEConfig(
        hidden=F,
        top_k=2,
        bias=True,
        residual=True,
        shared_hidden=9,
        shared_gate=True,
        gate=GateConfig(
            score="sigmoid",
            groups=3,
            topk_groups=2,
            renormalize="after_drop",
            capacity_factor=0.7,
            min_capacity=1,
            drop_policy="random",
            noise="jitter",
            route_scale=1.7,
            aux_scope="sequence",
            z_weight=0.2,
            bias_update=1e-3,
        ),
    ),
    "dropping": MoEConfig(hidden=F, gate=GateConfig(capacity_factor=0.6, min_capacity=1)),
}


def _make(config: MoEConfig) -> MoE:
    moe = MoE(D, E, config)
    torch.nn.init.normal_(moe.gate.weight, std=0.7)
    for name, p in moe.named_parameters():
        if name.endswith(("b_in", "b_out", "coefficient.bias")):
            torch.nn.init.normal_(p, std=0.5)
    if moe.gate.bias_E is not None:
        moe.gate.bias_E.copy_(torch.linspace(-0.1, 0.1, E))
    return moe


def _seeded(moe: MoE, seed: int) -> None:
    """Gives the layer's gate the generator that the oracle repeats."""
    moe.gate._own_generator = lambda device, replaying: torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_all_gradients(case: str, padding: bool) -> None:
    config = CASES[case]
    moe = _make(config)
    x_BSD = torch.randn(B, S, D, requires_grad=True)
    valid_BS = torch.rand(B, S) > 0.3 if padding else None
    _seeded(moe, 9)
    out = moe(x_BSD, valid_BS)

    p = parameters(moe)
    x64_TD = x_BSD.detach().double().view(-1, D).requires_grad_()
    noise = draw(config.gate, B * S, D, E, config.top_k, torch.Generator().manual_seed(9))
    routed = route(
        x64_TD,
        p["gate.weight"],
        config.top_k,
        config.gate,
        valid=None if valid_BS is None else valid_BS.flatten().tolist(),
        bias=None if moe.gate.bias_E is None else moe.gate.bias_E.tolist(),
        sequence_length=S,
        noise=noise,
    )
    y64_TD = layer(p, x64_TD, routed, config)
    assert_close_rms(out.y.view(-1, D), y64_TD, name="y")
    assert out.routing.stats.kept_E.tolist() == routed.kept_counts

    dy_TD = torch.randn(B * S, D)
    z_weight = config.gate.z_weight
    ((out.y.view(-1, D) * dy_TD).sum() + 0.4 * out.routing.aux + z_weight * out.routing.z).backward()
    ((y64_TD * dy_TD.double()).sum() + 0.4 * routed.aux + z_weight * routed.z).backward()
    assert_close_rms(x_BSD.grad.view(-1, D), x64_TD.grad, name="x")
    for name, parameter in moe.named_parameters():
        expected = p[name].grad
        assert expected is not None, name
        assert expected.abs().max() > 0, name
        assert_close_rms(parameter.grad, expected, name=name)


@pytest.mark.parametrize("case", ["plain", "dropping", "everything"])
def test_replay_gives_the_same_layer_bitwise(case: str) -> None:
    moe = _make(CASES[case])
    x_BSD, valid_BS = torch.randn(B, S, D), torch.rand(B, S) > 0.2
    first = moe(x_BSD, valid_BS)
    again = moe(x_BSD, valid_BS, replay_TK=first.routing.choices_TK)
    assert torch.equal(first.y, again.y)
    assert torch.equal(first.routing.ids_TK, again.routing.ids_TK)


def test_replay_survives_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    moe = _make(CASES["everything"])
    x_BSD = torch.randn(B, S, D, requires_grad=True)
    plain = torch.autograd.grad(moe(x_BSD).y.square().sum(), [x_BSD, *moe.parameters()])
    moe.gate.draws -= 1  # the same noise again
    record: list[Tensor] = []

    replays: list[bool] = []

    def block(x: Tensor) -> Tensor:
        replays.append(bool(record))
        out = moe(x, replay_TK=record[0] if record else None)
        record.append(out.routing.choices_TK)
        return out.y

    y = checkpoint(block, x_BSD, use_reentrant=False, preserve_rng_state=False)
    again = torch.autograd.grad(y.square().sum(), [x_BSD, *moe.parameters()])
    assert replays == [False, True]
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("case", ["plain", "top1 residual", "gated shared", "dropping"])
def test_padding_does_not_change_the_tokens(case: str) -> None:
    moe = _make(CASES[case])
    x_BSD = torch.randn(B, S, D)
    padded = torch.full((B, S + 2, D), 3.0)
    padded[:, 2:] = x_BSD
    valid_BS = (torch.arange(S + 2) >= 2).expand(B, -1)
    assert_close_rms(moe(padded, valid_BS).y[:, 2:], moe(x_BSD).y)


def test_padding_visits_no_expert() -> None:
    moe = _make(CASES["plain"])
    out = moe(torch.randn(B, S, D), torch.zeros(B, S, dtype=torch.bool))
    assert (out.y == 0).all()
    assert out.routing.stats.rows == 0


@pytest.mark.parametrize("shape", [(1, 1), (0, 4), (1, 5)])
def test_few_tokens(shape: tuple[int, int]) -> None:
    moe = _make(CASES["gated shared"])
    x_BSD = torch.randn(*shape, D, requires_grad=True)
    out = moe(x_BSD)
    assert out.y.shape == x_BSD.shape
    (out.y.sum() + out.routing.aux).backward()
    assert all(p.grad is not None for p in moe.parameters())


def test_one_expert_with_one_choice_is_the_dense_network_times_one() -> None:
    moe = MoE(D, 1, MoEConfig(hidden=F, top_k=1))
    dense = FeedForward(D, F)
    dense.load_state_dict({"w_in": moe.experts.w_in[0].detach(), "w_out": moe.experts.w_out[0].detach()})
    x_BSD = torch.randn(B, S, D)
    assert_close_rms(moe(x_BSD).y, dense(x_BSD))  # the one expert's softmax is 1


def test_bf16_is_close_to_fp32() -> None:
    moe = MoE(D, E, MoEConfig(hidden=F, residual=True), dtype=torch.bfloat16)
    assert moe.gate.weight.dtype == torch.float32
    assert moe.experts.w_in.dtype == moe.coefficient.weight.dtype == torch.bfloat16
    wide = MoE(D, E, moe.config)
    wide.load_state_dict(moe.state_dict())
    x_BSD = torch.randn(B, S, D).bfloat16()
    out, expected = moe(x_BSD), wide(x_BSD.float())
    assert out.y.dtype == torch.bfloat16
    assert torch.equal(out.routing.choices_TK, expected.routing.choices_TK)
    assert_close_rms(out.y, expected.y, 2e-2)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "ratio"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_feed_forward(activation: str, bias: bool, dtype: torch.dtype, ratio: float) -> None:
    # On a CPU fp32 takes the experts' operation, everything else torch's own.
    net = FeedForward(D, F, activation=activation, bias=bias, dtype=dtype)
    if bias:
        torch.nn.init.normal_(net.b_in)
        torch.nn.init.normal_(net.b_out)
    x_BSD = torch.randn(B, S, D, dtype=dtype, requires_grad=True)
    dy_BSD = torch.randn(B, S, D, dtype=dtype)
    y_BSD = net(x_BSD)
    (y_BSD * dy_BSD).sum().backward()
    p = parameters(net)
    x64_TD = x_BSD.detach().double().view(-1, D).requires_grad_()
    args = p["w_in"], p["w_out"], p.get("b_in"), p.get("b_out"), activation
    y64_TD = torch.stack([feed_forward(x_D, *args) for x_D in x64_TD])
    (y64_TD * dy_BSD.double().view(-1, D)).sum().backward()
    assert_close_rms(y_BSD.view(-1, D), y64_TD, ratio)
    assert_close_rms(x_BSD.grad.view(-1, D), x64_TD.grad, ratio)
    for name, parameter in net.named_parameters():
        assert_close_rms(parameter.grad, p[name].grad, ratio, name)


def test_experts_start_different() -> None:
    w_in = MoE(D, E, MoEConfig(hidden=F, residual=True)).experts.w_in
    assert all(not torch.equal(w_in[0], w_in[e]) for e in range(1, E))


def test_built_on_meta() -> None:
    with torch.device("meta"):
        moe = MoE(D, E, CASES["everything"])
    assert all(p.is_meta for p in moe.parameters())
    moe.to_empty(device="cpu")
    assert moe.gate.bias_E is not None
    assert moe.gate.bias_E.dtype == torch.float32


@pytest.mark.parametrize("case", ["dropping", "everything"])
def test_no_value_is_read_on_the_host(case: str) -> None:
    # Under fake tensors reading one raises, as it would stall a GPU.
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        moe = MoE(D, E, CASES[case])
        moe.gate._own_generator = lambda device, replaying: None
        x_BSD = torch.randn(B, S, D, requires_grad=True)
        out = moe(x_BSD, torch.ones(B, S, dtype=torch.bool))
        (out.y.sum() + out.routing.aux + out.routing.z).backward()
    assert out.y.shape == x_BSD.grad.shape == (B, S, D)


def test_compiles_in_one_graph() -> None:
    moe = _make(CASES["dropping"])
    compiled = torch.compile(moe, backend="aot_eager", fullgraph=True)
    x_BSD = torch.randn(B, S, D)
    results = []
    for layer_ in (moe, compiled):
        x = x_BSD.clone().requires_grad_()
        out = layer_(x)
        (out.y.square().sum() + out.routing.aux).backward()
        results.append((out.y, x.grad, out.routing.ids_TK))
    assert_close_rms(results[1][0], results[0][0])
    assert_close_rms(results[1][1], results[0][1])
    assert torch.equal(results[1][2], results[0][2])


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="width of its experts"):
        MoE(D, E, MoEConfig())
    with pytest.raises(ValueError, match="top_k=7 is more"):
        MoE(D, E, MoEConfig(hidden=F, top_k=7))
    with pytest.raises(ValueError, match="shared_gate=True needs"):
        MoEConfig(shared_gate=True)


def _stats(asked: list[int], kept: list[int], rows: int, entropy: float, tokens: int) -> Stats:
    whole = [torch.tensor(v) for v in (asked, kept)]
    return Stats(*whole, torch.tensor(entropy), torch.tensor(rows), torch.tensor(tokens))


def test_metrics_of_known_layers() -> None:
    layers = [_stats([4, 4], [4, 4], 8, 3.0, 4), _stats([6, 1, 1, 0], [4, 1, 1, 0], 12, 1.0, 4)]
    out = metrics.summarize(layers)
    assert out["load_worst"] == 3.0
    assert out["load_p50"] == 2.0
    assert math.isclose(out["load_p95"], 2.9)
    assert out["drop_worst"] == 0.25
    assert out["drop_p50"] == 0.125
    assert out["waste_worst"] == 0.5
    assert out["waste_p50"] == 0.25
    assert out["entropy_worst"] == 0.25
    assert out["entropy_p50"] == 0.5
    assert out["idle_worst"] == 0.25
    assert metrics.loads(layers) == [[4, 4], [6, 1, 1, 0]]
    assert metrics.summarize([]) == {}
    assert metrics.summarize([_stats([0, 0], [0, 0], 0, 0.0, 0)])["load_worst"] == 1.0


def test_stats_add_up_over_micro_batches() -> None:
    moe = _make(CASES["plain"])
    x_BSD = torch.randn(4, S, D)
    whole = (moe(x_BSD).routing.stats,)
    parts = [(moe(x).routing.stats,) for x in x_BSD.split([1, 3])]
    summed = metrics.add(*parts)
    for left, right in zip(whole[0], summed[0], strict=True):
        assert_close_rms(right, left)
        assert left.dtype == right.dtype
    back = metrics.unpack(metrics.pack(whole), whole)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(whole[0], back[0], strict=True))


def test_stats_know_the_gate_alone() -> None:
    out = Gate(D, E, 2, GateConfig())(torch.randn(5, D))
    assert out.stats.rows == 10
    assert out.stats.tokens == 5
