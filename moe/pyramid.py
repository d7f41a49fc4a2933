"""Experts per layer: the pyramids of PR-MoE (DeepSpeed-MoE section 4.1), and lists written by hand."""

from __future__ import annotations

from collections.abc import Sequence


def pyramid(layers: int, interval: int, first: int, last: int, last_count: int) -> tuple[int, ...]:
    """Experts of each of `layers` layers, 0 for a dense one.

    Counted from one, every layer that `interval` divides is a MoE layer: at interval 2, 24 layers have 12 of them and
    21 layers have 10. The last `last_count` MoE layers have `last` experts, those before them `first`.
    The paper's 350M PR-MoE-32/64 is pyramid(24, 2, 32, 64, 2).
    """
    moe_layers = layers // interval if interval > 0 else 0
    if not 0 <= last_count <= moe_layers:
        raise ValueError(
            f"{layers} layers at interval {interval} have {moe_layers} MoE layers, "
            f"so last_count={last_count} does not fit"
        )
    return spread([first] * (moe_layers - last_count) + [last] * last_count, layers, interval)


def spread(counts: Sequence[int], layers: int, interval: int) -> tuple[int, ...]:
    """Lays the expert counts of the MoE layers over all layers, 0 for the dense ones between them."""
    if interval < 1 or len(counts) != layers // interval:
        raise ValueError(
            f"{layers} layers at interval {interval} have {layers // max(interval, 1)} MoE layers, "
            f"but {len(counts)} expert counts were given"
        )
    experts = [0] * layers
    experts[interval - 1 : len(counts) * interval : interval] = counts
    return validate(experts, layers)


def parse(text: str, layers: int, interval: int = 1) -> tuple[int, ...]:
    """Reads "32x10,64x2": ten MoE layers of 32 experts, then two of 64, over every `interval`-th of `layers`.

    With interval 1 the list names all layers, and 0 is a dense one: "0,8,0,16".
    """
    counts: list[int] = []
    for part in text.split(","):
        number, x, times = part.strip().partition("x")
        if not number.isdecimal() or (x and not times.isdecimal()):
            raise ValueError(f"expert list {text!r}: {part.strip()!r} is not a count like 64 or 64x2")
        counts += [int(number)] * (int(times) if x else 1)
    return spread(counts, layers, interval)


def validate(experts: Sequence[int], layers: int, top_k: int = 1) -> tuple[int, ...]:
    """The list as a tuple, when it names every layer and no MoE layer has fewer than `top_k` experts."""
    if len(experts) != layers:
        raise ValueError(f"the expert list has {len(experts)} entries, but the model has {layers} layers")
    for layer, count in enumerate(experts):
        if count < 0 or 0 < count < top_k:
            raise ValueError(f"layer {layer} has {count} experts, but top_k={top_k} (0 makes a layer dense)")
    return tuple(experts)
