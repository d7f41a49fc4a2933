"""From settings to dispatchers: which exchange each layer takes, and in how many chunks its rows travel."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..parallel.all_to_all import Network
from ..parallel.collectives import all_reduce_max
from ..parallel.cost import Batch, Choice
from ..parallel.exchange_dedup import make_exchange
from ..parallel.exchange_probe import pick_exchange
from ..parallel.traffic import launched_per_node
from .dispatch import AllToAllDispatch
from .gate import Gate

log = logging.getLogger("coterie")


@dataclass(frozen=True)
class Exchanging:
    """How rows travel to experts on other ranks."""

    exchange: str = "auto"
    """One of `parallel.exchange_dedup.EXCHANGES`; auto: flat on one node, else the fastest of all, measured now."""
    chunks: int = 1
    """Parts in which a rank's experts get their rows, so that one computes while the next travels; a rank with fewer
    experts takes as many."""
    ranks_per_node: int = 0
    """Consecutive ranks of one machine; 0: what the launcher says, all where it says nothing."""
    tokens: int = 4096
    """Of a rank in one forward pass, for the choice of auto."""

    def chunks_for(self, experts: int) -> int:
        """Chunks of a rank that holds so many experts.

        Raises:
            ValueError: they do not divide.
        """
        chunks = min(self.chunks, experts)
        if experts % chunks:
            raise ValueError(
                f"the {experts} experts of a rank do not divide into {chunks} chunks: give another number"
            )
        return chunks


class Dispatchers:
    """Makes the dispatchers of a model's layers. Every rank makes one, and asks in the same order.

    Args:
        settings: what is wanted.
        device: where rows are.
        element_bytes: of their numbers.

    Raises:
        ValueError: ranks were told different numbers of ranks on a node.
    """

    def __init__(self, settings: Exchanging, device: torch.device | str = "cpu", element_bytes: int = 4) -> None:
        self.settings, self.device, self.element_bytes = settings, device, element_bytes
        own = settings.ranks_per_node or launched_per_node(dist.get_world_size())
        most, least = all_reduce_max(torch.tensor([own, -own]).to(device)).tolist()
        if most != -least:
            raise ValueError(
                f"ranks were started {-least} on one node and {most} on another: give parallel.ranks_per_node"
            )
        self.per_node = own
        self._networks: dict[str, Network] = {}
        self._choices: dict[tuple[str, Batch], Choice] = {}

    def make(
        self,
        group: dist.ProcessGroup,
        gate: Gate,
        even_capacity: Callable[[int], int | None] | None = None,
    ) -> AllToAllDispatch:
        """The dispatcher of the layer of `gate`, with its experts spread over `group`. Layers over one group share
        its parts.

        Raises:
            ValueError: the experts do not spread, the chunks do not fit, or the exchange does not fit the nodes.
        """
        experts, settings = gate.num_experts, self.settings
        network, name = self.network(group), settings.exchange
        if name == "auto":
            batch = Batch(settings.tokens, gate.weight.shape[1], gate.top_k, experts, self.element_bytes)
            name = self._pick(network, batch)
        chunks, made = settings.chunks_for(experts // group.size()), make_exchange(name, network)
        return AllToAllDispatch(group, experts, even_capacity, exchange=made, chunks=chunks)

    def make_slots(self, group: dist.ProcessGroup, slots: int, exchange: str) -> AllToAllDispatch:
        """A dispatcher to so many slots for experts, evenly over the ranks of `group`, by an exchange of this name.

        Raises:
            ValueError: the exchange does not fit the nodes.
        """
        return AllToAllDispatch(group, slots, exchange=make_exchange(exchange, self.network(group)))

    def network(self, group: dist.ProcessGroup) -> Network:
        """The group's parts, the same each time."""
        key = group.group_name
        if key not in self._networks:
            self._networks[key] = Network(group, self.per_node)
        return self._networks[key]

    def _pick(self, network: Network, batch: Batch) -> str:
        if network.nodes is None or network.nodes.nodes == 1:
            return "flat"
        key = network.group.group_name, batch
        if key not in self._choices:
            self._choices[key] = pick_exchange(network, batch, self.device)
            where = f"{network.nodes.nodes} nodes of {network.nodes.per_node} ranks"
            log.info(f"{batch.experts} experts on {where}: {self._choices[key]}")
        return self._choices[key].name
