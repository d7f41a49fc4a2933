"""The schedule by tokens, decay on matrices alone, and the global norm that counts each parameter once."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from runs import build, make_batch, small_config, small_model
from torch.distributed.tensor import DTensor

from coterie.models.parallelize import parallelize
from coterie.parallel.mesh import build_mesh
from coterie.train.config import OptimConfig
from coterie.train.objective import LanguageModelling
from coterie.train.optim import build_optimizer, learning_rate, local_square_sum, scale_gradients

BASE = OptimConfig(lr=2.0, min_lr=0.5, warmup_tokens=100)


@pytest.mark.parametrize(
    ("config", "tokens", "expected"),
    [
        (BASE, 25, 0.5),
        (BASE, 100, 2.0),
        (BASE, 550, 1.25),  # the middle of the cosine
        (BASE, 325, 0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi / 4))),
        (BASE, 1000, 0.5),
        (BASE, 5000, 0.5),
        (replace(BASE, decay_tokens=300), 200, 1.25),
        (replace(BASE, schedule="constant"), 900, 2.0),
        (replace(BASE, schedule="wsd", cooldown_tokens=400), 600, 2.0),
        (replace(BASE, schedule="wsd", cooldown_tokens=400), 800, 1.25),
        (replace(BASE, schedule="wsd"), 950, 1.25),  # a tenth of the run
        (replace(BASE, schedule="wsd"), 50, 1.0),
    ],
)
def test_learning_rate(config: OptimConfig, tokens: int, expected: float) -> None:
    assert learning_rate(config, tokens, 1000) == pytest.approx(expected, rel=1e-12)


def test_decay_is_for_matrices_alone() -> None:
    config = replace(small_model(), norm="layernorm", positions="learned", attention_bias="all", activation="gelu")
    model = build(replace(config, moe=replace(config.moe, activation="gelu", bias=True)))
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.3))
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] == 0.3 for p in g["params"]}
    free = {id(p) for g in optimizer.param_groups if g["weight_decay"] == 0.0 for p in g["params"]}
    assert not decayed & free
    names = dict(model.named_parameters())
    assert len(decayed | free) == len(names)
    for name, parameter in names.items():
        kind = name.rpartition(".")[2]
        matrix = kind in ("weight", "w_in", "w_out") and "norm" not in name
        assert (id(parameter) in decayed) == matrix, name
    assert any(kind.endswith("b_in") for kind in names), "the case of stacked biases must be there"


def test_a_step_is_adamw() -> None:
    """Against AdamW's formula (Loshchilov and Hutter, algorithm 2) in fp64."""
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    config = OptimConfig(lr=0.1, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.2)
    optimizer = build_optimizer(model, config)
    weight, bias = model.weight.detach().double(), model.bias.detach().double()
    m = {"w": torch.zeros(3, 5).double(), "b": torch.zeros(3).double()}
    v = {k: t.clone() for k, t in m.items()}
    for t in range(1, 4):
        model.weight.grad, model.bias.grad = torch.randn(3, 5), torch.randn(3)
        for key, value, grad, decay in (("w", weight, model.weight.grad, 0.2), ("b", bias, model.bias.grad, 0.0)):
            m[key] = 0.8 * m[key] + 0.2 * grad.double()
            v[key] = 0.9 * v[key] + 0.1 * grad.double() ** 2
            value.mul_(1 - 0.1 * decay)
            value.sub_(0.1 * (m[key] / (1 - 0.8**t)) / ((v[key] / (1 - 0.9**t)).sqrt() + 1e-6))
        optimizer.step()
    torch.testing.assert_close(model.weight.detach().double(), weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.bias.detach().double(), bias, rtol=1e-5, atol=1e-6)


def _norms(rank: int, world: int, ep: int, folder: str) -> tuple[float, dict[str, torch.Tensor]]:
    """The global norm of one global batch, and the gradients after clipping to half of it."""
    config = small_config(folder)  # type: ignore[arg-type]
    model = build(config.model)
    if world > 1:
        model = parallelize(build(config.model), build_mesh("cpu", ep=ep))
    share = config.batch_size // world
    batches = [make_batch(i, share, config) for i in range(0, config.batch_size, share)]
    counts = [LanguageModelling().counts(b) for b in batches]
    losses = LanguageModelling()(model, batches[rank], None)
    total = {name: float(sum(c[name] for c in counts)) for name in counts[0]}
    sum(t.value * t.weight / total[t.per] for t in losses.terms.values()).backward()  # type: ignore[union-attr]
    square = local_square_sum(model.parameters(), world)
    if world > 1:
        dist.all_reduce(square)
    norm = math.sqrt(square)
    scale_gradients(model.parameters(), 0.5)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return norm, {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}


def _all_norms(rank: int, world: int, folder: str) -> list[tuple[float, dict[str, torch.Tensor]]]:
    return [_norms(rank, world, ep, folder) for ep in (1, 2, 4)]


@pytest.mark.dist
def test_global_norm_counts_each_parameter_once(tmp_path) -> None:
    """Four ranks: dense shards over 4, experts over ep x edp, layers of 2 and 4 experts with their own degrees."""
    expected, grads = _norms(0, 1, 1, str(tmp_path))
    plain = math.sqrt(sum(float((2 * g).double().square().sum()) for g in grads.values()))
    assert expected == pytest.approx(plain, rel=1e-6)
    for result in run_ranks(_all_norms, 4, str(tmp_path)):
        for ep, (norm, clipped) in zip((1, 2, 4), result, strict=True):
            assert norm == pytest.approx(expected, rel=1e-5), f"ep {ep}"
            assert clipped.keys() == grads.keys()
            for name, grad in grads.items():
                error = float((clipped[name] - grad).norm() / grad.norm().clamp(min=1e-12))
                assert error < 2e-5, f"ep {ep}, {name}: {error}"
