"""A parallelized model is the same model: loss, every gradient, the norm and an SGD step, on any layout."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import assert_close_rms
from ranks import run_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor

from coterie.models.config import ModelConfig
from coterie.models.gpt import GPT
from coterie.models.parallelize import parallelize
from coterie.models.weights import full_state_dict, load_model, load_weights, save_model
from coterie.moe.config import GateConfig, MoEConfig
from coterie.parallel.mesh import build_mesh

# A pyramid whose layers have different expert-parallel degrees at ep=4: 1 (dense), 2, 4 and 4 of 8.
CONFIG = ModelConfig(
    vocab_size=37,
    max_positions=16,
    layers=4,
    dim=24,
    heads=6,
    kv_heads=2,
    hidden=20,
    qk_norm="head",
    experts=(0, 2, 4, 8),
    moe=MoEConfig(top_k=2, hidden=12, residual=True, gate=GateConfig(aux_weight=0.01, z_weight=0.001)),
)
GPT2 = replace(
    CONFIG,
    activation="gelu",
    norm="layernorm",
    positions="learned",
    attention_bias="all",
    mlp_bias=True,
    qk_norm="none",
    tied_head=False,
    # An odd width, which no second cut divides.
    moe=MoEConfig(top_k=1, hidden=11, activation="gelu", bias=True, shared_hidden=10, shared_gate=True),
)
BATCH, SEQUENCE = 8, 10


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    text_BS = torch.randint(0, CONFIG.vocab_size, (BATCH, SEQUENCE + 1), generator=generator)
    # Uneven padding: rank 0 of 4 has full sequences, others less; one sequence is padding alone.
    lengths_B = torch.tensor([10, 10, 7, 1, 0, 9, 10, 3])
    valid_BS = torch.arange(SEQUENCE) < lengths_B[:, None]
    targets_BS = text_BS[:, 1:].masked_fill(~valid_BS, -100)
    return text_BS[:, :-1], targets_BS, valid_BS


def _loss(model: GPT, rows: slice) -> Tensor:
    """This rank's part of the globally normalised loss."""
    tokens_BS, targets_BS, valid_BS = _batch()
    out = model(tokens_BS[rows], targets_BS=targets_BS[rows], valid_BS=valid_BS[rows])
    gate = model.config.moe.gate
    router = gate.aux_weight * out.aux + gate.z_weight * out.z
    return out.lm / (targets_BS != -100).sum() + router / valid_BS.sum()


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _one_rank(config: ModelConfig) -> tuple[GPT, Tensor]:
    model = GPT(config)
    model.init_weights(3)
    loss = _loss(model, slice(None))
    loss.backward()
    return model, loss.detach()


def _check_layout(rank: int, world: int, ep: int, config: ModelConfig, recompute: bool, reshard: bool) -> None:
    expected, expected_loss = _one_rank(config)
    model = parallelize(GPT(config, device="meta"), build_mesh("cpu", ep=ep), reshard=reshard)
    model.init_weights(3)
    model.recompute = "full" if recompute else "none"
    share = BATCH // world
    loss = _loss(model, slice(rank * share, (rank + 1) * share))
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    assert_close_rms(total, expected_loss, 1e-5, "loss")

    own = dict(model.named_parameters())
    square = 0.0
    for name, parameter in expected.named_parameters():
        assert own[name].grad is not None, f"{name} has no gradient"
        grad = _whole(own[name].grad)
        assert_close_rms(grad, parameter.grad, 1e-5, f"gradient of {name}")
        square += grad.double().square().sum().item()
    norm = torch.nn.utils.get_total_norm([p.grad for p in expected.parameters()])
    assert math.sqrt(square) == pytest.approx(norm.item(), rel=1e-5)
    _check_norm_of_the_loop(model, world, norm.item())

    for each in (expected, model):
        torch.optim.SGD(each.parameters(), lr=0.5, foreach=False).step()
    after = _loss(model, slice(rank * share, (rank + 1) * share)).detach().clone()
    dist.all_reduce(after)
    assert_close_rms(after, _loss(expected, slice(None)), 1e-5, "loss after a step")
    assert after < total


def _check_norm_of_the_loop(model: GPT, world: int, expected: float) -> None:
    from coterie.train.optim import local_square_sum

    square = local_square_sum(model.parameters(), world)
    dist.all_reduce(square)
    assert square.sqrt().item() == pytest.approx(expected, rel=1e-5)


def _check_values(rank: int, world: int, folder: str) -> None:
    """The same initial values, and a state dict, a saved directory and a loaded one that hold them, on any mesh."""
    for config, degrees in ((CONFIG, (1, 4)), (GPT2, (2,))):
        expected = GPT(config)
        expected.init_weights(3)
        target = Path(folder) / config.norm
        for ep in degrees:
            mesh = build_mesh("cpu", ep=ep)
            model = parallelize(GPT(config, device="meta"), mesh)
            model.init_weights(3)
            real = GPT(config)
            real.init_weights(3)
            for each in (model, parallelize(real, mesh)):
                state = full_state_dict(each)
                if rank:
                    assert not state
                    continue
                assert state.keys() == expected.state_dict().keys()
                for name, tensor in expected.state_dict().items():
                    assert torch.equal(state[name], tensor), name
            if ep == 4:
                assert isinstance(model.blocks[3].moe.experts.w_in, DTensor)
                assert model.blocks[3].moe.experts.w_in.to_local().shape[0] == 8 // world
            save_model(target, model, file_bytes=10_000 if ep == 4 else 10**9)  # several files, then one
            dist.barrier()
            again = parallelize(GPT(config, device="meta"), mesh)
            load_weights(target, again)
            for name, parameter in again.named_parameters():
                assert torch.equal(_whole(parameter), dict(expected.named_parameters())[name]), name
            alone = load_model(target)
            assert torch.equal(alone.blocks[3].moe.experts.w_out, expected.blocks[3].moe.experts.w_out)
            dist.barrier()


def _check_bf16(rank: int, world: int, ep: int) -> tuple[float, float]:
    """Master weights and gradients in fp32, matrices in bf16, the router in fp32, and a loss near fp32's."""
    expected, expected_loss = _one_rank(CONFIG)
    mesh = build_mesh("cpu", ep=ep)
    model = parallelize(GPT(CONFIG, device="meta"), mesh, dtype=torch.bfloat16)
    model.init_weights(3)
    model.recompute = "full"
    seen: dict[str, set[torch.dtype]] = {"gate": set(), "experts": set(), "attention": set()}
    for block in model.blocks:
        block.attention.q.register_forward_pre_hook(
            lambda m, x: seen["attention"].update({m.weight.dtype, x[0].dtype})
        )
        if block.moe is not None:
            block.moe.gate.register_forward_pre_hook(lambda m, x: seen["gate"].add(m.weight.dtype))
            block.moe.experts.register_forward_pre_hook(
                lambda m, x: seen["experts"].update({m.w_in.dtype, x[0].dtype})
            )
    share = BATCH // world
    loss = _loss(model, slice(rank * share, (rank + 1) * share))
    loss.backward()
    assert seen == {"gate": {torch.float32}, "experts": {torch.bfloat16}, "attention": {torch.bfloat16}}
    total = loss.detach().clone()
    dist.all_reduce(total)
    assert_close_rms(total, expected_loss, 1e-2, "loss")
    for name, parameter in model.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32, name
        if "attention.q" in name or "embed" in name:
            assert_close_rms(_whole(parameter.grad), dict(expected.named_parameters())[name].grad, 0.1, name)
    return total.item(), expected_loss.item()


def _check_even_splits(rank: int, world: int) -> None:
    """A capacity is each rank's own, so the expectation is what the same model gives without even splits."""
    gate = replace(CONFIG.moe.gate, capacity_factor=1.0, min_capacity=2, eval_capacity_factor=1.0)
    config = replace(CONFIG, moe=replace(CONFIG.moe, gate=gate))
    mesh, share, results = build_mesh("cpu", ep=2), BATCH // world, []
    for even in (False, True):
        model = parallelize(GPT(config, device="meta"), mesh, even_splits=even)
        model.init_weights(3)
        loss = _loss(model, slice(rank * share, (rank + 1) * share))
        loss.backward()
        results.append((loss.detach(), [_whole(p.grad) for p in model.parameters()]))
    assert_close_rms(results[1][0], results[0][0], 1e-6)
    for even, uneven in zip(results[1][1], results[0][1], strict=True):
        assert_close_rms(even, uneven, 1e-5)


def _check_accumulation(rank: int, world: int) -> None:
    """Micro-batches without a reduction, then one with it, as the loop does; one rank's are padding alone."""
    model = parallelize(GPT(CONFIG, device="meta"), build_mesh("cpu", ep=2))
    model.init_weights(3)
    rows = [slice(0, 4), slice(5, 8)] if rank == 0 else [slice(4, 5), slice(4, 5)]
    gate, history = CONFIG.moe.gate, None
    tokens_BS, targets_BS, valid_BS = _batch()
    for last, part in enumerate(rows):
        model.set_requires_gradient_sync(bool(last))
        out = model(tokens_BS[part], targets_BS=targets_BS[part], valid_BS=valid_BS[part], history=history)
        (out.lm / (targets_BS != -100).sum() + gate.z_weight * out.z / valid_BS.sum()).backward()
        history = tuple(s.asked_E for s in out.stats)
    reference = GPT(CONFIG)
    reference.init_weights(3)
    out = reference(tokens_BS, targets_BS=targets_BS, valid_BS=valid_BS)
    (out.lm / (targets_BS != -100).sum() + gate.z_weight * out.z / valid_BS.sum()).backward()
    for name, parameter in model.named_parameters():
        assert_close_rms(_whole(parameter.grad), dict(reference.named_parameters())[name].grad, 1e-5, name)


def _check_compiled(rank: int, world: int) -> None:
    config = replace(CONFIG, layers=2, experts=(0, 4))
    _, expected_loss = _one_rank(config)
    model = parallelize(GPT(config, device="meta"), build_mesh("cpu"), compile=True)
    model.init_weights(3)
    model.recompute = "full"
    for _ in range(2):
        loss = _loss(model, slice(None))
        loss.backward()
        assert_close_rms(loss.detach(), expected_loss, 1e-5)


@pytest.mark.slow
def test_compiled_blocks_give_the_same() -> None:
    run_ranks(_check_compiled, 1)


def test_no_compiler_is_one_sentence(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from coterie.models import parallelize as module

    def none() -> str:
        raise RuntimeError("no C++ compiler\nmore lines")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none)
    with caplog.at_level("WARNING", logger="coterie"):
        assert module._can_compile("cpu") is False
    assert "no working compiler here (no C++ compiler)" in caplog.text
    assert "more lines" not in caplog.text


def test_a_compiler_that_cannot_link_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from coterie.models import parallelize as module

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: "c++")
    monkeypatch.setattr(torch, "__file__", "/my models/torch/__init__.py")
    with caplog.at_level("WARNING", logger="coterie"):
        assert module._can_compile("cpu") is False
    assert "/my models/torch has a space in its name" in caplog.text


def _check_refusal(rank: int, world: int) -> None:
    config = replace(CONFIG, experts=(0, 0, 0, 3))
    with pytest.raises(ValueError, match="3 experts do not spread over ep=2 of 2 places"):
        parallelize(GPT(config, device="meta"), build_mesh("cpu", ep=2))


def _run_checks(rank: int, world: int, checks: list[tuple]) -> None:
    """Several checks in one launch: starting ranks costs more than most of them."""
    for check, *args in checks:
        check(rank, world, *args)


@pytest.mark.dist
def test_one_rank() -> None:
    run_ranks(_run_checks, 1, [(_check_bf16, 1), (_check_layout, 1, CONFIG, True, True)])


@pytest.mark.dist
def test_two_ranks() -> None:
    checks = [
        (_check_layout, 1, CONFIG, False, True),
        (_check_layout, 2, CONFIG, True, True),
        (_check_layout, 2, GPT2, False, False),
        (_check_accumulation,),
        (_check_even_splits,),
        (_check_bf16, 1),
        (_check_bf16, 2),
        (_check_refusal,),
    ]
    run_ranks(_run_checks, 2, checks)


@pytest.mark.dist
def test_four_ranks(tmp_path: Path) -> None:
    checks = [
        (_check_layout, 1, CONFIG, False, False),
        (_check_layout, 2, CONFIG, False, True),
        (_check_layout, 4, CONFIG, True, True),
        (_check_layout, 4, GPT2, True, False),
        (_check_values, str(tmp_path)),
    ]
    run_ranks(_run_checks, 4, checks)
