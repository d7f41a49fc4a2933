"""The experts of CPU inference against loops in fp64, and what a token's answer must not depend on."""

import math
import os
import subprocess
import sys

import oracle
import pytest
import torch
from helpers import assert_close_rms
from torch import Tensor

from coterie.kernels import expert_native, native
from coterie.kernels.backend import forced
from coterie.kernels.tape import Tape
from coterie.moe.config import GateConfig, MoEConfig
from coterie.moe.experts import Experts, FeedForward
from coterie.moe.layer import MoE

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no CPU kernels: {native.why_not()}")
RATIO = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
E, D, F, K = 5, 43, 70, 2


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def _experts(
    activation: str = "swiglu", bias: bool = True, dtype: torch.dtype = torch.float32, dim: int = D, hidden: int = F
) -> Experts:
    experts = Experts(dim, hidden, E, activation=activation, bias=bias)
    for b in (experts.b_in, experts.b_out):
        if b is not None:
            torch.nn.init.normal_(b)
    return experts.to(dtype)


def _ids(tokens: int) -> Tensor:
    """Distinct experts of every token, of which the last expert has none."""
    return torch.rand(tokens, E - 1).argsort(1)[:, :K].contiguous()


def _expected(experts: Experts, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """A loop over tokens and choices, in fp64."""
    own = [None if p is None else p.double() for p in (experts.w_in, experts.w_out, experts.b_in, experts.b_out)]
    y_TD = torch.zeros_like(x_TD, dtype=torch.float64)
    for t, ids in enumerate(ids_TK.tolist()):
        for k, e in enumerate(ids):
            if e >= 0:
                parts = [None if p is None else p[e] for p in own]
                y_TD[t] += weights_TK[t, k].double() * oracle.feed_forward(
                    x_TD[t].double(), *parts, experts.activation
                )
    return y_TD


def _run(experts: Experts, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    own = experts.w_in, experts.w_out, experts.b_in, experts.b_out
    assert expert_native.ready(x_TD, *own)
    return expert_native.experts(x_TD, ids_TK, weights_TK, *own, experts.activation)


@pytest.mark.parametrize("dtype", list(RATIO))
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize(("dim", "hidden"), [(D, F), (3, 17), (64, 32), (32, 96), (100, 300)])
def test_equals_the_oracle(activation: str, bias: bool, dtype: torch.dtype, dim: int, hidden: int) -> None:
    experts = _experts(activation, bias, dtype, dim, hidden)
    for tokens in (1, 2, 7, 90):
        x_TD, ids_TK, weights_TK = torch.randn(tokens, dim).to(dtype), _ids(tokens), torch.rand(tokens, K)
        ids_TK[torch.rand(tokens, K) < 0.2] = -1
        expected_TD = _expected(experts, x_TD, ids_TK, weights_TK)
        assert_close_rms(_run(experts, x_TD, ids_TK, weights_TK), expected_TD, RATIO[dtype], "y")


@pytest.mark.skipif("amx_bf16" not in native._processor(), reason="the processor has no tiles to do without")
def test_without_tiles() -> None:
    """What a process has taken once it keeps: another one is asked."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "oracle or alone"]
    environment = {**os.environ, "COTERIE_TILES": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("dim", [12, 32])
@pytest.mark.parametrize("dtype", list(RATIO))
def test_one_expert_for_all_and_more_tokens_than_are_taken_at_once(dtype: torch.dtype, dim: int) -> None:
    experts = _experts(dtype=dtype, dim=dim, hidden=20 if dim == 12 else 64)
    tokens = 2 * expert_native._AT_ONCE + 3
    x_TD, ids_TK = torch.randn(tokens, dim).to(dtype), torch.tensor([[3, -1]]).expand(tokens, K)
    y_TD = _run(experts, x_TD, ids_TK, None)
    some = torch.tensor([0, 1, 515, 2047, 2048, 4096, tokens - 1])
    expected_TD = _expected(experts, x_TD[some], ids_TK[some], torch.ones(len(some), K))
    assert_close_rms(y_TD[some], expected_TD, RATIO[dtype], "y")
    for t in some.tolist():
        assert torch.equal(y_TD[t : t + 1], _run(experts, x_TD[t : t + 1], ids_TK[t : t + 1], None))


@pytest.mark.parametrize("extreme", [-1e4, -90.0, -30.0, 90.0, 1e4])
def test_activations_of_large_numbers(extreme: float) -> None:
    for activation in ("swiglu", "gelu"):
        experts = _experts(activation, dim=1, hidden=16)
        torch.nn.init.constant_(experts.w_in, 1)
        x_TD, ids_TK = torch.full((1, 1), extreme), torch.tensor([[0]])
        y_TD = _run(experts, x_TD, ids_TK, torch.ones(1, 1))
        torch.testing.assert_close(
            y_TD.double(), _expected(experts, x_TD, ids_TK, torch.ones(1, 1)), rtol=1e-5, atol=1e-5
        )


def test_dropped_tokens_and_nothing_at_all() -> None:
    experts, x_TD = _experts(), torch.randn(6, D)
    assert torch.equal(_run(experts, x_TD, torch.full((6, K), -1), torch.rand(6, K)), torch.zeros(6, D))
    assert _run(experts, x_TD[:0], torch.zeros(0, K, dtype=torch.int64), torch.rand(0, K)).shape == (0, D)
    assert torch.equal(_run(experts, x_TD, torch.zeros(6, 0, dtype=torch.int64), None), torch.zeros(6, D))


@pytest.mark.parametrize("dtype", list(RATIO))
@pytest.mark.parametrize(("dim", "hidden"), [(D, F), (96, 224)])
def test_a_token_is_alone(dtype: torch.dtype, dim: int, hidden: int) -> None:
    """Its bits depend on no other token, on no order of theirs, and not on the number of threads."""
    experts = _experts(dtype=dtype, dim=dim, hidden=hidden)
    x_TD, ids_TK, weights_TK = torch.randn(211, dim).to(dtype), _ids(211), torch.rand(211, K)
    y_TD = _run(experts, x_TD, ids_TK, weights_TK)
    for tokens in (1, 2, 3, 4, 5, 6, 9, 17, 40, 150):
        some = torch.randperm(211)[:tokens]
        assert torch.equal(_run(experts, x_TD[some], ids_TK[some], weights_TK[some]), y_TD[some]), tokens
    mates_TD = torch.full_like(x_TD, math.nan)
    mates_TD[100] = x_TD[100]
    assert torch.equal(_run(experts, mates_TD, ids_TK, weights_TK)[100], y_TD[100])
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3, 5):
            torch.set_num_threads(number)
            assert torch.equal(_run(experts, x_TD, ids_TK, weights_TK), y_TD), f"{number} threads"
    finally:
        torch.set_num_threads(threads)


def test_refuses_ids_and_shapes_that_do_not_fit() -> None:
    experts, x_TD = _experts(), torch.randn(3, D)
    with pytest.raises(ValueError, match="not below the number of experts, 5"):
        _run(experts, x_TD, torch.tensor([[0, 1], [2, 5], [1, 0]]), None)
    with pytest.raises(ValueError, match="ids of shape"):
        _run(experts, x_TD, torch.zeros(4, K, dtype=torch.int64), None)
    with pytest.raises(ValueError, match="weights of"):
        _run(experts, x_TD, torch.zeros(3, K, dtype=torch.int64), torch.rand(3, 1))
    with pytest.raises(ValueError, match="do not fit"):
        _run(experts, torch.randn(3, D + 1), torch.zeros(3, K, dtype=torch.int64), None)
    with pytest.raises(ValueError, match="do not fit"):
        expert_native.feed_forward(x_TD, torch.ones(2, F, D), torch.ones(D, F + 1), None, None, "swiglu")


def test_what_the_kernel_does_not_take() -> None:
    experts, x_TD = _experts(), torch.randn(6, D)
    own = experts.w_in, experts.w_out, experts.b_in, experts.b_out
    assert expert_native.ready(x_TD, *own)
    assert not expert_native.ready(torch.randn(D, 6).t(), *own)
    assert not expert_native.ready(x_TD.bfloat16(), *own)
    assert not expert_native.ready(x_TD.double(), *own)
    with forced("reference"):
        assert not expert_native.ready(x_TD, *own)
    with torch.inference_mode(False):
        assert not expert_native.ready(x_TD, *own)


def _calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    calls: list[int] = []
    original = getattr(expert_native, name)
    monkeypatch.setattr(expert_native, name, lambda *a, **k: calls.append(1) or original(*a, **k))
    return calls


@pytest.mark.parametrize("dtype", list(RATIO))
def test_the_layer_takes_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole layer, with what lies beside the experts, as torch computes it with gradients on."""
    gate = GateConfig(eval_capacity_factor=1.0)
    config = MoEConfig(hidden=F, top_k=K, gate=gate, bias=True, residual=True, shared_hidden=24)
    with torch.inference_mode(False):
        layer = MoE(D, E, config).eval()
        for name, p in layer.named_parameters():
            if not name.startswith("gate"):
                p.data = (p.data + 0.1 * torch.randn_like(p)).to(dtype)
        x_BSD = torch.randn(3, 11, D).to(dtype)
        expected = layer(x_BSD)
    assert (expected.routing.ids_TK < 0).any()
    experts, dense = _calls(monkeypatch, "experts"), _calls(monkeypatch, "feed_forward")
    found = layer(x_BSD)
    assert (len(experts), len(dense)) == (1, 2)
    assert torch.equal(found.routing.ids_TK, expected.routing.ids_TK)
    assert_close_rms(found.y, expected.y.detach().double(), 3 * RATIO[dtype], "y")


@pytest.mark.parametrize("dtype", list(RATIO))
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_a_dense_network(activation: str, dtype: torch.dtype) -> None:
    network = FeedForward(D, F, activation=activation, bias=True).to(dtype)
    torch.nn.init.normal_(network.b_in)
    x_BSD = torch.randn(2, 9, D).to(dtype)
    own = [p.double() for p in (network.w_in, network.w_out, network.b_in, network.b_out)]
    expected_TD = torch.stack([oracle.feed_forward(x_D.double(), *own, activation) for x_D in x_BSD.flatten(0, 1)])
    y_BSD = network(x_BSD)
    assert_close_rms(y_BSD.flatten(0, 1), expected_TD, RATIO[dtype], "y")
    assert torch.equal(network(x_BSD[1, 4]), y_BSD[1, 4])


def test_weights_that_do_not_lie_together_go_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, x_TD, ids_TK, weights_TK = _experts(), torch.randn(6, D), _ids(6), torch.rand(6, K)
    y_TD = experts(x_TD, ids_TK, weights_TK)
    with torch.inference_mode(False):
        experts.w_out = torch.nn.Parameter(
            experts.w_out.detach().clone().transpose(1, 2).contiguous().transpose(1, 2)
        )
    calls = _calls(monkeypatch, "experts")
    assert_close_rms(experts(x_TD, ids_TK, weights_TK), y_TD.double(), 1e-5, "y")
    assert not calls


def test_a_recorded_step_runs_again_and_says_what_failed() -> None:
    experts, network = _experts(), FeedForward(D, F)
    x_TD, ids_TK, weights_TK = torch.randn(6, D), _ids(6), torch.rand(6, K)
    tape = Tape(lambda: network(experts(x_TD, ids_TK, weights_TK)))
    x_TD.normal_()
    ids_TK.copy_(_ids(6))
    assert torch.equal(tape.replay(), network(experts(x_TD, ids_TK, weights_TK)))
    ids_TK[3, 1] = E
    with pytest.raises(RuntimeError, match="experts_fp32 failed"):
        tape.replay()
