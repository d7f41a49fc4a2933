"""linear_cross_entropy and linear_kl against the whole logits: values, gradients, memory."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close_rms
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from coterie.kernels.backend import forced
from coterie.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference, loss_and_gradients
from coterie.kernels.kl import kl_and_gradients, linear_kl, linear_kl_reference

BACKENDS = ["torch", "interpret"]
# tokens, model, vocabulary, chunk: a chunk that does not divide, one token a chunk, one chunk, one token.
CASES = [(13, 6, 29, 5), (4, 3, 17, 1), (7, 5, 40, None), (1, 2, 3, 8), (9, 4, 1, 4)]


def head(tokens, dim, words, dtype=torch.float32, device="cpu"):
    x = torch.randn(tokens, dim).to(device, dtype).requires_grad_()
    w = (torch.randn(words, dim) * 2).to(device, dtype).requires_grad_()
    return x, w, torch.randint(0, words, (tokens,)).to(device)


def compare(actual, expected, leaves, ratio=1e-5):
    """The loss and its gradients, under a gradient of the loss that is no power of two."""
    assert actual.shape == ()
    assert_close_rms(actual, expected, ratio, "loss")
    got = torch.autograd.grad(actual * 0.7, leaves)
    for i, (a, b) in enumerate(zip(got, torch.autograd.grad(expected * 0.7, leaves), strict=True)):
        assert a.dtype == b.dtype
        assert_close_rms(a, b, ratio, f"gradient {i}")


def check_cross_entropy(backend, case, ignored, dtype=torch.float32, device="cpu", ratio=1e-5):
    tokens, dim, words, chunk = case
    x, w, targets = head(tokens, dim, words, dtype, device)
    targets[torch.rand(tokens, device=device) < ignored] = -7
    with forced(backend):
        actual = linear_cross_entropy(x, w, targets, ignore_index=-7, chunk=chunk)
    compare(actual, linear_cross_entropy_reference(x, w, targets, ignore_index=-7), (x, w), ratio)


@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_cross_entropy_matches_the_reference(backend, case, ignored, poisoned):
    check_cross_entropy(backend, case, ignored)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "ratio"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("case", [*CASES, (300, 64, 50257, 128), (2100, 48, 5003, None)])
def test_cross_entropy_matches_the_reference_on_cuda(case, ignored, dtype, ratio, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    check_cross_entropy("triton", case, ignored, dtype, "cuda", ratio)


def test_rows_longer_than_a_block_of_the_kernel(poisoned):
    check_cross_entropy("interpret", (3, 4, 9001, 2), 0.0)


def test_bfloat16_sums_over_chunks_in_fp32(poisoned):
    x, w, targets = head(640, 16, 50, torch.bfloat16)
    loss = linear_cross_entropy(x, w, targets, chunk=5)
    dx, dw = torch.autograd.grad(loss, (x, w))
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    logits = F.linear(*wide)
    expected = torch.autograd.grad(F.cross_entropy(logits, targets, reduction="sum"), wide)
    assert loss.dtype == torch.float32
    assert dx.dtype == dw.dtype == torch.bfloat16
    # Rounding of the logits and of g to 8 bits; a bf16 sum over 128 chunks would be several times worse.
    assert_close_rms(dx, expected[0], 1e-2, "dx")
    assert_close_rms(dw, expected[1], 6e-3, "dw")


def test_gradient_of_the_loss_is_not_rounded_to_bfloat16():
    x, w, targets = head(50, 8, 20, torch.bfloat16)
    whole = torch.autograd.grad(linear_cross_entropy(x, w, targets), (x, w))
    scaled = torch.autograd.grad(linear_cross_entropy(x, w, targets) * 1.00390625 * 0.75, (x, w))
    for a, b in zip(scaled, whole, strict=True):
        ratio = (a.double() * b.double()).sum() / b.double().square().sum()
        assert abs(ratio / (1.00390625 * 0.75) - 1) < 5e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_extreme_logits_stay_finite(backend, extreme):
    x, w = torch.tensor([[extreme, 1.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, 2.0]])
    with forced(backend):
        for target in range(3):
            compare_leaves = [t.clone().requires_grad_() for t in (x, w)]
            t = torch.tensor([target])
            expected = linear_cross_entropy_reference(*compare_leaves, t)
            actual = linear_cross_entropy(*compare_leaves, t)
            compare(actual, expected, compare_leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", [(False, False), (True, False), (False, True)])
def test_makes_only_the_gradients_that_are_needed(backend, needs):
    x, w, targets = head(9, 5, 11)
    expected = linear_cross_entropy_reference(x, w, targets)
    dx, dw = torch.autograd.grad(expected, (x, w))
    leaves = [t.detach().requires_grad_(need) for t, need in zip((x, w), needs, strict=True)]
    with forced(backend):
        loss = linear_cross_entropy(*leaves, targets, chunk=4)
        assert_close_rms(loss, expected)
        assert loss.requires_grad == any(needs)
        if any(needs):
            loss.backward()
        with torch.no_grad():
            assert not linear_cross_entropy(x, w, targets, chunk=4).requires_grad
    for leaf, need, wanted in zip(leaves, needs, (dx, dw), strict=True):
        assert (leaf.grad is not None) == need
        if need:
            assert_close_rms(leaf.grad, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_at_all(backend):
    x, w = torch.randn(0, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    with forced(backend):
        loss = linear_cross_entropy(x, w, torch.zeros(0, dtype=torch.int64))
        loss.backward()
    assert loss.item() == 0
    assert x.grad is not None
    assert x.grad.shape == (0, 4)
    assert torch.equal(w.grad, torch.zeros(6, 4))


def test_an_ignored_token_may_hold_nan():
    x, w, targets = head(5, 4, 6)
    with torch.no_grad():
        x[2] = float("nan")
    targets[2] = -100
    linear_cross_entropy(x, w, targets).backward()
    assert torch.isfinite(w.grad).all()
    assert torch.equal(x.grad[2], torch.zeros(4))


def test_is_the_same_twice_and_backward_may_run_twice():
    x, w, targets = head(40, 8, 30)
    loss = linear_cross_entropy(x, w, targets, chunk=7)
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    second = torch.autograd.grad(loss, (x, w))
    again = torch.autograd.grad(linear_cross_entropy(x, w, targets, chunk=7), (x, w))
    for a, b, c in zip(first, second, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


class Largest(TorchDispatchMode):
    """Remembers the largest storage of any tensor."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_whole_logits_never_exist(backend, dtype):
    tokens, dim, words, chunk = 96, 3, 500, 8
    x, w, targets = (t.detach() for t in head(tokens, dim, words, dtype))
    teacher = torch.randn(tokens, 2, dtype=dtype), torch.randn(words, 2, dtype=dtype)
    # The operators' bodies: a mode does not see inside an operator.
    for run in (
        lambda: loss_and_gradients(x, w, targets, -100, chunk, True, True),
        lambda: kl_and_gradients(x, w, *teacher, None, 2.0, chunk, True, True),
    ):
        with forced(backend), Largest() as largest:
            run()
        wide = 4 if backend == "torch" else x.element_size()
        assert chunk * words * x.element_size() <= largest.bytes <= chunk * words * wide
    with Largest() as largest:
        linear_cross_entropy_reference(x, w, targets)
    assert largest.bytes == tokens * words * 4


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_kl_matches_the_reference(backend, case, masked, temperature, poisoned):
    check_kl(backend, case, masked, temperature)


def check_kl(backend, case, masked, temperature, dtype=torch.float32, device="cpu", ratio=1e-5):
    tokens, dim, words, chunk = case
    x, w, _ = head(tokens, dim, words, dtype, device)
    teacher_x, teacher_w, _ = head(tokens, dim + 3, words, dtype, device)
    valid = torch.rand(tokens, device=device) < 0.6 if masked else None
    with forced(backend):
        actual = linear_kl(x, w, teacher_x, teacher_w, temperature=temperature, valid_T=valid, chunk=chunk)
    expected = linear_kl_reference(x, w, teacher_x, teacher_w, temperature=temperature, valid_T=valid)
    compare(actual, expected, (x, w), ratio)
    assert torch.autograd.grad(actual, teacher_w, allow_unused=True)[0] is None


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", [*CASES[:4], (300, 64, 50257, 128)])
def test_kl_matches_the_reference_on_cuda(case, masked, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    check_kl("triton", case, masked, 2.0, torch.float32, "cuda")


def test_kl_of_a_teacher_with_itself_is_zero():
    x, w, _ = head(6, 4, 15)
    loss = linear_kl(x, w, x.detach(), w.detach(), temperature=3.0)
    assert abs(loss.item()) < 1e-5
    assert max(g.abs().max().item() for g in torch.autograd.grad(loss, (x, w))) < 1e-5


def test_double_precision_gradients_are_exact():
    x, w, targets = head(5, 3, 7, torch.float64)
    teacher = torch.randn(5, 2).double(), torch.randn(7, 2).double()
    assert torch.autograd.gradcheck(lambda a, b: linear_cross_entropy(a, b, targets, chunk=2), (x, w))
    assert torch.autograd.gradcheck(lambda a, b: linear_kl(a, b, *teacher, temperature=1.5, chunk=2), (x, w))


@pytest.mark.parametrize("target", [-1, 9, 1 << 40])
def test_a_target_that_is_no_word_is_refused_or_shows(target):
    x, w, targets = head(6, 4, 9)
    targets[2] = target
    with forced("torch"), pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        linear_cross_entropy(x, w, targets)
    with forced("interpret"):
        assert linear_cross_entropy(x, w, targets).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_pass_opcheck(backend):
    x, w, targets = head(6, 4, 9)
    teacher = torch.randn(6, 3), torch.randn(9, 3)
    with forced(backend):
        for need in ((True, True), (False, True)):
            torch.library.opcheck(
                torch.ops.coterie.linear_cross_entropy.default,
                (x.detach().requires_grad_(need[0]), w, targets, -100, 4, *need),
            )
        torch.library.opcheck(torch.ops.coterie.linear_kl.default, (x, w, *teacher, None, 2.0, 4, True, True))


def test_wrong_arguments_are_refused():
    x, w, targets = head(6, 4, 9)
    for args in ((x, w[:, :3], targets), (x, w, targets[:5]), (x, w.bfloat16(), targets)):
        with pytest.raises(ValueError, match="linear_cross_entropy"):
            linear_cross_entropy(*args)
    with pytest.raises(ValueError, match="at least 1"):
        linear_cross_entropy(x, w, targets, chunk=0)
    with pytest.raises(ValueError, match="teacher of 6 tokens and 8 words"):
        linear_kl(x, w, x, w[:8])
    with pytest.raises(ValueError, match="must be positive"):
        linear_kl(x, w, x, w, temperature=0)
