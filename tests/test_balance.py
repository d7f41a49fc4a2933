"""Balance losses and the loss-free bias: their definitions, and what they must not depend on."""

import pytest
import torch
from helpers import assert_close_rms
from oracle import route
from torch import Tensor

from coterie.moe.balance import balance_loss, fractions, sequence_counts, update_bias, z_loss
from coterie.moe.config import GateConfig
from coterie.moe.gate import Gate

B, S, D, E, K = 8, 5, 9, 7, 2


def _gate(**options) -> Gate:
    gate = Gate(D, E, K, GateConfig(**options))
    torch.nn.init.normal_(gate.weight, std=0.8)
    return gate


def _run(gate: Gate, parts: list[Tensor], *, ranks: bool = False, history: bool = False, valid: list | None = None):
    """Routes micro-batches (B_i, S, D); returns summed aux, its gradient and the single values.

    `ranks`: the parts are those of several ranks, whose counts a first pass adds up, as the collective does."""
    gate.weight.grad = None
    flat = [p.reshape(-1, D) for p in parts]
    masks = valid or [None] * len(parts)
    if ranks:
        with torch.no_grad():
            total_E = sum(gate(x, v, sequence_length=S).stats.asked_E for x, v in zip(flat, masks, strict=True))
        gate.reduce_counts = lambda counts_E: total_E
    past_E, values = None, []
    for x_TD, valid_T in zip(flat, masks, strict=True):
        out = gate(x_TD, valid_T, sequence_length=S, history_E=past_E if history else None)
        past_E = out.stats.asked_E if past_E is None else past_E + out.stats.asked_E
        out.aux.backward()
        values.append(out.aux.detach())
    gate.reduce_counts = lambda counts_E: counts_E
    assert gate.weight.grad is not None
    return sum(values), gate.weight.grad.clone(), values


@pytest.mark.parametrize("scope", ["micro", "sequence", "global"])
def test_balance_is_one_per_token(scope: str) -> None:
    gate = Gate(E, E, 1, GateConfig(aux_scope=scope))
    gate.weight.data.copy_(torch.eye(E))
    x_TD = torch.eye(E).repeat(3, 1)  # every token another expert, three sequences of E tokens
    assert_close_rms(gate(x_TD, sequence_length=E).aux, torch.tensor(3.0 * E))


def test_collapse_is_worst() -> None:
    probs_TE = torch.zeros(6, E)
    probs_TE[:, 2] = 1
    assert balance_loss(probs_TE, fractions(torch.tensor([0, 0, 6, 0, 0, 0, 0]))) == 6 * E


@pytest.mark.parametrize("split", [[4, 4], [2, 2, 2, 2], [1, 3, 4]])
def test_global_scope_does_not_depend_on_the_ranks(split: list[int]) -> None:
    gate, x = _gate(), torch.randn(B, S, D)
    whole, whole_grad, _ = _run(gate, [x])
    parts, parts_grad, _ = _run(gate, list(x.split(split)), ranks=True)
    assert_close_rms(parts, whole)
    assert_close_rms(parts_grad, whole_grad)
    local, _, _ = _run(gate, list(x.split(split)))
    assert abs(local - whole) > 1e-3 * whole, "local fractions should differ, else the test says nothing"


def test_the_last_micro_batch_sees_the_whole_batch_through_history() -> None:
    gate, x = _gate(), torch.randn(B, S, D)
    _, _, values = _run(gate, list(x.split([3, 3, 2])), history=True)
    counts = gate(x.reshape(-1, D)).stats.asked_E.tolist()
    expected = route(x[6:].reshape(-1, D).double(), gate.weight.double(), K, gate.config, counts=counts)
    assert_close_rms(values[-1], expected.aux)
    early = route(x[:3].reshape(-1, D).double(), gate.weight.double(), K, gate.config)
    assert_close_rms(values[0], early.aux)


def test_history_also_passes_the_ranks() -> None:
    gate, x_TD = _gate(), torch.randn(B * S, D)
    seen = []
    gate.reduce_counts = lambda counts_E: seen.append(counts_E) or counts_E
    past_E = torch.arange(E)
    out = gate(x_TD, history_E=past_E)
    assert torch.equal(seen[0], out.stats.asked_E + past_E)


@pytest.mark.parametrize("split", [[4, 4], [1, 3, 4], [1] * 8])
def test_sequence_scope_depends_on_nothing(split: list[int]) -> None:
    gate, x = _gate(aux_scope="sequence", score="sigmoid"), torch.randn(B, S, D)
    whole, whole_grad, _ = _run(gate, [x])
    parts, parts_grad, _ = _run(gate, list(x.split(split)))
    assert_close_rms(parts, whole)
    assert_close_rms(parts_grad, whole_grad)


@pytest.mark.parametrize("scope", ["micro", "sequence", "global"])
@pytest.mark.parametrize("capacity_factor", [None, 0.6])
def test_padding_changes_nothing(scope: str, capacity_factor: float | None) -> None:
    gate = _gate(aux_scope=scope, z_weight=0.1, capacity_factor=capacity_factor, min_capacity=1)
    x = torch.randn(B, S, D)
    padded = torch.full((B, S + 3, D), 7.0)
    padded[:, :S] = x
    valid_T = (torch.arange(S + 3) < S).repeat(B)
    plain = gate(x.reshape(-1, D), sequence_length=S)
    dressed = gate(padded.reshape(-1, D), valid_T, sequence_length=S + 3)
    assert torch.equal(plain.ids_TK, dressed.ids_TK[valid_T])
    assert (dressed.choices_TK[~valid_T] == -1).all()
    for left, right in zip(plain.stats, dressed.stats, strict=True):
        assert_close_rms(right, left)
    grads = []
    for out in (plain, dressed):
        gate.weight.grad = None
        (out.aux + out.z + out.weights_TK.square().sum()).backward()
        grads.append(gate.weight.grad.clone())
    assert_close_rms(dressed.aux, plain.aux)
    assert_close_rms(dressed.z, plain.z)
    assert_close_rms(grads[1], grads[0])


def test_global_scope_asks_other_ranks_only_while_training() -> None:
    gate, x_TD = _gate(), torch.randn(B * S, D)
    calls = []
    gate.reduce_counts = lambda counts_E: calls.append(1) or counts_E
    gate(x_TD)
    gate.eval()(x_TD)
    for quiet in (_gate(aux_weight=0.0), _gate(aux_scope="micro"), _gate(aux_scope="sequence")):
        quiet.reduce_counts = gate.reduce_counts
        quiet(x_TD, sequence_length=S)
    assert len(calls) == 1


def test_losses_without_weight_carry_no_gradient() -> None:
    gate = _gate(aux_weight=0.0, z_weight=0.0)
    out = gate(torch.randn(B * S, D))
    assert not out.aux.requires_grad
    assert not out.z.requires_grad
    assert out.aux > 0
    assert out.z > 0


def test_z_loss_of_known_logits() -> None:
    logits_TE = torch.tensor([[0.0, 0.0], [1.0, 1.0], [50.0, 0.0]])
    expected = torch.tensor(2.0).log() ** 2 + (1 + torch.tensor(2.0).log()) ** 2
    assert_close_rms(z_loss(logits_TE, torch.tensor([True, True, False])), expected)


def test_counts_of_sequences() -> None:
    choices_TK = torch.tensor([[0, 2], [2, 1], [-1, -1], [2, 0]])
    assert sequence_counts(choices_TK, 2, 4).tolist() == [[1, 1, 2, 0], [1, 0, 1, 0]]


def test_bias_moves_towards_the_idle() -> None:
    bias_E = torch.tensor([0.5, 0.0, 0.0, 0.0])
    update_bias(bias_E, torch.tensor([9, 1, 1, 1]), 0.1)
    # signs -1, 1, 1, 1; their mean of 0.5 is taken out
    assert_close_rms(bias_E, torch.tensor([0.5 - 0.15, 0.05, 0.05, 0.05]))
    update_bias(bias_E, torch.tensor([3, 3, 3, 3]), 0.1)
    assert_close_rms(bias_E.sum(), torch.tensor(0.5))
    assert_close_rms(bias_E[1:], torch.full((3,), 0.05))


def test_bias_balances_a_skewed_router() -> None:
    gate = Gate(D, E, K, GateConfig(bias_update=0.02, score="sigmoid"))
    torch.nn.init.normal_(gate.weight, std=0.3)
    assert gate.bias_E is not None
    x_TD = torch.randn(2000, D) + 1.0
    first_E = gate(x_TD).stats.asked_E
    for _ in range(60):
        update_bias(gate.bias_E, gate(x_TD).stats.asked_E, gate.config.bias_update)
    last_E = gate(x_TD).stats.asked_E
    assert last_E.max() * E < 1.25 * last_E.sum() < first_E.max() * E
    assert abs(gate.bias_E.sum()) < 1e-4
