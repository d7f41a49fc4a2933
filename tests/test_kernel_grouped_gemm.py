"""grouped_gemm by torch and by Triton against a loop in fp64: values, both gradients, ragged and empty experts."""

import pytest
import torch
from helpers import assert_close_rms
from torch import Tensor

from coterie.kernels.backend import forced
from coterie.kernels.grouped_gemm import _rows, _weights, grouped_gemm, grouped_gemm_reference

BACKENDS = ["torch", "interpret"]
# (rows per expert, rows after the last expert, K, N)
CASES = {
    "ragged": ([5, 0, 37, 3], 4, 21, 13),
    "odd": ([17, 1, 16, 0, 33], 0, 7, 35),
    "one expert takes all": ([0, 0, 50], 0, 33, 18),
    "one row": ([0, 1, 0, 0], 0, 5, 3),
    "no rows for anyone": ([0, 0], 6, 9, 11),
    "no rows at all": ([0, 0, 0], 0, 9, 11),
    "one expert": ([34], 1, 16, 32),
}


def _operands(counts: list[int], tail: int, depth: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = sum(counts) + tail
    x_RK, dy_RN = torch.randn(rows, depth), torch.randn(rows, width)
    return x_RK, torch.randn(len(counts), width, depth), torch.tensor(counts), dy_RN


def _gradients(run, x_RK: Tensor, w_ENK: Tensor, counts_E: Tensor, dy_RN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x_RK, w_ENK = x_RK.detach().requires_grad_(), w_ENK.detach().requires_grad_()
    y_RN = run(x_RK, w_ENK, counts_E)
    return y_RN.detach(), *torch.autograd.grad(y_RN, (x_RK, w_ENK), dy_RN)


def _check(backend: str | None, operands: tuple[Tensor, ...], ratio: float) -> None:
    x_RK, w_ENK, counts_E, dy_RN = operands
    expected = _gradients(grouped_gemm_reference, x_RK.double(), w_ENK.double(), counts_E, dy_RN.double())
    with forced(backend):
        actual = _gradients(grouped_gemm, *operands)
    for name, got, want in zip(("y", "dx", "dw"), actual, expected, strict=True):
        assert got.dtype == x_RK.dtype
        assert_close_rms(got, want, ratio, name)


def test_reference_is_a_product_per_expert() -> None:
    x_RK, w_ENK, counts_E, _ = _operands([2, 0, 3], 1, 4, 5)
    y_RN = grouped_gemm_reference(x_RK, w_ENK, counts_E)
    expert_of = [0, 0, 2, 2, 2]
    for r, e in enumerate(expert_of):
        assert_close_rms(y_RN[r], w_ENK[e] @ x_RK[r])
    assert (y_RN[5] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_matches_the_reference(case: str, backend: str, poisoned: None) -> None:
    _check(backend, _operands(*CASES[case]), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_after_the_last_expert_may_hold_anything(backend: str) -> None:
    x_RK, w_ENK, counts_E, dy_RN = _operands([5, 0, 18], 9, 12, 7)
    x_RK[23:], dy_RN[23:] = torch.nan, torch.nan
    with forced(backend):
        y_RN, dx_RK, dw_ENK = _gradients(grouped_gemm, x_RK, w_ENK, counts_E, dy_RN)
    assert (y_RN[23:] == 0).all()
    assert (dx_RK[23:] == 0).all()
    assert torch.isfinite(y_RN).all()
    assert torch.isfinite(dw_ENK).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_operands(backend: str) -> None:
    x_RK, w_ENK, counts_E, _ = _operands([4, 9], 0, 10, 6)
    dy_RN = torch.randn(1, 1).expand(13, 6)
    _check(backend, (x_RK.t().contiguous().t(), w_ENK.mT.contiguous().mT, counts_E, dy_RN), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    x_RK, w_ENK, counts_E, dy_RN = _operands([3, 0, 6], 1, 10, 6)
    x_RK, w_ENK = x_RK.requires_grad_(), w_ENK.requires_grad_()
    with forced(backend):
        torch.library.opcheck(_rows, (x_RK, w_ENK, counts_E, False))
        torch.library.opcheck(_rows, (dy_RN.requires_grad_(), w_ENK, counts_E, True))
        torch.library.opcheck(_weights, (dy_RN.detach(), x_RK.detach(), counts_E))


@pytest.mark.parametrize("backend", ["reference", "torch", "interpret"])
def test_only_what_needs_a_gradient_gets_one(backend: str) -> None:
    x_RK, w_ENK, counts_E, dy_RN = _operands([3, 4], 0, 5, 6)
    with forced(backend):
        grouped_gemm(x_RK, w_ENK.requires_grad_(), counts_E).backward(dy_RN)
    assert x_RK.grad is None
    assert_close_rms(w_ENK.grad[1], dy_RN[3:].t() @ x_RK[3:])


def test_bad_operands_are_named() -> None:
    x_RK, w_ENK, counts_E, _ = _operands([3, 4], 0, 5, 6)
    with pytest.raises(ValueError, match=r"\(7, 4\) and weights \(2, 6, 5\)"):
        grouped_gemm(x_RK[:, :4], w_ENK, counts_E)
    with pytest.raises(ValueError, match="were given for 2 experts"):
        grouped_gemm(x_RK, w_ENK, counts_E[:1])
    with pytest.raises(ValueError, match="must be the same"):
        grouped_gemm(x_RK, w_ENK.half(), counts_E)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("dtype", "ratio"), [(torch.bfloat16, 5e-3), (torch.float16, 1e-3), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", CASES)
def test_matches_the_reference_on_cuda(
    case: str, dtype: torch.dtype, ratio: float, backend: str, poisoned: None
) -> None:
    operands = _operands(*CASES[case])
    _check(backend, tuple(t.cuda().to(dtype) if t.is_floating_point() else t.cuda() for t in operands), ratio)


@pytest.mark.gpu
@pytest.mark.parametrize(("depth", "width"), [(512, 384), (520, 200), (131, 257)])
def test_many_tiles_on_cuda(depth: int, width: int, poisoned: None) -> None:
    x_RK, w_ENK, counts_E, dy_RN = _operands([700, 0, 1, 128, 3000, 127, 129], 300, depth, width)
    _check(
        "triton", (x_RK.cuda().bfloat16(), w_ENK.cuda().bfloat16(), counts_E.cuda(), dy_RN.cuda().bfloat16()), 5e-3
    )


@pytest.mark.gpu
def test_no_sync_and_the_same_bits_on_cuda() -> None:
    operands = tuple(t.cuda() for t in _operands([70, 0, 300], 20, 96, 64))
    first = _gradients(grouped_gemm, *operands)
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = _gradients(grouped_gemm, *operands)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31_on_cuda() -> None:
    # 36 matrices of 2^26 elements and 270,000 rows of 2^13: the last expert and the last rows lie past 2^31.
    experts, width, rows = 36, 8192, 270_000
    bf16 = {"dtype": torch.bfloat16, "device": "cuda"}
    w_ENK = torch.zeros(experts, width, width, **bf16)
    w_ENK[-1] = torch.randn(width, width, **bf16) / 90
    x_RK, dy_RN = torch.zeros(rows, width, **bf16), torch.zeros(rows, width, **bf16)
    x_RK[-200:], dy_RN[-200:] = torch.randn(200, width, **bf16), torch.randn(200, width, **bf16)
    counts_E = torch.zeros(experts, dtype=torch.int64, device="cuda")
    counts_E[0], counts_E[-1] = rows - 200, 200
    y_RN, dx_RK, dw_ENK = _gradients(grouped_gemm, x_RK, w_ENK, counts_E, dy_RN)
    w, x, dy = w_ENK[-1].float(), x_RK[-200:].float(), dy_RN[-200:].float()
    assert_close_rms(y_RN[-200:], x @ w.t(), 5e-3, "y")
    assert_close_rms(dx_RK[-200:], dy @ w, 5e-3, "dx")
    assert_close_rms(dw_ENK[-1], dy.t() @ x, 5e-3, "dw")
    assert not y_RN[:-200].any()
    assert not dw_ENK[:-1].any()
