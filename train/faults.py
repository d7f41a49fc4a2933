"""What goes wrong in long runs: signals that ask to stop, and the search for the first layer with bad numbers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# torchrun hands a terminal's Ctrl-C on to workers that have already got it: within this many seconds it is one wish.
_ECHO_SECONDS = 2.0


class StopRequest:
    """While entered, SIGTERM and SIGINT only set `signal`; another one later ends the process at once."""

    def __init__(self) -> None:
        self.signal = 0
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._receive)
            except ValueError:  # not the main thread: whoever owns it handles signals
                break
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.signal and kind is not None and issubclass(kind, RuntimeError):
            os._exit(128 + self.signal)  # torchrun ends this rank because another one is gone: nothing is left to do

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal and now - self._since > _ECHO_SECONDS:
            os._exit(128 + number)
        if not self.signal:
            self.signal, self._since = number, now


def first_bad_layer(model: nn.Module, run: Callable[[], Tensor]) -> str:
    """Repeats a failed step under hooks and names the first layer whose numbers are not finite.

    Args:
        model: the model; every rank calls with the same one.
        run: runs forward on the failed batch and returns the loss to differentiate.
    """
    weights = _first(_agree([not _is_finite(p) for _, p in model.named_parameters()]))
    if weights is not None:
        return f"the weights of {_name(model.named_parameters(), weights)}"
    order: list[str] = []
    bad: list[bool] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            order.append(name)
            bad.append(not all(_is_finite(t) for t in _tensors(output)))

        return hook

    hooks = [m.register_forward_hook(watch(name)) for name, m in model.named_modules() if name]
    try:
        with torch.enable_grad():
            loss = run()
    finally:
        for hook in hooks:
            hook.remove()
    order.append("the loss")
    bad.append(not _is_finite(loss))
    found = _first(_agree(bad))
    if found is not None:
        return f"the output of {order[found]}" if order[found] != "the loss" else "the loss"
    model.zero_grad(set_to_none=True)
    loss.backward()
    # Backward runs from the last layer to the first: the last bad gradient is where it began.
    flags = _agree([p.grad is not None and not _is_finite(p.grad) for _, p in model.named_parameters()])
    model.zero_grad(set_to_none=True)
    if any(flags):
        last = len(flags) - 1 - flags[::-1].index(True)
        return f"the gradient of {_name(model.named_parameters(), last)}"
    return "no layer: repeated, the same batch is finite"


def _is_finite(tensor: Tensor) -> bool:
    tensor = tensor.detach()
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return not local.is_floating_point() or bool(torch.isfinite(local).all())


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _agree(flags: list[bool]) -> list[bool]:
    """A flag is set when it is set on any rank: all ranks run the same layers in the same order."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return flags
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    tensor = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in tensor.tolist()]


def _first(flags: list[bool]) -> int | None:
    return flags.index(True) if any(flags) else None


def _name(parameters: Iterable[tuple[str, Any]], index: int) -> str:
    return next(name for i, (name, _) in enumerate(parameters) if i == index)
