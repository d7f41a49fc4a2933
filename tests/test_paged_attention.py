"""Attention over blocks: against fp64, over every kind of cache, and the same bits for any batch and chunking."""

import random

import pytest
import torch
from helpers import assert_close_rms
from paged import KINDS, MIXES, Steps

from coterie.kernels import native
from coterie.kernels.backend import forced
from coterie.kernels.paged_attention import paged_attention, store_and_attend, store_kv
from coterie.kernels.paged_kv import FP8, LARGEST, quantize, rows_of

needs_native = pytest.mark.skipif(native.library() is None, reason="no C++ compiler")
PATHS = ["reference", "torch", pytest.param("native", marks=needs_native)]
MATCHES = [
    pytest.param(path, mix, marks=[needs_native] * (path == "native"))
    for path in ("reference", "torch", "native")
    for mix in MIXES
    if (path, mix) != ("reference", "long")  # token by token
]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def run(steps: Steps, path: str, pieces: list[tuple[int, int, int]] | None = None, **options) -> torch.Tensor:
    pieces = steps.last if pieces is None else pieces
    with (
        torch.inference_mode(path == "native"),
        torch.no_grad(),
        forced("reference" if path == "reference" else None),
    ):
        return store_and_attend(*steps.cut(pieces), steps.kv, steps.ragged(pieces), **options)


@pytest.mark.parametrize(("path", "mix"), MATCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_that_of_fp64(path: str, mix: str, kind: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        steps = Steps(MIXES[mix], kind=KINDS[kind], dtype=dtype)
        steps.earlier()
        got = run(steps, path)
        assert got.dtype == dtype
        assert_close_rms(got, steps.expected(steps.last), TOLERANCE[dtype])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (8, 1), (6, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("width", [8, 32, 72, 128, 256])
def test_heads_of_every_number_and_width(path: str, heads: tuple[int, int], width: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        steps = Steps(MIXES["mixed"][:4], *heads, width, kind=dtype, dtype=dtype)
        steps.earlier()
        assert_close_rms(run(steps, path), steps.expected(steps.last), TOLERANCE[dtype])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [1, 8, 16, 64, 128])
def test_blocks_of_every_size(path: str, size: int) -> None:
    steps = Steps(MIXES["mixed"], size=size)
    steps.earlier()
    assert_close_rms(run(steps, path), steps.expected(steps.last), 2e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("window", [1, 7, 16, 50, 1000])
def test_a_window_hides_what_is_far_back(path: str, window: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        steps = Steps(MIXES["mixed"], kind=dtype, dtype=dtype)
        steps.earlier()
        assert_close_rms(run(steps, path, window=window), steps.expected(steps.last, window=window), TOLERANCE[dtype])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scale", [0.3, 1.0, 20.0])
def test_scores_that_grow_from_tile_to_tile(path: str, scale: float) -> None:
    """By less and by more than what makes the kernel take another largest score."""
    for dtype in (torch.float32, torch.bfloat16):
        steps = Steps([(300, 300), (450, 1), (200, 5)], kind=dtype, dtype=dtype)
        for k in steps.k:
            k.mul_(torch.linspace(0, 1, len(k))[:, None, None])
        steps.earlier()
        assert_close_rms(run(steps, path, scale=scale), steps.expected(steps.last, scale=scale), TOLERANCE[dtype])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("window", [0, 20])
def test_sinks_take_their_share(path: str, window: int) -> None:
    steps = Steps(MIXES["mixed"])
    steps.earlier()
    sinks_H = torch.tensor([0.0, 3.0, -50.0, 40.0])
    got = run(steps, path, window=window, sinks_H=sinks_H, scale=0.3)
    assert_close_rms(got, steps.expected(steps.last, window=window, sinks_H=sinks_H, scale=0.3), 2e-6)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantized_values_are_the_nearest(kind: str) -> None:
    dtype = KINDS[kind]
    x_TGd = torch.randn(50, 3, 24) * torch.logspace(-8, 8, 50)[:, None, None]
    x_TGd[3, 1] = 0
    x_TGd[4, 1] = 1e-36
    values, scale_TG = quantize(x_TGd, dtype)
    assert values.dtype == dtype
    back = values.float() * scale_TG[..., None]
    largest = x_TGd.abs().amax(-1, keepdim=True)
    assert (values.float().abs().amax(-1)[largest[..., 0] > 1e-20] == LARGEST[dtype]).all()
    assert (back[3, 1] == 0).all()
    assert (back[4, 1] == 0).all()
    # Half a step of int8; half of fp8's 3 bits, or of its smallest number.
    step = largest / 127 / 2 if dtype == torch.int8 else (x_TGd.abs() / 16).clamp_min(largest / 448 / 2**10)
    regular = largest > 1e-20
    assert ((back - x_TGd).abs() <= step * 1.001)[regular.expand_as(back)].all()


def test_ties_go_to_even() -> None:
    x_TGd = torch.tensor([[[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127.0]]])
    assert quantize(x_TGd, torch.int8)[0].tolist() == [[[127, 0, 2, 2, 0, -2, -2, -127]]]
    x_TGd = torch.tensor([[[448.0, 17.0, 19.0, 21.0, -17.0, -19.0, 2**-10, 3 * 2**-10]]])  # 16, 18, 20 and 22 exist
    assert quantize(x_TGd, FP8)[0].float().tolist() == [[[448, 16, 20, 20, -16, -20, 0, 2**-8]]]


def test_what_does_not_fit_is_refused() -> None:
    steps = Steps(MIXES["one"])
    q, k, v = steps.cut(steps.last)
    ragged = steps.ragged(steps.last)
    with pytest.raises(ValueError, match="keys"):
        store_kv(steps.kv, k[:-1], v, ragged)
    with pytest.raises(ValueError, match="values"):
        store_kv(steps.kv, k, v[:, :1], ragged)
    with pytest.raises(ValueError, match="queries"):
        paged_attention(q[:, :3], steps.kv, ragged)
    with pytest.raises(ValueError, match="queries"):
        paged_attention(q[..., :16], steps.kv, ragged)
    with pytest.raises(ValueError, match="scales"):
        store_kv(steps.kv._replace(k_scale=torch.ones(1), v_scale=torch.ones(1)), k, v, ragged)
    with pytest.raises(ValueError, match="alike"):
        store_kv(steps.kv._replace(v=steps.kv.v.half()), k, v, ragged)


def any_cut(lengths: list[int], seed: int) -> list[list[tuple[int, int, int]]]:
    """Steps that compute all tokens of all sequences, cut and mixed at random."""
    rng, done, steps = random.Random(seed), [0] * len(lengths), []
    while any(d < length for d, length in zip(done, lengths, strict=True)):
        pieces = []
        for n in rng.sample(range(len(lengths)), len(lengths)):
            end = min(lengths[n], done[n] + rng.choice([0, 1, 1, 2, 5, 33, 64, 200]))
            if end > done[n]:
                pieces.append((n, done[n], end))
                done[n] = end
        steps += [pieces] if pieces else []
    return steps


@needs_native
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "fp8", "fp16"])
@pytest.mark.parametrize("window", [0, 70])
def test_no_batch_cut_or_block_changes_a_bit(kind: str, window: int) -> None:
    lengths, threads = [1, 130, 64, 700, 17], torch.get_num_threads()
    for dtype in (torch.float32, torch.bfloat16):
        steps = Steps([(length, length) for length in lengths], kind=KINDS[kind], dtype=dtype)
        alone = [run(steps, "native", [(n, 0, length)], window=window) for n, length in enumerate(lengths)]
        for seed in range(3):
            steps.place()
            got = [torch.full_like(x, float("nan")) for x in alone]
            torch.set_num_threads(seed + 1)
            try:
                for pieces in any_cut(lengths, seed):
                    out = run(steps, "native", pieces, window=window)
                    for (n, start, end), rows in zip(pieces, out.split([e - s for _, s, e in pieces]), strict=True):
                        got[n][start:end] = rows
            finally:
                torch.set_num_threads(threads)
            for n, want in enumerate(alone):
                assert torch.equal(got[n], want), f"sequence {n}"


@needs_native
def test_one_long_sequence_is_split_among_many_threads() -> None:
    threads = torch.get_num_threads()
    steps = Steps([(2100, 1)], heads=6, groups=3, dtype=torch.bfloat16, kind=torch.bfloat16)
    steps.earlier()
    want = None
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        try:
            got = run(steps, "native")
        finally:
            torch.set_num_threads(threads)
        want = got if want is None else want
        assert torch.equal(got, want)
    assert_close_rms(want, steps.expected(steps.last), TOLERANCE[torch.bfloat16])


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_later_token_that_is_not_finite_harms_none_before_it(dtype: torch.dtype) -> None:
    steps = Steps([(90, 60)], dtype=dtype, kind=dtype)
    steps.earlier()
    good = run(steps, "native")
    for x in (steps.k, steps.v):
        x[0][71] = float("inf")
        x[0][80] = float("nan")
    bad = run(steps, "native")
    assert torch.equal(bad[:41], good[:41])
    assert not torch.isfinite(bad[50:].float()).any()


@needs_native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_stored_is_what_torch_stores(kind: str, dtype: torch.dtype) -> None:
    steps = Steps([(40, 40), (9, 1)], width=40, kind=KINDS[kind], dtype=dtype)
    for n in range(2):
        for x in (steps.k[n], steps.v[n]):
            x *= torch.logspace(-7, 4, x.shape[0])[:, None, None]
            x[3, 1] = 0
    q, k, v = steps.cut(steps.last)
    ragged = steps.ragged(steps.last)
    both = torch.stack((k, v), 1)
    with torch.inference_mode():
        store_and_attend(q, both[:, 0], both[:, 1], steps.kv, ragged)
    got = [rows_of(x)[ragged.slots_T] for x in steps.kv if x is not None]
    store_kv(steps.kv, k, v, ragged)
    for mine, theirs in zip(got, [x for x in steps.kv if x is not None], strict=True):
        assert torch.equal(mine, rows_of(theirs)[ragged.slots_T])


@needs_native
def test_a_block_outside_the_cache_is_an_error() -> None:
    steps = Steps([(40, 1), (20, 1)], dtype=torch.bfloat16, kind=torch.bfloat16)
    steps.earlier()
    ragged = steps.ragged(steps.last)
    q, k, v = steps.cut(steps.last)
    tables = ragged.tables_NM.clone()
    tables[0, 1] = steps.kv.k.shape[0]
    for bad in (ragged._replace(tables_NM=tables), ragged._replace(slots_T=ragged.slots_T + 10**9)):
        with torch.inference_mode(), pytest.raises(IndexError, match="outside"):
            store_and_attend(q, k, v, steps.kv, bad)
