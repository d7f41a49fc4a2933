"""The pool of blocks and the cache over it: a model's logits, copies, and what `begin` makes of slices."""

import random
from dataclasses import replace

import pytest
import torch
from helpers import assert_close_rms
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.infer.paged import KVPool, KVType, PagedCache, block_bytes
from coterie.infer.step import Slice
from coterie.models.config import ModelConfig
from coterie.models.gpt import GPT
from coterie.moe.config import MoEConfig

CONFIG = ModelConfig(
    vocab_size=200,
    max_positions=128,
    layers=3,
    dim=64,
    heads=4,
    kv_heads=2,
    hidden=48,
    qk_norm="head",
    init_std=0.2,
    experts=(0, 4, 4),
    moe=MoEConfig(top_k=2, hidden=32),
)
GPT2 = replace(CONFIG, kv_heads=0, positions="learned", norm="layernorm", attention_bias="all", qk_norm="none")


def _model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> GPT:
    model = GPT(config, dtype=dtype)
    model.init_weights(8)
    return model.eval()


def _tables(pool: KVPool, lengths: list[int], rng: random.Random) -> list[tuple[int, ...]]:
    free = list(range(pool.blocks))
    rng.shuffle(free)
    return [tuple(free.pop() for _ in range(-(-length // pool.size))) for length in lengths]


def _in_chunks(
    model: GPT, pool: KVPool, texts: list[list[int]], tables: list[tuple[int, ...]], rng: random.Random
) -> list[Tensor]:
    """Logits of every token, each text cut at random and mixed with the others at random."""
    cache, done, logits = PagedCache(pool), [0] * len(texts), [[] for _ in texts]
    while any(d < len(text) for d, text in zip(done, texts, strict=True)):
        slices = []
        for n, text in enumerate(texts):
            if done[n] < len(text) and rng.random() < 0.7:
                end = min(len(text), done[n] + rng.choice([1, 1, 2, 7, 20, 50]))
                slices.append((n, Slice((str(n), 0), done[n], tuple(text[done[n] : end]), tables[n], True)))
        if not slices:
            continue
        tokens, positions = cache.begin([piece for _, piece in slices])
        out = model(tokens, positions, cache=cache).logits_BSV[0]
        for (n, piece), rows in zip(slices, out.split([len(p.tokens) for _, p in slices]), strict=True):
            logits[n].append(rows)
            done[n] += len(piece.tokens)
    return [torch.cat(rows) for rows in logits]


@pytest.mark.parametrize("config", [CONFIG, GPT2], ids=["rotary", "learned"])
@pytest.mark.parametrize("seed", range(3))
def test_logits_are_those_without_a_cache(config: ModelConfig, seed: int) -> None:
    rng, model = random.Random(seed), _model(config)
    texts = [[rng.randrange(200) for _ in range(length)] for length in (1, 40, 93, 17, 128)]
    pool = KVPool(config, 30, 16)
    tables = _tables(pool, [len(t) for t in texts], rng)
    with torch.inference_mode():
        got = _in_chunks(model, pool, texts, tables, rng)
        for text, logits in zip(texts, got, strict=True):
            want = model(torch.tensor([text])).logits_BSV[0]
            assert_close_rms(logits, want, 1e-5)


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("auto", 0.05), ("float32", 0.05), ("float16", 0.05), ("int8", 0.08), ("fp8", 0.25)]
)
def test_other_types_stay_near(kind: KVType, tolerance: float) -> None:
    rng, model = random.Random(5), _model(replace(CONFIG, experts=()), torch.bfloat16)
    texts = [[rng.randrange(200) for _ in range(length)] for length in (60, 90)]
    pool = KVPool(CONFIG, 20, 16, dtype=kind, model_dtype=torch.bfloat16)
    with torch.inference_mode():
        got = _in_chunks(model, pool, texts, _tables(pool, [60, 90], rng), rng)
        for text, logits in zip(texts, got, strict=True):
            assert_close_rms(logits, model(torch.tensor([text])).logits_BSV[0], tolerance)


def test_a_copied_block_goes_its_own_way() -> None:
    """Two sequences share a prefix; the second copies the last block of it and writes there."""
    model = _model(CONFIG)
    shared, one, two = list(range(20)), list(range(50, 60)), list(range(90, 100))
    pool = KVPool(CONFIG, 8, 16)
    cache = PagedCache(pool)

    def logits(start: int, text: list[int], blocks: tuple[int, ...]) -> Tensor:
        tokens, positions = cache.begin([Slice(("a", 0), start, tuple(text), blocks, True)])
        return model(tokens, positions, cache=cache).logits_BSV[0]

    with torch.inference_mode():
        logits(0, shared, (3, 5))
        pool.copy([(5, 1)])
        first, second = logits(20, one, (3, 5)), logits(20, two, (3, 1))
        for got, text in ((first, one), (second, two)):
            assert_close_rms(got, model(torch.tensor([shared + text])).logits_BSV[0, 20:], 1e-5)


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12),
    kind=st.sampled_from(["auto", "fp8"]),
)
def test_copies_come_in_their_order(pairs: list[tuple[int, int]], kind: KVType) -> None:
    pool = KVPool(CONFIG, 7, 4, dtype=kind)
    content = [float(i) for i in range(7)]
    for i in range(CONFIG.layers):
        for store in pool.layer(i):
            if store is not None:
                for block in range(7):
                    store[block] = torch.tensor(content[block]).to(store.dtype)
    pool.copy(pairs)
    for source, target in pairs:
        content[target] = content[source]
    for i in range(CONFIG.layers):
        for store in pool.layer(i):
            if store is not None:
                assert store.float().flatten(1).tolist() == [[c] * store[0].numel() for c in content]


def test_what_the_pool_lacks_is_refused() -> None:
    pool = KVPool(CONFIG, 7, 4)
    for pair in ((7, 0), (0, -1)):
        with pytest.raises(ValueError, match="not one of the pool's 7"):
            pool.copy([pair])
    with pytest.raises(ValueError, match="at least 1"):
        KVPool(CONFIG, 0, 4)
    with pytest.raises(ValueError, match="int4"):
        KVPool(CONFIG, 1, 4, dtype="int4")  # type: ignore[arg-type]
    cache = PagedCache(pool)
    for start, tokens, blocks in (
        (0, (), (1,)),
        (-1, (1,), (1,)),
        (3, (1, 2), (1,)),
        (0, (1,), (7,)),
        (0, (1,), (-1,)),
    ):
        with pytest.raises(ValueError, match="block"):
            cache.begin([Slice(("a", 0), start, tokens, blocks, True)])
    with pytest.raises(ValueError, match="without a slice"):
        cache.begin([])
    x = torch.zeros(1, 1, 2, 16)
    with pytest.raises(ValueError, match="begun"):
        cache.attend(0, x, x, x)


@pytest.mark.parametrize("kind", ["auto", "float32", "float16", "int8", "fp8"])
def test_bytes_of_a_block(kind: KVType) -> None:
    pool = KVPool(CONFIG, 9, 8, dtype=kind, model_dtype=torch.bfloat16)
    assert pool.bytes == 9 * block_bytes(CONFIG, 8, kind, torch.bfloat16)
    held = [t for i in range(CONFIG.layers) for t in pool.layer(i) if t is not None]
    assert pool.bytes == sum(t.numel() * t.itemsize for t in held)
    assert all(t.is_contiguous() for t in held)


@st.composite
def _slices(draw: st.DrawFn) -> tuple[int, list[Slice]]:
    size = draw(st.sampled_from([1, 4, 16]))
    slices = []
    for n in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, 40))
        tokens = tuple(draw(st.lists(st.integers(0, 1000), min_size=1, max_size=20)))
        least = -(-(start + len(tokens)) // size)
        count = least + draw(st.integers(0, 2))
        blocks = tuple(draw(st.lists(st.integers(0, 99), min_size=count, max_size=count)))
        slices.append(Slice(("s", n), start, tokens, blocks, False))
    return size, slices


@settings(max_examples=100, deadline=None)
@given(_slices())
def test_begin_lays_slices_end_to_end(given_slices: tuple[int, list[Slice]]) -> None:
    size, slices = given_slices
    cache = PagedCache(KVPool(replace(CONFIG, layers=1, experts=()), 100, size))
    tokens, positions = cache.begin(slices)
    ragged = cache.ragged
    assert ragged is not None
    flat = [(piece, i) for piece in slices for i in range(len(piece.tokens))]
    assert tokens.tolist() == [[piece.tokens[i] for piece, i in flat]]
    assert positions.tolist() == [[piece.start + i for piece, i in flat]]
    places = [(piece.blocks, piece.start + i) for piece, i in flat]
    assert ragged.slots_T.tolist() == [blocks[p // size] * size + p % size for blocks, p in places]
    assert ragged.starts_N1.tolist() == [sum(len(s.tokens) for s in slices[:n]) for n in range(len(slices) + 1)]
    assert ragged.lengths_N.tolist() == [s.start + len(s.tokens) for s in slices]
    assert (ragged.longest, ragged.widest) == (max(ragged.lengths_N.tolist()), max(len(s.tokens) for s in slices))
    for row, piece in zip(ragged.tables_NM.tolist(), slices, strict=True):
        assert row == list(piece.blocks) + [0] * (len(row) - len(piece.blocks))
    assert (tokens.dtype, positions.dtype, ragged.slots_T.dtype) == (torch.int64,) * 3
    assert (ragged.tables_NM.dtype, ragged.starts_N1.dtype, ragged.lengths_N.dtype) == (torch.int32,) * 3


def test_fp8_is_refused_where_the_kernels_cannot_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"capability 8\.9 or more: give int8"):
        KVPool(CONFIG, 2, 8, dtype="fp8", device="cuda")
