"""What several tests share."""

import torch
from torch import Tensor


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of the expectation, in fp64; absolute where the expectation is zero."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} is not {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    error = (actual - expected).square().mean().sqrt().item()
    scale = expected.square().mean().sqrt().item()
    return error / scale if scale > 0 else error


def assert_close_rms(actual: Tensor, expected: Tensor, ratio: float = 1e-5, name: str = "tensor") -> None:
    """Fails when the RMS ratio passes `ratio`, or anything is not finite."""
    assert torch.isfinite(actual).all(), f"{name} has values that are not finite"
    got = rms_ratio(actual, expected)
    assert got <= ratio, f"{name}: RMS ratio {got:.3e} is over {ratio:.1e}"


class Held:
    """A `models.parts.Source` in memory."""

    source = "held"

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, box: tuple[slice, ...]) -> Tensor:
        return self.tensors[name][box] if box else self.tensors[name]


def greedy(model, rows, tokens: int) -> list[list[int]]:
    """What the engine goes on with, a list for each row of ids; no id ends it."""
    from coterie.infer.pipeline import pipeline

    prompts = [row.tolist() for row in rows]
    found = pipeline(model)(prompts, temperature=0.0, max_new_tokens=tokens, ignore_eos=True)
    return [list(one.tokens) for one in found]


def stepwise(model, tokens_BS: Tensor, pieces: list[int], size: int = 4):
    """Logits of each piece of the sequences, (B, S, V), from passes over blocks of keys and values."""
    from coterie.infer.paged import KVPool, PagedCache
    from coterie.infer.step import Slice

    batch, length = tokens_BS.shape
    each = -(-length // size)
    pool = KVPool(model.config, batch * each, size, model_dtype=model.embed.weight.dtype)
    cache, start = PagedCache(pool), 0
    for count in pieces:
        slices = [
            Slice(("x", b), start, tuple(row[start : start + count]), tuple(range(b * each, (b + 1) * each)), True)
            for b, row in enumerate(tokens_BS.tolist())
        ]
        with torch.inference_mode():
            out = model(*cache.begin(slices), cache=cache)
        yield out.logits_BSV[0].unflatten(0, (batch, count))
        start += count
