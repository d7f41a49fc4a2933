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
