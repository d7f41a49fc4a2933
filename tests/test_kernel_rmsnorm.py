"""rms_norm and rms_norm_add against the reference: values and every gradient, on each backend."""

import pytest
import torch
from helpers import assert_close_rms

from coterie.kernels import rmsnorm
from coterie.kernels.backend import forced

SHAPES = [(1, 5), (3, 7), (2, 5, 96), (67, 130), (0, 8)]


def inputs(shape, dtype=torch.float32, device="cpu"):
    weight_dtype = dtype
    tensors = [torch.randn(shape), torch.randn(shape), 1 + 0.3 * torch.randn(shape[-1])]
    tensors = [
        t.to(device, kind).requires_grad_() for t, kind in zip(tensors, (dtype, dtype, weight_dtype), strict=True)
    ]
    return tensors, torch.randn(shape).to(device, dtype), torch.randn(shape).to(device, dtype)


def compare(backend, shape, add, dtype=torch.float32, device="cpu", ratio=1e-5):
    (x, residual, weight), dy, dh = inputs(shape, dtype, device)

    def run(name):
        with forced(name):
            if add:
                outputs, leaves, grads = (
                    rmsnorm.rms_norm_add(x, residual, weight, 1e-5),
                    (x, residual, weight),
                    (dy, dh),
                )
            else:
                outputs, leaves, grads = (rmsnorm.rms_norm(x, weight, 1e-5),), (x, weight), (dy,)
            return outputs, torch.autograd.grad(outputs, leaves, grads)

    actual, expected = run(backend), run("reference")
    for what, got, wanted in zip(("output", "gradient"), actual, expected, strict=True):
        for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
            assert a.dtype == b.dtype
            assert_close_rms(a, b, ratio, f"{what} {i}")


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["torch", "interpret"])
def test_matches_the_reference(backend, shape, add, poisoned):
    compare(backend, shape, add)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(
    ("backend", "dtype", "ratio"), [("torch", torch.bfloat16, 2e-3), ("interpret", torch.float16, 4e-4)]
)
def test_half_precision_rounds_once(backend, dtype, ratio, add):
    # The reference rounds only its results, so equal sums may differ by one last place in a few elements.
    # The interpreter cuts bf16 off instead of rounding.
    compare(backend, (33, 48), add, dtype, ratio=ratio)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "ratio"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-3)])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (1027, 2880), (3, 8192)])
def test_matches_the_reference_on_cuda(shape, add, dtype, ratio):
    compare("triton", shape, add, dtype, "cuda", ratio)


def test_double_precision_gradients_are_exact():
    x, residual = (torch.randn(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b, w: rmsnorm.rms_norm_add(a, b, w, 1e-5), (x, residual, weight))
    assert torch.autograd.gradcheck(lambda a, w: rmsnorm.rms_norm(a, w, 1e-5), (x, weight))


def test_is_pytorchs_rms_norm():
    x, weight = torch.randn(6, 11), torch.randn(11)
    assert_close_rms(rmsnorm.rms_norm(x, weight, 1e-3), torch.nn.functional.rms_norm(x, (11,), weight, 1e-3))


def test_only_one_output_used():
    (x, residual, weight), dy, dh = inputs((5, 6))
    y, h = rmsnorm.rms_norm_add(x, residual, weight, 1e-5)
    dx, dr = torch.autograd.grad(h, (x, residual), dh, retain_graph=True)
    assert torch.equal(dx, dh)
    assert torch.equal(dr, dh)
    alone = torch.autograd.grad(rmsnorm.rms_norm(x + residual, weight, 1e-5), (x, weight), dy)
    for got, wanted in zip(torch.autograd.grad(y, (x, weight), dy), alone, strict=True):
        assert_close_rms(got, wanted)


@pytest.mark.parametrize("backend", ["torch", "interpret"])
def test_strided_input_and_no_grad(backend):
    x = torch.randn(7, 4, 5).transpose(0, 1)
    weight = torch.randn(5)
    with forced(backend), torch.no_grad():
        assert_close_rms(rmsnorm.rms_norm(x, weight, 1e-5), rmsnorm.rms_norm_reference(x, weight, 1e-5))


@pytest.mark.parametrize("backend", ["torch", "interpret"])
def test_strided_weight(backend):
    x, weight = torch.randn(7, 5, requires_grad=True), torch.randn(10)[::2].requires_grad_()
    with forced(backend):
        actual = rmsnorm.rms_norm(x, weight, 1e-5)
        got = actual, *torch.autograd.grad(actual.square().sum(), (x, weight))
    expected = rmsnorm.rms_norm_reference(x, weight, 1e-5)
    wanted = expected, *torch.autograd.grad(expected.square().sum(), (x, weight))
    for a, b in zip(got, wanted, strict=True):
        assert_close_rms(a, b)


@pytest.mark.parametrize("backend", ["torch", "interpret"])
def test_operators_pass_opcheck(backend):
    (x, residual, weight), dy, dh = inputs((3, 4, 6))
    gradients = (dy, dh, x.detach(), weight.detach(), torch.rand(3, 4, 1))
    with forced(backend):
        torch.library.opcheck(torch.ops.coterie.rms_norm.default, (x, weight, 1e-5))
        torch.library.opcheck(torch.ops.coterie.rms_norm_add.default, (x, residual, weight, 1e-5))
        torch.library.opcheck(torch.ops.coterie.rms_norm_backward.default, gradients)


def test_a_weight_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"weight \(4,\) does not fit x \(2, 5\)"):
        rmsnorm.rms_norm(torch.randn(2, 5), torch.randn(4), 1e-5)
