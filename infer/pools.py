"""The pool of keys and values of a model as an engine wants it, on one device or on each of several ranks."""

from __future__ import annotations

from dataclasses import replace

from ..models.gpt import GPT
from .config import EngineConfig
from .fleet import Fleet
from .memory import count_blocks
from .paged import KVPool, block_bytes


def longest(model: GPT, config: EngineConfig) -> int:
    """Tokens of prompt and answer together. ValueError: the model has no positions for so many."""
    most = model.config.max_positions
    if config.max_model_len > most:
        raise ValueError(f"max_model_len {config.max_model_len} is over the model's {most} positions")
    return config.max_model_len or most


def make_pool(model: GPT, config: EngineConfig, *, beside: int = 0, fleet: Fleet | None = None) -> KVPool:
    """Room for keys and values of the heads that this rank has. Every rank of a fleet must call, and all get as many
    blocks.

    Args:
        beside: bytes that something else takes for every block.

    Raises:
        ValueError: one sequence of max_model_len does not fit.
    """
    weight, sizes, tp, lanes = model.embed.weight, model.config, 1, 1
    if fleet is not None:
        tp, lanes = fleet.tp, fleet.lanes
        own = {"heads": sizes.heads // tp, "kv_heads": sizes.num_kv_heads // tp}
        sizes = replace(sizes, head_dim=sizes.width_per_head, **own)
    blocks = count_blocks(
        config.kv_memory,
        block_bytes(sizes, config.block_size, config.kv_dtype, weight.dtype) + beside,
        config.block_size,
        max_model_len=longest(model, config),
        max_sequences=-(-config.max_sequences // lanes),
        device=weight.device,
    )
    if fleet is not None:
        blocks = fleet.agree(blocks)
    return KVPool(
        sizes, blocks, config.block_size, dtype=config.kv_dtype, model_dtype=weight.dtype, device=weight.device
    )
