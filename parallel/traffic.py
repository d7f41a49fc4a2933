"""What exchanges of an expert-parallel group move: messages and bytes by kind of link, and the seconds they hold."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

LINKS = ("self", "intra", "inter")  # to itself, to another rank of the node, to another node


class Sent(NamedTuple):
    """What one rank sent over one kind of link. A message is a send of at least one byte to one rank."""

    messages: int = 0
    bytes: int = 0


class Clock:
    """Adds up the time between `start` and `stop`: seconds of this process on CPU, device events on CUDA."""

    def __init__(self) -> None:
        self._seconds, self._events = 0.0, []

    def start(self, device: torch.device) -> Any:
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self, started: Any) -> None:
        if isinstance(started, float):
            self._seconds += time.perf_counter() - started
        else:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append((started, event))

    def read(self) -> float:
        """Seconds since the last reading. On CUDA it waits for the recorded work: call it when a step is logged."""
        seconds, self._seconds = self._seconds, 0.0
        for begin, end in self._events:
            end.synchronize()
            seconds += begin.elapsed_time(end) / 1e3
        self._events.clear()
        return seconds


class Traffic:
    """Counters that the collectives themselves keep, from sizes that the host has anyway: no device is waited for.

    `clock` holds the seconds in which a collective held up the computation. What travels while something else is
    computed costs nothing there.
    """

    def __init__(self) -> None:
        self.clock = Clock()
        self._sent = {link: Sent() for link in LINKS}

    def count(self, links: Sequence[str], sizes: Sequence[int]) -> None:
        """Adds one collective: bytes for each rank, and the kind of link to it."""
        for link, size in zip(links, sizes, strict=True):
            if size:
                messages, total = self._sent[link]
                self._sent[link] = Sent(messages + 1, total + size)

    def read(self) -> dict[str, Sent]:
        """What was sent since the last reading, by kind of link."""
        sent, self._sent = self._sent, {link: Sent() for link in LINKS}
        return sent


class Nodes(NamedTuple):
    """Ranks on machines: rank n * per_node + i of a group is place i of node n."""

    nodes: int
    per_node: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node


def link(source: int, target: int, per_node: int) -> str:
    """The kind of link between two ranks, of which `per_node` consecutive ones share a machine."""
    if source == target:
        return "self"
    return "intra" if source // per_node == target // per_node else "inter"


def launched_per_node(world: int) -> int:
    """Ranks on this machine by the launcher's word (LOCAL_WORLD_SIZE); all of them where it says nothing."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(text) if text.isdecimal() and int(text) > 0 else world


def find_nodes(ranks: Sequence[int], per_node: int) -> Nodes | None:
    """The nodes of a group by its ranks' global numbers, `per_node` consecutive ones on each machine; None where
    its members are not in equal blocks, one for each node."""
    homes = [rank // per_node for rank in ranks]
    nodes = len(set(homes))
    members = len(ranks) // nodes
    even = all(len(set(homes[n * members : (n + 1) * members])) == 1 for n in range(nodes))
    return Nodes(nodes, members) if nodes * members == len(ranks) and even else None
