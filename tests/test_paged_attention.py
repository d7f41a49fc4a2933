"""Attention over blocks: against fp64, over every kind of cache, and the same bits for any batch and chunking."""

import pytest
import torch
from helpers import assert_close_rms
from paged import KINDS, MIXES, Steps

from coterie.kernels import native
from coterie.kernels.backend import forced
from coterie.kernels.paged_attention import paged_attention, store_and_attend, store_kv
from coterie.kernels.paged_kv import FP8, LARGEST, quantize

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
