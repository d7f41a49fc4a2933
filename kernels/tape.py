"""A pass of a model on a CPU, recorded once and repeated on the same memory: what a CUDA graph is to a GPU.

A decode step of a small model spends more time in Python, between its kernels, than a large one in all. Once every
operation is a call of the native library, the calls and their pointers are all there is to a step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import native

T = TypeVar("T")
_EMPTY = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty_strided")
_one_at_a_time = threading.Lock()


class Tape(Generic[T]):
    """Runs `step` twice, the second time listening. `replay` then repeats its calls: they read the inputs where the
    step found them, and write `output`, the step's answer, in its place. Shapes and all numbers that the calls got
    by value stay what they were, so what changes from step to step must lie in tensors.

    Raises:
        RuntimeError: torch itself computes something in the step, which a replay would leave out.
    """

    output: T

    def __init__(self, step: Callable[[], T]) -> None:
        self._calls: list[tuple[Any, tuple[float | None, ...]]] = []
        own = threading.get_ident()

        def hear(entry: Any, args: tuple[float | None, ...]) -> None:
            if threading.get_ident() == own:
                self._calls.append((entry, args))

        with _one_at_a_time, torch.inference_mode():
            step()  # tables and constants that are made once are made here
            watch = _Watch()
            with native.hear(hear), watch:
                self.output = step()
        self._memory = watch.made

    def replay(self) -> T:
        """The step again, on what its inputs hold at this time.

        Raises:
            RuntimeError: a call failed.
        """
        for entry, args in self._calls:
            if entry(*args):
                raise RuntimeError(f"{entry.__name__} failed in a recorded step")
        return self.output


class _Watch(TorchDispatchMode):
    """Keeps the memory of a recording, and lets torch allocate and view but not compute."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in _EMPTY:
            self.made.append(func(*args, **(kwargs or {})))
            return self.made[-1]
        if not func.is_view:
            raise RuntimeError(f"this step cannot be recorded: torch computes {func._schema.name} in it")
        return func(*args, **(kwargs or {}))
