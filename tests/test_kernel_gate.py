"""The gate's operator: every backend against the reference and a loop, values and gradients."""

import re

import pytest
import torch
from helpers import assert_close_rms
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.kernels.backend import forced
from coterie.kernels.gate import Gated, _gate, _gate_backward, gate

BACKENDS = ["torch", "interpret", pytest.param("triton", marks=pytest.mark.gpu)]
CASES = {
    "softmax": (70, 12, 3, {}),
    "sigmoid": (33, 7, 2, {"score": "sigmoid"}),
    "bias": (37, 9, 2, {"score": "sigmoid", "bias": True}),
    "groups": (41, 24, 5, {"groups": 6, "topk_groups": 3}),
    "odd groups": (29, 15, 4, {"groups": 3, "topk_groups": 2, "bias": True}),
    "lone members": (19, 6, 2, {"groups": 6, "topk_groups": 4}),
    "padding": (70, 12, 3, {"valid": True}),
    "all chosen": (5, 4, 4, {}),
    "top 1": (66, 5, 1, {"bias": True}),
    "replay": (31, 10, 4, {"replay": True}),
    "replay and padding": (31, 10, 4, {"replay": True, "valid": True, "score": "sigmoid"}),
    "one token": (1, 3, 2, {}),
    "one expert": (9, 1, 1, {}),
    "no token": (0, 6, 2, {}),
    "many experts": (17, 300, 9, {"valid": True}),
}


def operands(tokens: int, experts: int, top_k: int, case: dict, device: str = "cpu") -> tuple[Tensor, dict]:
    options = {k: v for k, v in case.items() if k not in ("bias", "valid", "replay")}
    logits = torch.randn(tokens, experts)
    if case.get("bias"):
        options["bias_E"] = torch.randn(experts).to(device)
    if case.get("valid"):
        options["valid_T"] = (torch.rand(tokens) > 0.3).to(device)
    if case.get("replay"):
        ids = torch.rand(tokens, experts).argsort(1)[:, :top_k]
        options["ids_TK"] = ids.masked_fill(torch.rand(tokens, top_k) < 0.2, -1).to(device)
    return logits.to(device), options


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" else "cpu"


def differentiated(backend: str, logits: Tensor, top_k: int, options: dict) -> tuple[Gated, Tensor]:
    leaf = logits.clone().requires_grad_()
    with forced(backend):
        gated = gate(leaf, top_k, **options)
        generator = torch.Generator().manual_seed(5)
        loss = gated.scores_TE.new_zeros(())
        for output in (gated.scores_TE, gated.weights_TK):
            loss = loss + (output * torch.randn(output.shape, generator=generator).to(output.device)).sum()
        loss.backward()
    assert leaf.grad is not None
    return gated, leaf.grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case: str, backend: str, poisoned: None) -> None:
    tokens, experts, top_k, kind = CASES[case]
    logits, options = operands(tokens, experts, top_k, kind, device_of(backend))
    expected, expected_grad = differentiated("reference", logits, top_k, options)
    actual, grad = differentiated(backend, logits, top_k, options)
    assert_close_rms(actual.scores_TE, expected.scores_TE, 1e-6, "scores")
    assert_close_rms(actual.weights_TK, expected.weights_TK, 1e-6, "weights")
    assert torch.equal(actual.ids_TK, expected.ids_TK)
    assert torch.equal(actual.counts_E, expected.counts_E)
    assert actual.ids_TK.dtype == actual.counts_E.dtype == torch.int64
    assert_close_rms(grad, expected_grad, 1e-5, "gradient")


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("groups", [1, 3])
def test_equals_a_loop(backend: str, groups: int) -> None:
    """Against sorted Python lists; few distinct values, so that nearly every choice is a tie."""
    tokens, experts, top_k, topk_groups = 40, 12, 4, min(2, groups)
    logits = torch.randint(-1, 2, (tokens, experts)).float()
    bias = torch.randint(-1, 2, (experts,)).float()
    device = device_of(backend)
    with forced(backend):
        options = {"score": "sigmoid", "groups": groups, "topk_groups": topk_groups}
        actual = gate(logits.to(device), top_k, bias_E=bias.to(device), **options)
    select = (actual.scores_TE.cpu() + bias).tolist()
    counts = [0] * experts
    for t, row in enumerate(select):
        members = experts // groups
        best = [sum(sorted(row[g * members : (g + 1) * members])[-2:]) for g in range(groups)]
        kept = sorted(range(groups), key=lambda g: (-best[g], g))[:topk_groups]
        chosen = sorted((e for e in range(experts) if e // members in kept), key=lambda e: (-row[e], e))[:top_k]
        assert actual.ids_TK[t].tolist() == chosen
        for k, e in enumerate(chosen):
            counts[e] += 1
            assert actual.weights_TK[t, k] == actual.scores_TE[t, e]
    assert actual.counts_E.tolist() == counts


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_cpu_choice_has_the_order_of_a_stable_sort(data: st.DataObject) -> None:
    tokens, experts = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 40))
    top_k = data.draw(st.integers(1, experts))
    finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
    values = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 0.5, 1e-45, -1e-45]), finite)
    rows = st.lists(values, min_size=experts, max_size=experts)
    bias = torch.tensor([data.draw(rows) for _ in range(tokens)], dtype=torch.float32)
    with forced("torch"):
        scores = gate(torch.zeros(1, experts), 1, score="sigmoid").scores_TE
        ids = torch.cat([gate(torch.zeros(1, experts), top_k, score="sigmoid", bias_E=b).ids_TK for b in bias])
    expected = (scores + bias).sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    assert torch.equal(ids, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_of_padding_passes_no_gradient_through_its_weights(backend: str) -> None:
    logits = torch.randn(6, 5, device=device_of(backend), requires_grad=True)
    valid = torch.tensor([True, False, True, True, False, True], device=logits.device)
    with forced(backend):
        gated = gate(logits, 2, valid_T=valid)
        gated.weights_TK.sum().backward()
    assert logits.grad is not None
    assert not logits.grad[~valid].any()
    assert logits.grad[valid].any(dim=1).all()
    assert (gated.ids_TK[~valid] == -1).all()
    assert not gated.weights_TK[~valid].any()
    assert gated.counts_E.sum() == 2 * valid.sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("output", ["scores_TE", "weights_TK"])
def test_one_output_alone_has_its_gradient(backend: str, output: str) -> None:
    logits = torch.randn(9, 6, device=device_of(backend))
    grads = []
    for name in ("reference", backend):
        leaf = logits.clone().requires_grad_()
        with forced(name):
            getattr(gate(leaf, 2), output).square().sum().backward()
        grads.append(leaf.grad)
    assert_close_rms(grads[1], grads[0], 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_and_low_precision_logits(backend: str) -> None:
    logits = torch.randn(20, 8).mul(300).bfloat16().to(device_of(backend))
    expected, expected_grad = differentiated("reference", logits, 2, {})
    actual, grad = differentiated(backend, logits, 2, {})
    assert actual.scores_TE.dtype == torch.float32
    assert torch.equal(actual.ids_TK, expected.ids_TK)
    assert_close_rms(actual.scores_TE, expected.scores_TE, 1e-6)
    assert grad.dtype == torch.bfloat16
    assert_close_rms(grad, expected_grad, 1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_operands_that_are_not_contiguous(backend: str) -> None:
    logits = torch.randn(8, 30, device=device_of(backend)).t()
    expected, expected_grad = differentiated("reference", logits, 3, {})
    actual, grad = differentiated(backend, logits, 3, {})
    assert torch.equal(actual.ids_TK, expected.ids_TK)
    assert_close_rms(actual.scores_TE, expected.scores_TE, 1e-6)
    assert_close_rms(grad, expected_grad, 1e-5)


@pytest.mark.parametrize("backend", ["torch", "interpret"])
@pytest.mark.parametrize("case", ["softmax", "groups", "replay and padding", "no token"])
def test_the_operator_is_well_formed(case: str, backend: str) -> None:
    tokens, experts, top_k, kind = CASES[case]
    logits, options = operands(tokens, experts, top_k, kind)
    rest = (options.get("groups", 1), options.get("topk_groups", 1), options.get("valid_T"), options.get("ids_TK"))
    arguments = (logits.requires_grad_(), top_k, options.get("score", "softmax"), None, *rest)
    with forced(backend):
        torch.library.opcheck(_gate, arguments)
        scores, weights, ids, _ = (output.detach() for output in _gate(*arguments))
        torch.library.opcheck(_gate_backward, (scores, ids, scores, weights, "softmax"))
        torch.library.opcheck(_gate_backward, (scores, ids, None, weights, "sigmoid"))


def test_replayed_choices_come_back_as_a_copy() -> None:
    ids = torch.tensor([[0, 2], [1, -1]])
    gated = gate(torch.randn(2, 3), 2, ids_TK=ids)
    assert torch.equal(gated.ids_TK, ids)
    assert gated.ids_TK.data_ptr() != ids.data_ptr()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.zeros(3, 4), 5), {}, "top_k 5"),
        ((torch.zeros(3, 4), 0), {}, "top_k 0"),
        ((torch.zeros(3, 4), 3), {"groups": 2, "topk_groups": 1}, "2 open experts"),
        ((torch.zeros(3, 4), 1), {"groups": 3}, "3 equal groups"),
        ((torch.zeros(3, 4), 1), {"groups": 2, "topk_groups": 3}, "best 3"),
        ((torch.zeros(3, 4), 1), {"score": "relu"}, "'relu'"),
        ((torch.zeros(2, 3, 4), 1), {}, "(2, 3, 4)"),
        ((torch.zeros(3, 4), 2), {"ids_TK": torch.zeros(3, 1, dtype=torch.int64)}, "(3, 1)"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        gate(*arguments, **options)
