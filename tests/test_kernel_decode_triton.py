"""The Triton kernels of decoding, through the interpreter: paged attention, and the experts of a few tokens."""

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.infer.paged import KVPool, PagedCache
from coterie.infer.step import Slice
from coterie.kernels import expert_decode_triton as expert_decode_triton_module
from coterie.kernels.backend import forced
from coterie.kernels.expert_decode_triton import MOST_TOKENS, expert_decode_triton
from coterie.kernels.paged_attention_triton import PART, paged_attention_triton
from coterie.kernels.paged_kv import LayerKV, Ragged, quantize
from coterie.models.config import ModelConfig
from coterie.models.gpt import GPT
from coterie.moe.config import GateConfig, MoEConfig
from coterie.moe.gate import Gate


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Through the interpreter, or on a device: all tensors are made there."""
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("the interpreter runs where there is no GPU")
    with torch.device(request.param):
        yield request.param


def same(found: Tensor, expected: Tensor) -> bool:
    """Bit by bit on a device; the interpreter's products are BLAS's, whose order depends on a row's place."""
    return torch.equal(found, expected) if found.is_cuda else torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def paged(news: list[int], olds: list[int], heads: tuple[int, int], width: int, size: int, kind: torch.dtype):
    """Queries, a cache in blocks that lie anywhere, the step, and each sequence's keys and values (fp32)."""
    lengths = [new + old for new, old in zip(news, olds, strict=True)]
    counts = [-(-length // size) for length in lengths]
    order = torch.randperm(sum(counts) + 2).tolist()
    tables_NM = torch.zeros(len(news), max(counts), dtype=torch.int32)
    shape = len(order), size, heads[1], width
    scaled = kind == torch.int8
    k, v = (torch.full(shape, 99 if scaled else math.nan, dtype=kind) for _ in "kv")
    scales = [torch.full(shape[:-1], math.nan) for _ in "kv"] if scaled else [None, None]
    texts = []
    for n, length in enumerate(lengths):
        both = [torch.randn(length, heads[1], width) for _ in "kv"]
        tables_NM[n, : counts[n]] = torch.tensor([order.pop() for _ in range(counts[n])], dtype=torch.int32)
        slots = tables_NM[n].long()[torch.arange(length) // size] * size + torch.arange(length) % size
        for store, scale, x in zip((k, v), scales, both, strict=True):
            x_q, x_s = quantize(x, kind) if scaled else (x.to(kind), None)
            store.view(-1, *shape[2:])[slots] = x_q
            if scale is not None and x_s is not None:
                scale.view(-1, heads[1])[slots] = x_s
                x.copy_(x_q.float() * x_s[..., None])
        texts.append(both)
    starts = torch.tensor([0, *torch.tensor(news).cumsum(0).tolist()], dtype=torch.int32)
    step = Ragged(tables_NM, starts, torch.tensor(lengths, dtype=torch.int32), starts, max(lengths), max(news))
    return torch.randn(sum(news), heads[0], width), LayerKV(k, v, *scales), step, texts


def dense(q_THd: Tensor, step: Ragged, texts, window: int, sinks_H: Tensor | None) -> Tensor:
    """fp64, token by token."""
    out, starts, group = [], step.starts_N1.tolist(), q_THd.shape[1] // texts[0][0].shape[1]
    for n, (k, v) in enumerate(texts):
        for t in range(starts[n], starts[n + 1]):
            end = len(k) - (starts[n + 1] - t) + 1
            first = max(0, end - window) if window else 0
            k_LHd, v_LHd = (x[first:end].double().repeat_interleave(group, 1) for x in (k, v))
            scores_HL = torch.einsum("hd,lhd->hl", q_THd[t].double(), k_LHd) / math.sqrt(q_THd.shape[-1])
            if sinks_H is not None:
                scores_HL = torch.cat((scores_HL, sinks_H.double()[:, None]), 1)
            out.append(torch.einsum("hl,lhd->hd", scores_HL.softmax(-1)[:, : end - first], v_LHd))
    return torch.stack(out)


CASES = [
    ([1], [5], (2, 1), 16, 8, 0, False),
    ([1, 1, 1], [0, 40, 90], (4, 2), 16, 8, 0, False),  # decodes alone: parts side by side
    ([7, 1, 33], [0, 70, 10], (6, 2), 24, 16, 0, True),  # a group of three, a width that no tile is
    ([3, 1], [50, 77], (8, 8), 32, 8, 20, True),
    ([40], [0], (4, 1), 16, 8, 7, False),
    ([1, 2], [100, 3], (3, 3), 40, 16, 33, True),
]


@pytest.mark.parametrize("kind", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize(("news", "olds", "heads", "width", "size", "window", "sinks"), CASES)
def test_paged_attention_equals_the_dense_one(news, olds, heads, width, size, window, sinks, kind) -> None:
    q_THd, kv, step, texts = paged(news, olds, heads, width, size, kind)
    sinks_H = torch.randn(heads[0]) if sinks else None
    found = paged_attention_triton(q_THd, kv, step, width**-0.5, window, sinks_H)
    torch.testing.assert_close(found.double(), dense(q_THd, step, texts, window, sinks_H), rtol=1e-5, atol=2e-6)


def test_a_query_gets_the_same_alone_and_in_a_chunk() -> None:
    """In a chunk one program goes through the parts; alone they are computed side by side and merged."""
    new, old = 2 * PART, PART + 5
    q_THd, kv, step, _ = paged([new, 3], [old, 2], (4, 2), 16, 8, torch.float32)
    whole = paged_attention_triton(q_THd, kv, step, 0.25)
    for t in (0, PART // 2, new - 1):
        length = torch.tensor([old + t + 1], dtype=torch.int32)
        starts = torch.tensor([0, 1], dtype=torch.int32)
        alone = Ragged(step.tables_NM[:1], starts, length, starts, old + t + 1, 1)
        assert same(paged_attention_triton(q_THd[t : t + 1], kv, alone, 0.25)[0], whole[t])


def experts(tokens: int, choices: int, number: int, dim: int, hidden: int, activation: str, bias: bool):
    width = 2 * hidden if activation == "swiglu" else hidden
    x_TD, ids_TK = torch.randn(tokens, dim), torch.stack([torch.randperm(number)[:choices] for _ in range(tokens)])
    w_in, w_out = torch.randn(number, width, dim) * dim**-0.5, torch.randn(number, dim, hidden) * hidden**-0.5
    biases = (torch.randn(number, width), torch.randn(number, dim)) if bias else (None, None)
    return x_TD, ids_TK, torch.rand(tokens, choices), w_in, w_out, *biases


def by_hand(x_TD, ids_TK, weights_TK, w_in, w_out, b_in, b_out, activation: str) -> Tensor:
    y_TD = torch.zeros(x_TD.shape, dtype=torch.float64)
    for t, row in enumerate(ids_TK.tolist()):
        for k, e in enumerate(row):
            if e < 0:
                continue
            z = w_in[e].double() @ x_TD[t].double() + (0 if b_in is None else b_in[e].double())
            gate, up = z.chunk(2) if activation == "swiglu" else (z, None)
            a = F.gelu(gate, approximate="tanh") if up is None else F.silu(gate) * up
            y = w_out[e].double() @ a + (0 if b_out is None else b_out[e].double())
            y_TD[t] += y if weights_TK is None else weights_TK[t, k].double() * y
    return y_TD


@pytest.mark.parametrize(
    ("tokens", "choices", "number", "activation", "bias", "dropped"),
    [
        (1, 1, 4, "swiglu", False, 0.0),
        (1, 2, 8, "swiglu", True, 0.0),
        (5, 3, 6, "gelu", True, 0.3),
        (16, 2, 16, "swiglu", False, 0.2),
        (3, 2, 4, "swiglu", False, 1.0),
    ],
)
def test_experts_of_a_few_tokens(tokens, choices, number, activation, bias, dropped, poisoned) -> None:
    x, ids, weights, *rest = experts(tokens, choices, number, 40, 33, activation, bias)
    ids[torch.rand(ids.shape) < dropped] = -1
    for w in (weights, None, weights):  # again and again: the counters are left as they were found
        found = expert_decode_triton(x, ids, w, *rest, activation)
        torch.testing.assert_close(found.double(), by_hand(x, ids, w, *rest, activation), rtol=1e-5, atol=2e-6)


def test_experts_do_not_see_batch_mates() -> None:
    x, ids, weights, *rest = experts(9, 2, 6, 24, 16, "swiglu", False)
    whole = expert_decode_triton(x, ids, weights, *rest)
    for t in range(9):
        alone = expert_decode_triton(x[t : t + 1], ids[t : t + 1], weights[t : t + 1], *rest)
        assert same(alone[0], whole[t])


def test_too_many_tokens_are_refused() -> None:
    x, ids, weights, *rest = experts(MOST_TOKENS + 1, 1, 2, 8, 8, "swiglu", False)
    with pytest.raises(ValueError, match="made for 1 to 16"):
        expert_decode_triton(x, ids, weights, *rest)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs where there is no GPU")
def test_a_model_decodes_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk and a decode through the Triton paths give what the torch paths give."""
    config = ModelConfig(
        vocab_size=37,
        max_positions=64,
        layers=2,
        dim=24,
        heads=4,
        kv_heads=2,
        head_dim=8,
        hidden=20,
        experts=(0, 4),
        moe=MoEConfig(top_k=2, hidden=16),
    )
    model = GPT(config).eval()
    model.init_weights(3)
    calls: list[int] = []
    run = expert_decode_triton_module.expert_decode_triton
    monkeypatch.setattr(
        expert_decode_triton_module, "expert_decode_triton", lambda *a, **k: calls.append(len(a[0])) or run(*a, **k)
    )

    def logits(backend: str) -> list[Tensor]:
        cache, found = PagedCache(KVPool(config, 8, 8)), []
        with torch.inference_mode(), forced(backend):
            for start, count in ((0, 11), (11, 1)):
                tokens = tuple((5 * i + 3) % 37 for i in range(start, start + count))
                step = cache.begin([Slice(("a", 0), start, tokens, (4, 2), True)])
                found.append(model(*step, cache=cache).logits_BSV)
        return found

    expected = logits("reference")
    assert not calls
    for ours, theirs in zip(logits("interpret"), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert calls == [11, 1]


@pytest.mark.parametrize("tokens", [1, 5, 16, 17])
@pytest.mark.parametrize(
    ("score", "groups", "renormalize", "bias"),
    [("softmax", 1, "before_drop", False), ("softmax", 1, "none", False), ("sigmoid", 4, "before_drop", True)],
)
def test_a_router_without_losses_is_the_whole_one(tokens, score, groups, renormalize, bias) -> None:
    made = GateConfig(
        score=score,
        groups=groups,
        topk_groups=max(1, groups // 2),
        renormalize=renormalize,
        route_scale=1.5,
        bias_update=0.1 * bias,
    )
    router = Gate(20, 12, 3, made).eval()
    with torch.no_grad():
        router.weight.copy_(torch.randn(12, 20))
        if router.bias_E is not None:
            router.bias_E.copy_(torch.randn(12) / 9)
    x_TD = torch.randn(tokens, 20)
    with torch.inference_mode():
        with forced("reference"):
            expected = router(x_TD)
        with forced("triton" if x_TD.is_cuda else "interpret"):
            found, alone = router(x_TD, losses=False), router(x_TD[:1], losses=False)
    assert torch.equal(found.ids_TK, expected.ids_TK)
    assert torch.equal(found.stats.kept_E, expected.stats.kept_E)
    torch.testing.assert_close(found.weights_TK, expected.weights_TK, rtol=1e-5, atol=1e-6)
    assert float(found.stats.entropy) == 0, "it was not the short way"
    if tokens <= 16:
        assert torch.equal(alone.weights_TK[0], found.weights_TK[0])
