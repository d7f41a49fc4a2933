"""What a step must read from memory, whatever computes it: the least time that it can take.

L MoE layers, E experts.
"""

from __future__ import annotations

from ..models.gpt import GPT
from .step import Step


def _bytes(tensors) -> int:
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


class Traffic:
    """Bytes that steps of one model read.

    Attributes:
        weights: all of the model's.
        dense: those that every token needs: no experts, no head, and of the embedding nothing.
        head: those of the output matrix.
        experts: per MoE layer those of one expert.
        token: of the keys and values of one token.
    """

    def __init__(self, model: GPT, token: float) -> None:
        self.weights, self.token = _bytes([*model.parameters(), *model.buffers()]), token
        table = model.embed.weight
        self.head = _bytes([table if model.head is None else model.head.weight])
        self.experts = [_bytes(moe.experts.parameters()) // moe.num_experts for moe in model.moe_layers]
        stacked = sum(_bytes(moe.experts.parameters()) for moe in model.moe_layers)
        self.dense = self.weights - stacked - self.head - (0 if model.head is None else _bytes([table]))

    def of(self, step: Step, loads: tuple[tuple[int, ...], ...]) -> float:
        """Of one step: each weight that it needs once, and all keys and values of its sequences once.

        Args:
            step: which tokens.
            loads: per MoE layer the assignments of each expert.
        """
        keys = sum(piece.start + len(piece.tokens) for piece in step.slices)
        visited = sum(size * sum(map(bool, layer)) for size, layer in zip(self.experts, loads, strict=True))
        head = self.head if any(piece.wants_logits for piece in step.slices) else 0
        return self.dense + head + visited + keys * self.token
