"""The CPU kernels of inference against fp64: every dtype, odd sizes, and a row's bits whatever the other rows are."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close_rms
from torch import Tensor

from coterie.kernels import backend, gate_native, native, norm_native
from coterie.kernels.argmax import argmax
from coterie.kernels.gate import gate
from coterie.kernels.gate_native import mix_, scale_by_sigmoid_
from coterie.kernels.linear import linear
from coterie.kernels.rmsnorm import rms_norm, rms_norm_add
from coterie.kernels.rope import rope_both_, rope_reference, rope_table
from coterie.models.layers import Norm
from coterie.moe.config import GateConfig
from coterie.moe.gate import Gate

KINDS = [torch.float32, torch.bfloat16]
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 3e-3}


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    if native.library() is None:
        pytest.skip(str(native.why_not()))
    with torch.inference_mode():
        yield


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [1, 5, 8, 33, 700])
@pytest.mark.parametrize("inputs", [1, 31, 64, 1001])
def test_linear_is_the_product(dtype: torch.dtype, bias: bool, outputs: int, inputs: int) -> None:
    w, b = _random(outputs, inputs, dtype=dtype), _random(outputs, dtype=dtype)
    for rows in (1, 2, 3, 4, 5, 7, 70, 500):
        x = _random(rows, inputs, dtype=dtype)
        assert native.ready(x, w)
        want = x.double() @ w.double().T + (b.double() if bias else 0)
        error = (linear(x, w, b if bias else None).double() - want).abs()
        sums = x.double().norm(dim=-1, keepdim=True) * w.double().norm(dim=-1)  # which rounding grows with
        assert (error <= 1e-6 * sums + 2 * ROUNDING[dtype] * want.abs()).all()


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("outputs", "inputs"), [(37, 515), (600, 96), (16, 4100)])
def test_a_row_of_linear_has_the_same_bits_in_any_company(
    dtype: torch.dtype, outputs: int, inputs: int, threads: int
) -> None:
    w, x = _random(outputs, inputs, dtype=dtype), _random(560, inputs, dtype=dtype)
    torch.set_num_threads(1)
    alone = torch.cat([linear(row, w) for row in x[:70].split(1)])
    torch.set_num_threads(threads)
    for rows in [*range(1, 71), 560]:
        first = 70 - rows if rows <= 70 else 0
        y = linear(x[first : first + rows], w)
        assert torch.equal(y[: 70 - first], alone[first:]), rows


def test_linear_keeps_leading_axes_and_takes_no_rows() -> None:
    w = torch.randn(6, 4)
    x = torch.randn(2, 3, 4)
    assert_close_rms(linear(x, w), x @ w.T, 1e-6)
    assert linear(x[:0], w).shape == (0, 3, 6)
    assert linear(x, w[:0]).shape == (2, 3, 0)
    assert torch.equal(linear(x[..., :0].contiguous(), w[:, :0].contiguous()), torch.zeros(2, 3, 6))


def test_linear_leaves_the_rest_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr("coterie.kernels.linear._native", lambda *a: called.append(a))
    x, w = torch.randn(4, 6), torch.randn(5, 6)
    for case in [
        (x.t(), w[:, :4]),
        (x, torch.randn(6, 5).t()),
        (x.double(), w.double()),
        (x, w, torch.ones(10)[::2]),
    ]:
        assert_close_rms(linear(*case), F.linear(*case), 1e-6)
    with torch.inference_mode(False):
        linear(torch.randn(4, 6), torch.randn(5, 6))
    assert not called


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="does not fit the weight"):
        linear(torch.ones(2, 3), torch.ones(4, 5))


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("dim", [1, 7, 16, 100, 513])
def test_norms(kind: str, dtype: torch.dtype, dim: int) -> None:
    norm = Norm(dim, kind, 1e-3, dtype=dtype)
    for parameter in norm.parameters():
        parameter.normal_()
    x, residual = 3 * _random(3, 11, dim, dtype=dtype) + 1, _random(3, 11, dim, dtype=dtype)
    y, (y_of_sum, total) = norm(x), norm.add(x, residual)
    assert torch.equal(total, x + residual)
    for got, of in ((y, x), (y_of_sum, total)):
        wide = of.double()
        centred = wide - wide.mean(-1, keepdim=True) if kind == "layernorm" else wide
        want = centred * (centred.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * norm.weight.double()
        want = want if norm.bias is None else want + norm.bias.double()
        assert_close_rms(got, want, ROUNDING[dtype] + 1e-6)


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_norm_of_strided_keys(heads: bool, batch: int) -> None:
    kv = torch.randn(batch, 5, 2, 3, 20)
    k = kv[:, :, 0] if heads else kv[:, :, 0].flatten(-2)
    assert not k.is_contiguous()
    weight = torch.randn(k.shape[-1])
    assert norm_native.ready(k, weight)
    assert torch.equal(rms_norm(k, weight, 1e-5), rms_norm(k.contiguous(), weight, 1e-5))
    for other in (k[..., ::2], k.transpose(0, 1)[::2], kv[:, :, :, 0, 0]):
        assert not norm_native.ready(other, weight[: other.shape[-1]])


@pytest.mark.parametrize("dtype", KINDS)
def test_a_row_of_norms_and_rotations_has_the_same_bits_in_any_company(dtype: torch.dtype, threads: int) -> None:
    x, other, weight = (_random(*shape, dtype=dtype) for shape in ((150, 400), (150, 400), (400,)))
    cos, sin = rope_table(torch.arange(150), 40, 1e4)
    q, k = x.view(1, 150, 10, 40), other.view(1, 150, 10, 40)
    norms, sums = rms_norm(x, weight, 1e-5), rms_norm_add(x, other, weight, 1e-5)
    turned = rope_both_(q.clone(), k.clone(), cos, sin)
    for row in (0, 70, 149):
        at = slice(row, row + 1)
        assert torch.equal(rms_norm(x[at], weight, 1e-5), norms[at])
        assert torch.equal(rms_norm_add(x[at], other[at], weight, 1e-5)[0], sums[0][at])
        alone = rope_both_(q[:, at].clone(), k[:, at].clone(), cos[at], sin[at])
        assert all(torch.equal(a, b[:, at]) for a, b in zip(alone, turned, strict=True))


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("width", [2, 10, 32, 70])
@pytest.mark.parametrize("own_positions", [False, True])
def test_rope_of_strided_keys(dtype: torch.dtype, width: int, own_positions: bool, monkeypatch) -> None:
    monkeypatch.setattr("coterie.kernels.rope.rope", None)  # not the torch path
    q, kv = _random(2, 5, 6, width, dtype=dtype), _random(2, 5, 2, 3, width, dtype=dtype)
    positions = torch.randint(0, 3000, (2, 5) if own_positions else (5,))
    cos, sin = rope_table(positions, width, 1e4)
    want = [rope_reference(x.double(), cos.double(), sin.double()) for x in (q, kv[:, :, 0])]
    values = kv[:, :, 1].clone()
    for got, turned in zip(rope_both_(q, kv[:, :, 0], cos, sin), want, strict=True):
        assert_close_rms(got, turned, ROUNDING[dtype])
    assert torch.equal(kv[:, :, 1], values)


def test_rope_leaves_odd_strides_to_torch() -> None:
    cos, sin = rope_table(torch.arange(5), 8, 1e4)
    q, k = torch.randn(1, 6, 5, 8).transpose(1, 2), torch.randn(1, 5, 3, 16)[..., ::2]
    for got, x in zip(rope_both_(q, k, cos, sin), (q, k), strict=True):
        assert_close_rms(got, rope_reference(x, cos, sin), 1e-6)
    with pytest.raises(ValueError, match="rope"):
        rope_both_(torch.ones(1, 4, 2, 8), torch.ones(1, 4, 2, 8), cos, sin)


def _gate(config: GateConfig, experts: int, top_k: int, dim: int = 40) -> Gate:
    made = Gate(dim, experts, top_k, config).eval()
    made.weight.normal_()
    if made.bias_E is not None:
        made.bias_E.normal_(std=0.2)
    return made


GATES = {
    "softmax": (GateConfig(), 16, 2),
    "top 1": (GateConfig(), 16, 1),
    "not renormalised": (GateConfig(renormalize="none", route_scale=2.5), 64, 8),
    "sigmoid with bias": (GateConfig(score="sigmoid", bias_update=1e-3, renormalize="after_drop"), 31, 4),
    "groups": (GateConfig(score="sigmoid", bias_update=1e-3, groups=4, topk_groups=2, route_scale=1.5), 32, 6),
    "groups of one": (GateConfig(groups=8, topk_groups=3), 8, 2),
    "all of them": (GateConfig(), 3, 3),
}


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("dtype", KINDS)
def test_the_gate_chooses_as_torch_does(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    made = _gate(*GATES[name])
    x = _random(200, 40, dtype=dtype)
    want = made(x)  # with losses: torch's path
    monkeypatch.setattr("coterie.moe.gate.gate", None)
    for rows in (0, 1, 33, 200):
        got = made(x[:rows], losses=False)
        assert torch.equal(got.choices_TK, want.choices_TK[:rows])
        assert torch.equal(got.ids_TK, got.choices_TK)
        assert_close_rms(got.weights_TK, want.weights_TK[:rows], 1e-6)
        assert got.stats.asked_E.tolist() == got.ids_TK.flatten().bincount(minlength=made.num_experts).tolist()
        assert torch.equal(got.stats.kept_E, got.stats.asked_E)
        assert (int(got.stats.rows), int(got.stats.tokens)) == (got.ids_TK.numel(), rows)
    for field, other in zip(got.stats, want.stats, strict=True):
        assert (field.dtype, field.shape) == (other.dtype, other.shape)


def test_a_token_of_the_gate_has_the_same_bits_in_any_company(threads: int) -> None:
    made = _gate(GateConfig(), 24, 3, dim=500)
    x = _random(130, 500, dtype=torch.bfloat16)
    want = made(x, losses=False)
    for rows in range(1, 71):
        got = made(x[60 : 60 + rows], losses=False)
        assert torch.equal(got.ids_TK, want.ids_TK[60 : 60 + rows])
        assert torch.equal(got.weights_TK, want.weights_TK[60 : 60 + rows])


def test_ties_go_to_the_lowest_index_and_nan_to_valid_experts() -> None:
    made = _gate(GateConfig(), 8, 3)
    made.weight.zero_()
    assert made(torch.ones(5, 40), losses=False).ids_TK.tolist() == [[0, 1, 2]] * 5
    x = torch.full((1, 40), torch.nan)
    assert made(x, losses=False).ids_TK.tolist() == made(x).ids_TK.tolist() == [[0, 1, 2]]


def test_the_gate_leaves_drops_noise_and_replays_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_native, "route", None)
    x = torch.randn(6, 40)
    _gate(GateConfig(eval_capacity_factor=1.0), 8, 2)(x, losses=False)
    _gate(GateConfig(), 8, 2).train()(x, losses=False)
    made = _gate(GateConfig(), 8, 2)
    made(x, torch.ones(6, dtype=torch.bool), losses=False)
    made(x, replay_TK=torch.zeros(6, 2, dtype=torch.int64), losses=False)
    with backend.forced("reference"):
        made(x, losses=False)
    with pytest.raises(TypeError):
        made(x, losses=False)


@pytest.mark.parametrize("dtype", KINDS)
def test_scaling_by_a_sigmoid(dtype: torch.dtype) -> None:
    x, logits = _random(37, 19, dtype=dtype), 4 * _random(37, 1, dtype=dtype)
    want = x.double() * logits.double().sigmoid()
    alone = torch.cat([scale_by_sigmoid_(r.clone(), n) for r, n in zip(x.split(1), logits.split(1), strict=True)])
    got = scale_by_sigmoid_(x, logits)
    assert got is x
    assert torch.equal(got, alone)
    assert_close_rms(got, want, ROUNDING[dtype])
    assert scale_by_sigmoid_(x.double(), logits.double()) is not x


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("size", [1, 17, 33])
def test_residual_is_mixed(dtype: torch.dtype, size: int) -> None:
    y, residual, logits = (_random(70, n, dtype=dtype) for n in (size, size, 2))
    logits *= 5
    share = logits.double().softmax(-1)
    want = y.double() * share[:, :1] + residual.double() * share[:, 1:]
    alone = torch.cat([mix_(y[i : i + 1].clone(), residual[i : i + 1], logits[i : i + 1]) for i in range(70)])
    got = mix_(y, residual, logits)
    assert got is y
    assert torch.equal(got, alone)
    assert_close_rms(got, want, ROUNDING[dtype])
    assert_close_rms(
        mix_(y.double(), residual.double(), logits.double()),
        y.double() * share[:, :1] + residual.double() * share[:, 1:],
        1e-6,
    )


def test_mixed_dtypes_are_left_to_torch() -> None:
    x = torch.randn(3, 8).bfloat16()
    assert not norm_native.ready(x, torch.ones(8))
    assert not norm_native.ready(x, x[0], x[1].float())
    assert not norm_native.ready(x, x[0], None, x.float())
    assert norm_native.ready(x, x[0], x[1], x)
    assert not gate_native.ready(x, torch.ones(4, 8).bfloat16(), None)
    assert gate(torch.randn(3, 4), 2).ids_TK.shape == (3, 2)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("size", [1, 7, 16, 1024, 1025, 5003])
def test_argmax_is_the_first_of_the_largest(dtype: torch.dtype, size: int, threads: int) -> None:
    x = torch.randint(-9, 9, (40, size)).to(dtype)
    x[3] = -torch.inf
    x[4, size // 2] = torch.inf
    x[5, size // 3 :] = torch.nan
    ids, best = argmax(x)
    want = x.float().amax(-1)
    assert torch.equal(ids, x.float().argmax(-1))
    assert torch.equal(best.nan_to_num(7.25), want.nan_to_num(7.25))
