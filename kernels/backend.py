"""Which implementation of an operation runs: the reference, torch, or Triton.

`COTERIE_BACKEND=reference|torch|triton|interpret` forces one for the whole process; `forced` does so
for a block. `interpret` runs the Triton kernels on CPU tensors through Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

NAMES = ("reference", "torch", "triton", "interpret")
_forced: str | None = os.environ.get("COTERIE_BACKEND") or None
if _forced is not None and _forced not in NAMES:
    raise ValueError(f"COTERIE_BACKEND={_forced!r} is not one of {', '.join(NAMES)}")
if _forced == "interpret":
    # Triton reads this once, when a kernel is decorated.
    os.environ["TRITON_INTERPRET"] = "1"

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    import triton
    import triton.language as tl
else:  # macOS and Windows: the torch path alone

    class _Missing:
        constexpr = object

        def __getattr__(self, name: str) -> Any:
            raise ModuleNotFoundError("this kernel needs triton (Linux): pip install triton")

    triton = tl = _Missing()  # type: ignore[assignment]


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit` where Triton exists; elsewhere the function itself, which is then never launched."""
    return triton.jit(function) if HAS_TRITON else function


def on_device(launcher: Callable[P, R]) -> Callable[P, R]:
    """Makes the device of a launcher's first argument the current one: Triton launches there, on its stream."""

    @functools.wraps(launcher)
    def launch(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(args[0]):
            return launcher(*args, **kwargs)

    return launch


def choose(*tensors: Tensor) -> str:
    """ "reference", "torch" or "triton" for these operands: forced, else Triton on CUDA and torch elsewhere.

    Raises:
        RuntimeError: Triton was forced where it cannot run.
    """
    on_cuda = any(t.is_cuda for t in tensors)
    if _forced is None:
        return "triton" if on_cuda and HAS_TRITON else "torch"
    if _forced == "interpret":
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError("the interpret backend needs TRITON_INTERPRET=1 before coterie is imported")
        return "triton"
    if _forced == "triton" and not on_cuda:
        raise RuntimeError("the triton backend needs CUDA tensors; use COTERIE_BACKEND=interpret on CPU")
    return _forced


def is_torch_on_cpu() -> bool:
    """Whether `choose` says "torch" for CPU tensors, as it does unless another was forced."""
    return _forced is None or _forced == "torch"


@contextlib.contextmanager
def forced(name: str | None) -> Iterator[None]:
    """Forces one backend inside the block (None: the default choice)."""
    global _forced
    if name is not None and name not in NAMES:
        raise ValueError(f"backend {name!r} is not one of {', '.join(NAMES)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before
