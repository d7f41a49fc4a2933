"""The gate against the oracle: choices, drops, weights, losses, statistics and gradients, option by option."""

import pytest
import torch
from helpers import assert_close_rms
from oracle import draw, route
from torch import Tensor

from coterie.moe.config import GateConfig, MoEConfig
from coterie.moe.gate import Gate, Routing, seed_noise

T, D, E, S = 21, 10, 6, 7

CASES = {
    "plain": (2, GateConfig()),
    "top1": (1, GateConfig(aux_scope="micro")),
    "raw": (3, GateConfig(renormalize="none", route_scale=2.5)),
    "sigmoid": (3, GateConfig(score="sigmoid", z_weight=0.1)),
    "groups": (2, GateConfig(score="sigmoid", groups=3, topk_groups=2, bias_update=1e-3)),
    "one member groups": (2, GateConfig(groups=6, topk_groups=3)),
    "bias": (2, GateConfig(bias_update=1e-3, capacity_factor=0.7, min_capacity=1, drop_policy="probability")),
    "jitter": (2, GateConfig(noise="jitter", jitter_eps=0.2)),
    "gumbel": (3, GateConfig(noise="gumbel", aux_scope="sequence")),
    "gumbel groups": (2, GateConfig(noise="gumbel", groups=2, score="sigmoid")),
    "sampled second": (2, GateConfig(second_expert="sampled", renormalize="after_drop", capacity_factor=0.8)),
    "sequence": (2, GateConfig(aux_scope="sequence", score="sigmoid", z_weight=0.3)),
    "position before": (2, GateConfig(capacity_factor=0.6, min_capacity=1)),
    "position after": (3, GateConfig(capacity_factor=0.6, min_capacity=1, renormalize="after_drop")),
    "position raw": (1, GateConfig(capacity_factor=0.5, min_capacity=1, renormalize="none")),
    "probability": (2, GateConfig(capacity_factor=0.6, drop_policy="probability", renormalize="after_drop")),
    "probability sigmoid": (3, GateConfig(capacity_factor=0.5, drop_policy="probability", score="sigmoid")),
    "random": (2, GateConfig(capacity_factor=0.6, drop_policy="random", min_capacity=2)),
    "random noisy": (2, GateConfig(capacity_factor=0.6, drop_policy="random", noise="jitter", z_weight=0.1)),
    "least capacity": (1, GateConfig(capacity_factor=0.1, min_capacity=3)),
}


def _make(top_k: int, config: GateConfig) -> Gate:
    gate = Gate(D, E, top_k, config)
    torch.nn.init.normal_(gate.weight, std=0.7)
    if gate.bias_E is not None:
        gate.bias_E.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0, -0.1, 0.25]))
    return gate


def _padded(ids: list[list[int]], K: int) -> Tensor:
    return torch.tensor([row or [-1] * K for row in ids]).view(-1, K)


def _compare(out: Routing, expected, K: int, config: GateConfig) -> None:
    assert torch.equal(out.choices_TK, _padded(expected.choices, K))
    assert torch.equal(out.ids_TK, _padded(expected.kept, K))
    assert out.stats.asked_E.tolist() == expected.asked
    assert out.stats.kept_E.tolist() == expected.kept_counts
    assert out.stats.tokens.item() == expected.tokens
    assert out.stats.rows.item() == sum(expected.kept_counts)
    assert out.stats.asked_E.dtype == out.stats.kept_E.dtype == out.choices_TK.dtype == torch.int64
    for name in ("aux", "z"):
        assert_close_rms(getattr(out, name), getattr(expected, name), name=name)
    assert_close_rms(out.stats.entropy, expected.entropy, name="entropy")
    for t, row in enumerate(expected.weights):
        left = [(e, w) for e, w in zip(out.ids_TK[t].tolist(), out.weights_TK[t], strict=True) if e >= 0]
        assert [e for e, _ in left] == [e for e, _ in row]
        for (_, actual), (_, weight) in zip(left, row, strict=True):
            assert_close_rms(actual, weight, 3e-6, name=f"weight of token {t}")
    assert (out.weights_TK[out.ids_TK < 0] == 0).all()


def _weighted(routed, factors_TE: Tensor) -> Tensor:
    """A scalar of the oracle's weights that differs for every token and expert."""
    terms = [w * factors_TE[t, e].double() for t, row in enumerate(routed.weights) for e, w in row]
    return sum(terms, torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize("padding", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("case", CASES)
def test_training_forward_and_gradients(case: str, padding: bool) -> None:
    K, config = CASES[case]
    gate = _make(K, config)
    x_TD = torch.randn(T, D, requires_grad=True)
    valid_T = torch.rand(T) > 0.3 if padding else None
    generator = torch.Generator().manual_seed(5)
    out = gate(x_TD, valid_T, sequence_length=S, generator=generator)

    noise = draw(config, T, D, E, K, torch.Generator().manual_seed(5))
    x64_TD = x_TD.detach().double().requires_grad_()
    w64_ED = gate.weight.detach().double().requires_grad_()
    expected = route(
        x64_TD,
        w64_ED,
        K,
        config,
        valid=None if valid_T is None else valid_T.tolist(),
        bias=None if gate.bias_E is None else gate.bias_E.tolist(),
        sequence_length=S,
        noise=noise,
    )
    _compare(out, expected, K, config)
    if "capacity_factor" in repr(config) and config.capacity_factor and config.capacity_factor <= 0.6:
        assert sum(expected.kept_counts) < sum(expected.asked), "the case was meant to drop"

    factors_TE = torch.randn(T, E)
    mine = (out.weights_TK * factors_TE.gather(1, out.ids_TK.clamp(min=0))).sum() + 0.3 * out.aux
    theirs = _weighted(expected, factors_TE) + 0.3 * expected.aux
    if config.z_weight:
        mine, theirs = mine + config.z_weight * out.z, theirs + config.z_weight * expected.z
    mine.backward()
    theirs.backward()
    assert_close_rms(x_TD.grad, x64_TD.grad, name="x")
    assert_close_rms(gate.weight.grad, w64_ED.grad, name="router")
    if valid_T is not None:
        assert (x_TD.grad[~valid_T] == 0).all()


@pytest.mark.parametrize("case", ["gumbel", "jitter", "sampled second", "position before", "random"])
def test_evaluation_has_no_noise_and_its_own_capacity(case: str) -> None:
    K, config = CASES[case]
    gate = _make(K, config).eval()
    x_TD = torch.randn(T, D)
    first, again = gate(x_TD, sequence_length=S), gate(x_TD, sequence_length=S)
    clean = GateConfig(aux_scope=config.aux_scope, renormalize=config.renormalize)
    expected = route(x_TD.double(), gate.weight.double(), K, clean, training=False, sequence_length=S)
    _compare(first, expected, K, clean)
    assert torch.equal(first.weights_TK, again.weights_TK)


def test_evaluation_drops_by_its_own_factor() -> None:
    config = GateConfig(capacity_factor=None, eval_capacity_factor=0.5, min_capacity=1)
    gate = _make(2, config)
    x_TD = torch.randn(T, D)
    assert gate(x_TD).stats.kept_E.sum() == 2 * T
    out = gate.eval()(x_TD)
    expected = route(x_TD.double(), gate.weight.double(), 2, config, training=False)
    _compare(out, expected, 2, config)
    assert out.stats.kept_E.max() == 4  # ceil(21 * 2 / 6 * 0.5)


@pytest.mark.parametrize(
    ("tokens", "K", "experts", "factor", "least", "rows"),
    [
        (21, 2, 6, 1.0, 1, 7),
        (21, 2, 6, 1.1, 1, 8),
        (100, 1, 10, 1.1, 1, 11),
        (5, 1, 8, 1.0, 4, 4),
        (0, 2, 4, 1.0, 0, 0),
    ],
)
def test_capacity(tokens: int, K: int, experts: int, factor: float, least: int, rows: int) -> None:
    gate = Gate(D, experts, K, GateConfig(capacity_factor=factor, min_capacity=least))
    assert gate.capacity(tokens) == rows
    torch.nn.init.zeros_(gate.weight)  # all tokens choose the first experts
    for valid_T in (None, torch.ones(tokens, dtype=torch.bool)):
        assert gate(torch.randn(tokens, D), valid_T).stats.kept_E[0] == min(rows, tokens)
    assert gate.eval().capacity(tokens) is None


def test_second_choices_enter_after_all_first_ones() -> None:
    # Token 0 wants (0, 1), tokens 1 and 2 want (1, 0). With room for two, expert 1 keeps its two first choices.
    gate = Gate(3, 3, 2, GateConfig(capacity_factor=1.0, min_capacity=0))
    torch.nn.init.eye_(gate.weight)
    out = gate(torch.tensor([[2.0, 1.0, -9.0], [1.0, 2.0, -9.0], [1.0, 2.0, -9.0]]))
    assert out.choices_TK.tolist() == [[0, 1], [1, 0], [1, 0]]
    assert out.ids_TK.tolist() == [[0, -1], [1, 0], [1, -1]]


def test_ties_go_to_the_lowest_index() -> None:
    gate = Gate(4, 5, 3, GateConfig())
    torch.nn.init.zeros_(gate.weight)
    assert gate(torch.randn(2, 4)).choices_TK.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_bias_chooses_but_never_weighs() -> None:
    gate = _make(2, GateConfig(bias_update=1e-3, renormalize="none"))
    assert gate.bias_E is not None
    x_TD = torch.randn(T, D)
    gate.bias_E.copy_(torch.tensor([0.0, 0.0, 0.0, 9.0, 0.0, 0.0]))
    out = gate(x_TD)
    assert (out.choices_TK[:, 0] == 3).all()
    probs_TE = (x_TD @ gate.weight.t()).softmax(-1)
    assert_close_rms(out.weights_TK[:, 0], probs_TE[:, 3])
    assert "bias_E" in gate.state_dict()
    assert "bias_E" not in _make(2, GateConfig()).state_dict()


def test_bias_stays_in_fp32() -> None:
    gate = _make(2, GateConfig(bias_update=1e-3))
    assert gate.bias_E is not None
    before = gate.bias_E.clone()
    gate.to(torch.bfloat16)
    assert gate.weight.dtype == torch.bfloat16
    assert torch.equal(gate.bias_E, before)
    assert gate(torch.randn(T, D, dtype=torch.bfloat16)).weights_TK.dtype == torch.float32


@pytest.mark.parametrize("case", ["plain", "random noisy", "random", "gumbel", "sampled second", "position after"])
def test_replay_repeats_choices_drops_and_weights(case: str) -> None:
    K, config = CASES[case]
    gate = _make(K, config)
    seed_noise(gate, seed=3, step=11)
    x_TD, valid_T = torch.randn(T, D), torch.rand(T) > 0.2
    gate(x_TD, valid_T, sequence_length=S)
    first = gate(x_TD, valid_T, sequence_length=S)
    again = gate(x_TD, valid_T, sequence_length=S, replay_TK=first.choices_TK)
    for left, right in zip([*first[:5], *first.stats], [*again[:5], *again.stats], strict=True):
        assert torch.equal(left, right)


def test_replay_takes_ids_from_the_record_and_weights_from_live_logits() -> None:
    config = GateConfig()
    gate = _make(2, config)
    x_TD = torch.randn(T, D, requires_grad=True)
    record_TK = torch.stack([torch.randperm(E)[:2] for _ in range(T)])
    out = gate(x_TD, replay_TK=record_TK)
    x64_TD, w64_ED = x_TD.detach().double().requires_grad_(), gate.weight.detach().double().requires_grad_()
    expected = route(x64_TD, w64_ED, 2, config, replay=record_TK.tolist())
    _compare(out, expected, 2, config)
    factors_TE = torch.randn(T, E)
    ((out.weights_TK * factors_TE.gather(1, record_TK)).sum() + out.aux).backward()
    (_weighted(expected, factors_TE) + expected.aux).backward()
    assert_close_rms(x_TD.grad, x64_TD.grad)
    assert_close_rms(gate.weight.grad, w64_ED.grad)


def test_noise_leaves_the_global_stream_alone_and_follows_seed_layer_and_step() -> None:
    config = GateConfig(noise="jitter", capacity_factor=0.6, drop_policy="random")
    layers = torch.nn.ModuleList([_make(2, config) for _ in range(2)])
    layers[1].weight.data.copy_(layers[0].weight.data)
    x_TD = torch.randn(T, D)
    before = torch.get_rng_state()

    def step(seed: int, number: int, rank: int = 0) -> list[Tensor]:
        seed_noise(layers, seed, number, rank)
        return [layer(x_TD).weights_TK for layer in layers for _ in range(2)]

    first = step(1, 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, step(1, 4), strict=True))
    others = [first[1], first[2], step(1, 5)[0], step(2, 4)[0], step(1, 4, rank=1)[0]]
    assert all(not torch.equal(first[0], other) for other in others)


def test_gumbel_draws_experts_by_their_probability() -> None:
    gate = Gate(1, 3, 1, GateConfig(noise="gumbel"))
    gate.weight.data.copy_(torch.tensor([0.2, 0.5, 0.3]).log()[:, None])
    out = gate(torch.ones(40_000, 1))
    share_E = out.stats.asked_E / 40_000
    assert torch.allclose(share_E, torch.tensor([0.2, 0.5, 0.3]), atol=0.01)
    assert torch.allclose(out.weights_TK[:, 0], torch.tensor([0.2, 0.5, 0.3])[out.ids_TK[:, 0]], atol=1e-6)


def test_no_tokens() -> None:
    for case in ("plain", "position after", "sequence"):
        K, config = CASES[case]
        gate = _make(K, config)
        x_TD = torch.randn(0, D, requires_grad=True)
        out = gate(x_TD, sequence_length=S)
        assert out.ids_TK.shape == (0, K)
        assert out.stats.tokens == 0
        (out.weights_TK.sum() + out.aux + out.z).backward()
        assert x_TD.grad is not None
        assert gate(torch.randn(T, D), torch.zeros(T, dtype=torch.bool), sequence_length=S).aux == 0


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MoEConfig(top_k=9).check(8), "top_k=9 is more than the layer's 8"),
        (lambda: MoEConfig(gate=GateConfig(groups=3)).check(8), "3 groups of equal size"),
        (lambda: MoEConfig(top_k=3, gate=GateConfig(groups=4)).check(8), "best 1 of 4 groups"),
        (lambda: MoEConfig(top_k=1, gate=GateConfig(second_expert="sampled")), "needs top_k=2"),
        (lambda: GateConfig(drop_policy="priority"), "drop_policy='priority' is not one of position, probability, r"),  # type: ignore[arg-type]
        (lambda: GateConfig(aux_scope="batch"), "aux_scope='batch' is not one of micro, sequence, global"),  # type: ignore[arg-type]
        (lambda: MoEConfig(activation="relu"), "activation='relu' is not one of swiglu, gelu"),  # type: ignore[arg-type]
        (lambda: GateConfig(capacity_factor=0.0), "capacity_factor must be over 0"),
        (lambda: GateConfig(groups=2, topk_groups=3), r"1\.\.groups=2"),
        (lambda: Gate(D, E, 2, GateConfig(aux_scope="sequence"))(torch.randn(T, D)), "sequence length"),
    ],
)
def test_mistakes_are_named(make, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()
