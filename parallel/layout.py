"""How the ranks of a run are divided between data, tensor and expert parallelism: numbers alone, no process group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class ExpertLayout(NamedTuple):
    """One MoE layer's division of all ranks: `edp` groups that hold the same experts, in each of them `ep` shares of
    the experts, and each share cut into `etp` slices of the experts' width."""

    edp: int
    ep: int
    etp: int


class Sizes(NamedTuple):
    """What a model's layers ask of a layout."""

    heads: int
    kv_heads: int
    hidden: int
    """Width of the dense feed-forward layers."""
    vocab: int
    experts: tuple[int, ...] = ()
    """The distinct expert counts of its MoE layers."""
    expert_hidden: int = 1


@dataclass(frozen=True)
class Layout:
    """Dense layers see the ranks as dp_replicate x dp_shard x tp, the last axis the fastest. MoE layers see the same
    ranks as edp x ep x etp, each layer with its own degrees (parallel folding, arXiv 2504.14960; per-layer degrees,
    DeepSpeed-MoE section 4.1.3)."""

    dp_replicate: int = 1
    """Copies of everything that is sharded (HSDP)."""
    dp_shard: int = 1
    tp: int = 1
    ep: int = 1
    """The greatest expert-parallel degree that a layer may take; a layer with fewer experts takes their number."""
    etp: int = 1
    """Slices of every expert."""

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.dp_replicate * self.dp_shard * self.tp

    @property
    def data_ranks(self) -> int:
        """Ranks that read different sequences."""
        return self.dp_replicate * self.dp_shard

    def experts(self, count: int) -> ExpertLayout:
        """The division for a layer of `count` experts.

        Raises:
            ValueError: it does not come out even; the nearest degrees that do are named.
        """
        degree, ranks = min(self.ep, count), self.world // self.etp
        if self.world % self.etp == 0 and ranks % degree == 0 and count % degree == 0:
            return ExpertLayout(ranks // degree, degree, self.etp)
        if self.world % self.etp:
            raise ValueError(
                f"etp={self.etp} does not divide {self.world} ranks: {near(self.etp, divisors(self.world))}"
            )
        fitting = [d for d in divisors(ranks) if count % d == 0]
        raise ValueError(
            f"{count} experts do not spread over ep={degree} of {ranks} places for an expert: {near(degree, fitting)}"
        )

    def problems(self, sizes: Sizes) -> Iterator[str]:
        """One sentence for each thing that rules the layout out for a model."""
        for name, value in (("heads", sizes.heads), ("kv_heads", sizes.kv_heads), ("hidden", sizes.hidden)):
            if value % self.tp:
                yield f"tp={self.tp} does not divide {name} {value}: {near(self.tp, divisors(value))}"
        if sizes.vocab < self.tp:
            yield f"tp={self.tp} is more than the vocabulary's {sizes.vocab} words"
        elif -(-sizes.vocab // self.tp) * (self.tp - 1) >= sizes.vocab:
            yield f"tp={self.tp} leaves a rank without any of the vocabulary's {sizes.vocab} words"
        if sizes.experts and sizes.expert_hidden % self.etp:
            nearest = near(self.etp, divisors(sizes.expert_hidden))
            yield f"etp={self.etp} does not divide the experts' hidden {sizes.expert_hidden}: {nearest}"
        for count in sizes.experts:
            try:
                self.experts(count)
            except ValueError as error:
                yield str(error)


def fill(world: int, *, dp_replicate: int = 1, dp_shard: int = 0, tp: int = 1, ep: int = 1, etp: int = 1) -> Layout:
    """The layout of `world` ranks with these degrees; dp_shard=0 takes what the others leave.

    Raises:
        ValueError: the degrees do not multiply to the ranks; the nearest that do are named.
    """
    for name, value in (("dp_replicate", dp_replicate), ("tp", tp), ("ep", ep), ("etp", etp)):
        if value < 1:
            raise ValueError(f"{name}={value}: give 1 or more")
        if world % value:
            raise ValueError(f"{name}={value} does not divide {world} ranks: {near(value, divisors(world))}")
    rest = dp_replicate * tp
    if world % rest or (dp_shard and dp_shard * rest != world):
        given = f"dp_replicate={dp_replicate} x " + (f"dp_shard={dp_shard} x " if dp_shard else "") + f"tp={tp}"
        left = f"dp_shard={world // rest} would" if world % rest == 0 else f"{near(rest, divisors(world))} together"
        raise ValueError(f"{given} does not make {world} ranks: {left}")
    if world % (ep * etp):
        raise ValueError(
            f"ep={ep} x etp={etp} does not divide {world} ranks: {near(ep, divisors(world // etp))} for ep"
        )
    return Layout(dp_replicate, world // rest, tp, ep, etp)


def feasible(world: int, sizes: Sizes) -> list[Layout]:
    """Every layout of `world` ranks that the model's sizes allow; ep and etp are 1 without experts."""
    most = max(sizes.experts, default=1)
    found = []
    for tp in divisors(world):
        for dp_replicate in divisors(world // tp):
            for etp in divisors(world) if sizes.experts else [1]:
                for ep in [d for d in divisors(world // etp) if d <= most]:
                    layout = Layout(dp_replicate, world // tp // dp_replicate, tp, ep, etp)
                    if next(layout.problems(sizes), None) is None:
                        found.append(layout)
    return found


def divisors(number: int) -> list[int]:
    """Ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def near(value: int, fitting: Sequence[int]) -> str:
    """ "the nearest that does is A or B": the closest below and above."""
    below = [f for f in fitting if f < value][-1:]
    above = [f for f in fitting if f > value][:1]
    return "the nearest that does is " + " or ".join(map(str, [*below, *above]))
