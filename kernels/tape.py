"""A pass of a model, recorded once and repeated on the same memory: a CUDA graph, and what it is on a CPU.

A decode step of a small model spends more time in Python, between its kernels, than a large one in all. Once every
operation is a call of the native library, the calls and their pointers are all there is to a step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import native

T = TypeVar("T")
_EMPTY = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty_strided")
_one_at_a_time = threading.Lock()


class Recording(Protocol[T]):
    """A step that can be repeated on what its inputs hold at the time.

    Attributes:
        output: the step's answer, written anew by each replay. Recordings of one `Arena` share their memory: an
            answer holds until the next replay of any of them.
    """

    output: T

    def replay(self) -> T: ...


class Arena:
    """Memory that the recordings of one thread share, as only one of them runs at a time: a list of `chunk` bytes or
    more each."""

    def __init__(self, chunk: int = 1 << 20) -> None:
        self._chunk, self._chunks = chunk, list[Tensor]()
        self._graphs: Any = None
        self.rewind()

    def rewind(self) -> None:
        """All memory may be given again."""
        self._at, self._used = 0, 0

    def like(self, t: Tensor) -> Tensor:
        """A tensor of t's shape, strides and type in the arena."""
        size = -(-t.untyped_storage().nbytes() // 64) * 64
        while self._at < len(self._chunks) and self._used + size > self._chunks[self._at].numel():
            self._at, self._used = self._at + 1, 0
        if self._at == len(self._chunks):
            self._chunks.append(torch.empty(max(self._chunk, size), dtype=torch.uint8))
        start, self._used = self._used, self._used + size
        return self._chunks[self._at][start : self._used].view(t.dtype).as_strided(t.shape, t.stride())

    def graphs(self) -> Any:
        """The pool of memory of CUDA graphs."""
        self._graphs = self._graphs or torch.cuda.graph_pool_handle()
        return self._graphs


def record(step: Callable[[], T], device: torch.device, arena: Arena) -> Recording[T]:
    """Runs `step` and records it; its shapes, and all numbers that are not in tensors, stay what they were.

    Raises:
        RuntimeError: it cannot be recorded.
    """
    return Graph(step, arena) if device.type == "cuda" else Tape(step, arena)


class Graph(Generic[T]):
    """A CUDA graph of `step`. Nothing in it may wait for the device, and all that Triton compiles it has compiled."""

    output: T

    def __init__(self, step: Callable[[], T], arena: Arena) -> None:
        self._graph = torch.cuda.CUDAGraph()
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode():
            with torch.cuda.stream(beside):  # kernels are compiled and tables made before the recording
                step()
            torch.cuda.current_stream().wait_stream(beside)
            # What other threads ask of the device meanwhile is their own.
            with torch.cuda.graph(self._graph, pool=arena.graphs(), capture_error_mode="thread_local"):
                self.output = step()
        self._graph.replay()  # a capture computes nothing

    def replay(self) -> T:
        """The step again; the device may still be at it."""
        self._graph.replay()
        return self.output


class Tape(Generic[T]):
    """Runs `step` twice, the second time listening. `replay` then repeats its calls: they read the inputs where the
    step found them, and write `output`, the step's answer, in its place. Shapes and all numbers that the calls got
    by value stay what they were, so what changes from step to step must lie in tensors.

    Raises:
        RuntimeError: torch itself computes something in the step, which a replay would leave out.
    """

    output: T

    def __init__(self, step: Callable[[], T], arena: Arena | None = None) -> None:
        self._calls: list[tuple[Any, tuple[float | None, ...]]] = []
        own = threading.get_ident()

        def hear(entry: Any, args: tuple[float | None, ...]) -> None:
            if threading.get_ident() == own:
                self._calls.append((entry, args))

        self._arena = arena or Arena()
        self._arena.rewind()
        with _one_at_a_time, torch.inference_mode():
            step()  # tables and constants that are made once are made here
            with native.hear(hear), _Watch(self._arena):
                self.output = step()

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
    """Gives a recording its memory, and lets torch allocate and view but not compute."""

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self._arena = arena

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in _EMPTY:
            return self._arena.like(func(*args, **(kwargs or {})))
        if not func.is_view:
            raise RuntimeError(f"this step cannot be recorded: torch computes {func._schema.name} in it")
        return func(*args, **(kwargs or {}))
