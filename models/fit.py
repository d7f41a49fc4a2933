"""Whether a model's sizes allow a layout."""

from __future__ import annotations

from ..parallel.layout import Layout, Sizes
from .config import ModelConfig


def sizes(config: ModelConfig) -> Sizes:
    """What a model asks of a layout; no width where it has no dense feed-forward layer."""
    counts = [config.experts_of(layer) for layer in range(config.layers)]
    hidden = config.hidden if 0 in counts else 0
    experts = tuple(sorted({count for count in counts if count}))
    return Sizes(config.heads, config.num_kv_heads, hidden, config.vocab_size, experts, config.expert_hidden)


def check_fit(config: ModelConfig, layout: Layout) -> None:
    """Refuses a layout that does not fit the model.

    Raises:
        ValueError: each reason is one sentence.
    """
    problems = list(layout.problems(sizes(config)))
    if problems:
        raise ValueError("; ".join(problems))
