"""Recorded decode steps give the logits, routes and keys of plain passes, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from engines import CONFIG, alone, ask, drain, engine, model, prompt
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from coterie.infer.decodes import MOST, Decodes
from coterie.infer.paged import KVPool, KVType, PagedCache
from coterie.infer.step import Slice
from coterie.kernels import expert_decode_triton, native, route_triton, tape
from coterie.kernels.backend import HAS_TRITON, forced
from coterie.models.gpt import GPT
from coterie.moe.config import MoEConfig

needs_native = pytest.mark.skipif(native.library() is None, reason="recording needs the native kernels")
SIZE, BLOCKS = 4, 12


RESIDUAL = replace(CONFIG, moe=MoEConfig(top_k=2, hidden=20, residual=True), tied_head=True)


def _residual(dtype: torch.dtype) -> GPT:
    made = GPT(RESIDUAL)
    made.init_weights(8)
    made.to(dtype)
    for layer in made.moe_layers:
        layer.gate.float()
    return made.eval()


def _filled(model: GPT, kv: KVType = "auto") -> KVPool:
    pool = KVPool(model.config, 8 * BLOCKS, SIZE, dtype=kv, model_dtype=model.embed.weight.dtype)
    torch.manual_seed(3)
    pool._store.copy_(torch.randn(pool._store.shape).mul(50 if kv == "int8" else 1))
    if pool._scales is not None:
        pool._scales.copy_(torch.rand(pool._scales.shape) / 50)
    return pool


def _slices(lengths: Sequence[int], seed: int = 0) -> list[Slice]:
    order = torch.randperm(8 * BLOCKS, generator=torch.Generator().manual_seed(seed)).tolist()
    each = [tuple(order[i * BLOCKS : (i + 1) * BLOCKS][: start // SIZE + 1]) for i, start in enumerate(lengths)]
    return [Slice((str(i), 0), n, (7 * i + n,), each[i], True) for i, n in enumerate(lengths)]


def _plain(model: GPT, pool: KVPool, slices: list[Slice]) -> tuple[Tensor, tuple[Tensor, ...]]:
    cache = PagedCache(pool)
    with torch.inference_mode():
        out = model(*cache.begin(slices), cache=cache)
    assert out.logits_BSV is not None
    return out.logits_BSV, out.routes


@needs_native
@pytest.mark.parametrize("kv", ["auto", "int8"])
@pytest.mark.parametrize("make", [model, _residual])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_recorded_step_is_a_plain_one(dtype: torch.dtype, make: Callable[[torch.dtype], GPT], kv: KVType) -> None:
    served = make(dtype)
    ours, theirs = _filled(served, kv), _filled(served, kv)
    decodes = Decodes(served, ours)
    for seed, lengths in enumerate([[5], [0, 47], [9], [30, 2, 11], [17, 40], [44, 1, 20], [3]]):
        slices = _slices(lengths, seed)
        with torch.inference_mode():
            out = decodes.run(slices)
        assert out is not None
        assert out.logits_BSV is not None
        logits, routes = _plain(served, theirs, slices)
        assert torch.equal(out.logits_BSV, logits)
        assert all(map(torch.equal, out.routes, routes))
        assert torch.equal(ours._store.view(torch.uint8), theirs._store.view(torch.uint8))


@needs_native
def test_steps_that_are_no_decodes_are_left_alone() -> None:
    decodes = Decodes(model(), _filled(model()))
    prefill = replace(_slices([5])[0], tokens=(1, 2))
    assert decodes.run([prefill]) is None
    assert decodes.run([]) is None
    assert decodes.run(_slices([5]) * (MOST + 1)) is None
    with pytest.raises(ValueError, match="do not lie in"):
        decodes.run([replace(_slices([5])[0], blocks=())])


@needs_native
def test_what_cannot_be_recorded_is_computed_plainly() -> None:
    odd = GPT(CONFIG).eval()
    odd.blocks[1].register_forward_hook(lambda module, inputs, out: (out[0] * 2, out[1]))
    decodes = Decodes(odd, _filled(odd))
    assert decodes.run(_slices([5])) is None
    assert decodes.why_not is not None
    assert "torch computes" in decodes.why_not


@needs_native
def test_other_weights_are_read_once_told() -> None:
    served = GPT(CONFIG).eval()
    served.init_weights(1)
    decodes = Decodes(served, _filled(served))
    for _ in range(2):
        out = decodes.run(_slices([5]))
        assert out is not None
        assert torch.equal(out.logits_BSV, _plain(served, _filled(served), _slices([5]))[0])  # type: ignore[arg-type]
        served.head.weight = torch.nn.Parameter(served.head.weight.detach() + 1)  # type: ignore[union-attr]
        decodes.forget()


@needs_native
def test_an_engine_repeats_its_decodes() -> None:
    served = engine()
    clients = [ask(served, prompt(n, n), 12) for n in (3, 20, 31)]
    drain(served)
    assert served.core.runner.decodes.why_not is None
    assert {1, 2, 3} & set(served.core.runner.decodes._recordings)
    plain = engine()
    plain.core.runner.decodes.why_not = "switched off"
    others = [ask(plain, prompt(n, n), 12) for n in (3, 20, 31)]
    drain(plain)
    assert [c.tokens() for c in clients] == [c.tokens() for c in others]
    assert clients[0].tokens() == alone(prompt(3, 3), 12)


class _Graph:
    """Stands for a CUDA graph: it repeats what it saw on the tensors it saw."""

    def __init__(self, step, arena) -> None:
        self.step, self.output = step, step()

    def replay(self):
        self.output = self.step()
        return self.output


def test_on_a_gpu_numbers_of_sequences_share_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that are left over change nothing: neither answers, nor keys, nor the experts that are visited."""
    served = model()
    ours, theirs = _filled(served), _filled(served)
    decodes = Decodes(served, ours)
    monkeypatch.setattr("coterie.infer.decodes.record", lambda step, device, arena: _Graph(step, arena))
    monkeypatch.setattr(decodes, "_shares", True)
    for seed, lengths in enumerate([[5], [0, 47, 3], [9, 8, 7, 6, 5], [30, 2, 11], [17, 40]]):
        with torch.inference_mode():
            out = decodes.run(_slices(lengths, seed))
        assert out is not None
        assert out.logits_BSV is not None
        logits, routes = _plain(served, theirs, _slices(lengths, seed))
        torch.testing.assert_close(out.logits_BSV, logits, rtol=1e-5, atol=1e-5)
        assert all(map(torch.equal, out.routes, routes))
        torch.testing.assert_close(ours._store, theirs._store, rtol=1e-5, atol=1e-5)
    assert sorted(decodes._recordings) == [1, 2, 4, 8]


class _NoWaits(TorchDispatchMode):
    """Refuses what reads a device's numbers on the host, or brings the host's own to it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        waits = (
            "item",
            "is_nonzero",
            "_local_scalar",
            "nonzero",
            "bincount",
            "unique",
            "lift_fresh",
            "masked_select",
        )
        if any(name.startswith(one) for one in waits) or (name in ("index", "index_put_") and _masked(args[1])):
            raise AssertionError(f"a recorded step would wait for the device: {name}")
        return func(*args, **(kwargs or {}))


def _masked(indices) -> bool:
    return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in indices)


@pytest.mark.skipif(torch.cuda.is_available() or not HAS_TRITON, reason="through Triton's interpreter")
@pytest.mark.parametrize(("sequences", "kv"), [(2, "int8"), (3, "auto")])
def test_on_a_gpu_a_step_waits_for_nothing(monkeypatch: pytest.MonkeyPatch, sequences: int, kv: KVType) -> None:
    """Few tokens, and more than the kernel of a few takes."""
    for kernels in (expert_decode_triton, route_triton):
        monkeypatch.setattr(kernels, "MOST_TOKENS", 2)
    heads = replace(CONFIG, qk_norm="head", moe=MoEConfig(top_k=2, hidden=20))
    served = GPT(heads).eval()
    served.init_weights(8)
    pool = KVPool(heads, 8 * BLOCKS, SIZE, dtype=kv)
    pool._store.fill_(1)
    if pool._scales is not None:
        pool._scales.fill_(0.1)

    def record(step, device, arena):
        step()
        monkeypatch.setattr(torch.Tensor, "tolist", None)  # no operation of its own
        with _NoWaits(), torch.inference_mode():
            return _Graph(step, arena)

    monkeypatch.setattr("coterie.infer.decodes.record", record)
    slices = [Slice((str(i), 0), 9, (i,), (i, sequences + i, 2 * sequences + i), True) for i in range(sequences)]
    with torch.inference_mode(), forced("interpret"):
        out = Decodes(served, pool).run(slices)
    assert out is not None
    assert out.logits_BSV is not None
    assert out.logits_BSV.shape[1] == sequences
    assert bool(out.logits_BSV.isfinite().all())


@pytest.mark.gpu
def test_a_cuda_graph_is_a_plain_step() -> None:
    served = _residual(torch.bfloat16).to("cuda")
    pools = [KVPool(RESIDUAL, 8 * BLOCKS, SIZE, model_dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    for pool in pools:
        pool._store.normal_(generator=torch.Generator("cuda").manual_seed(1))
    decodes = Decodes(served, pools[0])
    for seed, lengths in enumerate([[5], [0, 47, 3], [9, 8, 7, 6, 5], [30, 2, 11], [17, 40], [44]]):
        with torch.inference_mode():
            out = decodes.run(_slices(lengths, seed))
        assert out is not None, decodes.why_not
        assert out.logits_BSV is not None
        logits, _ = _plain(served, pools[1], _slices(lengths, seed))
        torch.testing.assert_close(out.logits_BSV, logits, rtol=2e-2, atol=2e-2)
    assert sorted(decodes._recordings) == [1, 2, 4, 8]


def test_an_arena_is_used_again() -> None:
    arena = tape.Arena(chunk=256)
    first = [arena.like(torch.empty(n)) for n in (3, 30, 100, 5)]
    assert len({t.data_ptr() for t in first}) == 4
    for t, value in zip(first, range(4), strict=True):
        t.fill_(value)
    assert all(bool((t == value).all()) for t, value in zip(first, range(4), strict=True)), "none lies in another"
    arena.rewind()
    again = [arena.like(torch.empty(n)) for n in (3, 30, 100, 5)]
    assert [t.data_ptr() for t in again] == [t.data_ptr() for t in first]
    assert arena.like(torch.empty(2, 3).t()).stride() == (1, 3)
