"""causal_attention, and the linear layer around it, against plain torch: values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close_rms

from coterie.kernels import attention
from coterie.kernels.attention import causal_attention, causal_attention_reference
from coterie.kernels.backend import forced
from coterie.kernels.linear import linear

# batch, sequence, query heads, key heads, head width; with blocks of 8 queries.
SHAPES = [(1, 1, 1, 1, 4), (2, 8, 3, 3, 4), (3, 21, 6, 2, 5), (1, 40, 4, 1, 8)]


def inputs(shape, dtype, device="cpu"):
    batch, sequence, heads, groups, width = shape
    # Slices of one projection, as the model gives them.
    fused = torch.randn(batch, sequence, heads + 2 * groups, width).to(device, dtype).requires_grad_()
    return (
        fused,
        fused.split((heads, groups, groups), 2),
        torch.randn(batch, sequence, heads, width).to(device, dtype),
    )


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 8)


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_match_the_reference(shape, small_blocks, poisoned):
    fused, parts, do = inputs(shape, torch.float32)
    actual, expected = torch.ops.coterie.causal_attention(*parts), causal_attention_reference(*parts)
    assert_close_rms(actual, expected, 1e-5, "output")
    got, wanted = (torch.autograd.grad(o, fused, do)[0] for o in (actual, expected))
    assert_close_rms(got, wanted, 1e-5, "gradient")


def test_double_precision_gradients_are_exact(small_blocks):
    _, parts, _ = inputs((1, 11, 2, 1, 3), torch.float64)
    leaves = tuple(p.detach().requires_grad_() for p in parts)
    assert torch.autograd.gradcheck(torch.ops.coterie.causal_attention.default, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_way_matches_the_reference(dtype):
    fused, parts, do = inputs((2, 70, 4, 2, 16), dtype)
    ratio = 1e-5 if dtype == torch.float32 else 1e-2
    actual, expected = causal_attention(*parts), causal_attention_reference(*parts)
    assert actual.dtype == dtype
    assert_close_rms(actual, expected, ratio, "output")
    got, wanted = (torch.autograd.grad(o, fused, do)[0] for o in (actual, expected))
    assert_close_rms(got, wanted, ratio, "gradient")


@pytest.mark.gpu
def test_matches_the_reference_on_cuda():
    fused, parts, do = inputs((2, 70, 4, 2, 64), torch.bfloat16, "cuda")
    actual, expected = causal_attention(*parts), causal_attention_reference(*parts)
    assert_close_rms(actual, expected, 1e-2, "output")
    got, wanted = (torch.autograd.grad(o, fused, do)[0] for o in (actual, expected))
    assert_close_rms(got, wanted, 1e-2, "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 4, 4, 2, 8), (2, 0, 4, 2, 8), (2, 0, 3, 3, 8)])
def test_no_tokens_at_all(shape, dtype):
    fused, parts, do = inputs(shape, dtype)
    o = causal_attention(*parts)
    assert o.shape == do.shape
    assert torch.autograd.grad(o, fused, do)[0].shape == fused.shape


def test_later_tokens_change_nothing(small_blocks):
    _, (q, k, v), _ = inputs((1, 20, 2, 1, 4), torch.bfloat16)
    with torch.no_grad():
        whole = causal_attention(q, k, v)
        part = causal_attention(q[:, :13], k[:, :13], v[:, :13])
    assert_close_rms(part, whole[:, :13], 5e-3)


def test_heads_that_do_not_fit_are_refused():
    q, k = torch.randn(1, 4, 3, 2), torch.randn(1, 4, 2, 2)
    with pytest.raises(ValueError, match="do not fit"):
        causal_attention(q, k, k)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 7), (0, 4)])
def test_linear_matches_torch(shape, bias, poisoned):
    x, w = torch.randn(shape, requires_grad=True), torch.randn(6, shape[-1], requires_grad=True)
    b = torch.randn(6, requires_grad=True) if bias else None
    leaves = [t for t in (x, w, b) if t is not None]
    actual, expected = linear(x, w, b), F.linear(x, w, b)
    assert_close_rms(actual, expected)
    dy = torch.randn_like(expected)
    for got, wanted in zip(
        torch.autograd.grad(actual, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True
    ):
        assert_close_rms(got, wanted)


def test_linear_makes_only_the_gradients_that_are_needed():
    x, w = torch.randn(4, 3), torch.randn(5, 3, requires_grad=True)
    linear(x, w).sum().backward()
    assert_close_rms(w.grad, x.sum(0).expand(5, 3))
    linear(x.requires_grad_(), w.detach()).sum().backward()
    assert_close_rms(x.grad, w.detach().sum(0).expand(4, 3))
    with torch.no_grad():
        assert not linear(x, w).requires_grad
    with forced("reference"):
        assert_close_rms(linear(x, w), F.linear(x, w))


def test_operators_pass_opcheck():
    _, parts, do = inputs((2, 5, 4, 2, 3), torch.float32)
    leaves = tuple(p.detach().requires_grad_() for p in parts)
    torch.library.opcheck(torch.ops.coterie.causal_attention.default, leaves)
    torch.library.opcheck(torch.ops.coterie.causal_attention_backward.default, (do, *(p.detach() for p in parts)))
    x, w = torch.randn(2, 4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.coterie.linear.default, (x, w))
    args = (torch.randn(2, 4, 5), x.detach(), w.detach(), True, False)
    torch.library.opcheck(torch.ops.coterie.linear_backward.default, args)
