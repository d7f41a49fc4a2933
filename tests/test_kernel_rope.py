"""rope against the reference and against the definition by complex numbers."""

import pytest
import torch
from helpers import assert_close_rms

from coterie.kernels import rope as module
from coterie.kernels.backend import forced
from coterie.kernels.rope import rope, rope_reference, rope_table

SHAPES = [(1, 1, 1, 2), (2, 5, 3, 8), (3, 7, 5, 12), (2, 0, 3, 4)]


def tables(batch, sequence, width, batched, device="cpu"):
    positions = torch.randint(0, 900, (batch, sequence) if batched else (sequence,), device=device)
    return rope_table(positions, width, 10000.0)


def compare(backend, shape, batched, dtype=torch.float32, device="cpu", ratio=1e-5):
    batch, sequence, _, width = shape
    cos, sin = tables(batch, sequence, width, batched, device)
    x, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    x.requires_grad_()
    expected = rope_reference(x, cos, sin)
    (dx_expected,) = torch.autograd.grad(expected, x, dy)
    with forced(backend):
        actual = rope(x, cos, sin)
        (dx,) = torch.autograd.grad(actual, x, dy)
    assert actual.is_contiguous()
    assert actual.dtype == dx.dtype == dtype
    assert_close_rms(actual, expected, ratio, "output")
    assert_close_rms(dx, dx_expected, ratio, "gradient")


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["torch", "interpret"])
def test_matches_the_reference(backend, shape, batched, poisoned):
    compare(backend, shape, batched)


@pytest.mark.parametrize(
    ("backend", "dtype", "ratio"), [("torch", torch.bfloat16, 2e-3), ("interpret", torch.float16, 4e-4)]
)
def test_half_precision_rounds_once(backend, dtype, ratio):
    # The interpreter cuts bf16 off instead of rounding.
    compare(backend, (2, 6, 3, 16), False, dtype, ratio=ratio)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "ratio"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-3)])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 300, 24, 128), (1, 65, 6, 80)])
def test_matches_the_reference_on_cuda(shape, batched, dtype, ratio):
    compare("triton", shape, batched, dtype, "cuda", ratio)


def test_is_a_rotation_by_position_times_frequency():
    width, theta = 6, 100.0
    positions = torch.tensor([0, 3, 17])
    x = torch.randn(2, 3, 4, width, dtype=torch.float64)
    frequency = theta ** -(torch.arange(3, dtype=torch.float64) * 2 / width)
    turn = torch.polar(torch.ones(3, 3, dtype=torch.float64), positions[:, None] * frequency)
    rotated = torch.complex(x[..., :3], x[..., 3:]) * turn[:, None]
    expected = torch.cat((rotated.real, rotated.imag), -1)
    assert_close_rms(rope(x, *rope_table(positions, width, theta)), expected, 1e-6)


@pytest.mark.parametrize("backend", ["torch", "interpret"])
def test_reads_a_slice_of_a_fused_projection(backend):
    fused = torch.randn(2, 5, 7, 8)
    cos, sin = tables(2, 5, 8, batched=False)
    with forced(backend), torch.no_grad():
        for part in (fused[:, :, 2:5], fused.transpose(1, 2).contiguous().transpose(1, 2), fused.flip(-1)):
            assert_close_rms(rope(part, cos, sin), rope_reference(part, cos, sin))


@pytest.mark.parametrize("backend", ["torch", "interpret"])
def test_operator_passes_opcheck(backend):
    x = torch.randn(2, 5, 3, 8, requires_grad=True)
    with forced(backend):
        torch.library.opcheck(torch.ops.coterie.rope.default, (x, *tables(2, 5, 8, batched=True), False))


def test_tables_are_exact_far_out():
    cos, sin = rope_table(torch.tensor([[0, 1], [4095, 8191]]), 4, 10000.0)
    angle = torch.tensor([[0, 1], [4095, 8191]], dtype=torch.float64)[..., None] * torch.tensor([1, 0.01]).double()
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(cos.double(), angle.cos(), atol=5e-5, rtol=0)
    torch.testing.assert_close(sin.double(), angle.sin(), atol=5e-5, rtol=0)


def test_shapes_that_do_not_fit_are_refused():
    cos, sin = tables(1, 5, 8, batched=False)
    with pytest.raises(ValueError, match="rope: x"):
        module.rope(torch.randn(1, 4, 2, 8), cos, sin)
    with pytest.raises(ValueError, match="even head_dim, got 7"):
        rope_table(torch.arange(3), 7, 10000.0)
