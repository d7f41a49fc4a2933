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
