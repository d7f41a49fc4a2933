"""DeepSpeed-MoE checkpoints of Megatron-DeepSpeed's GPT, as tensors under our names: tensor-parallel parts put
together, experts collected from their own files.

D model, H heads, G key-value heads, d head width, F hidden, E experts, P 2 (swiglu: gate, up) or 1 (gelu).
Sources: see `deepspeed_files`; which tensors are cut, and along what, Megatron-DeepSpeed's tensor_parallel layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .config import ModelConfig
from .deepspeed_config import EXPERT, GATE, LAYER, Hints, config_of
from .deepspeed_files import Checkpoint, read_checkpoint
from .hf import shapes_of
from .parts import Box
from .stored import all_finite
from .tensor_files import KINDS

_ROWS = re.compile(
    r"(embedding\.word_embeddings|output_layer)\.weight|.*\.(query_key_value|dense_h_to_4h)\.(weight|bias)"
)
_COLUMNS = re.compile(r".*\.(self_attention\.dense|dense_4h_to_h)\.weight")
_EXPERTS = re.compile(r".*\.(deepspeed_experts|mlp\.mlp)\..*")
_IGNORED = re.compile(r".*(rotary_pos_emb|rotary_emb)\.inv_freq|.*\.gate\.(l_aux|exp_counts)|tied_modules\..*")


class Made(NamedTuple):
    """A tensor of ours, or of one expert, from one of theirs."""

    source: str
    whole: tuple[int, ...]
    """Its shape there, tensor-parallel parts put together."""
    make: Callable[[Sequence[Tensor]], Tensor]
    """From the parts of all ranks."""


class DeepSpeedTensors:
    """A `Source` of a checkpoint's tensors under our names; a box is put together when it is asked for."""

    def __init__(
        self,
        folder: Path,
        parts: dict[str, list[Tensor]],
        shapes: dict[str, tuple[int, ...]],
        made: dict[str, list[Made]],
    ) -> None:
        self.source: object = folder
        self._parts, self._shapes, self._made = parts, shapes, made

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """The first part's; its expert's, if there are many, of one training all alike."""
        return self._parts[self._made[name][0].source][0].dtype

    def read(self, name: str, box: Box) -> Tensor:
        """A box of one tensor on the CPU; of a layer's experts only those in it are read.

        Raises:
            ValueError: there is a NaN or an infinity in it.
        """
        made = self._made[name]
        if ".experts." in name:
            found = torch.stack([self._one(one) for one in (made[box[0]] if box else made)])
            box = (slice(None), *box[1:]) if box else ()
        else:
            found = self._one(made[0])
        found = found[box] if box else found
        if not all_finite(found):
            raise ValueError(f"{self.source}: {name} holds a NaN or an infinity, no number that a weight can be")
        return found

    def _one(self, made: Made) -> Tensor:
        return made.make(self._parts[made.source])


def open_deepspeed(folder: str | Path, hints: Hints | None = None) -> tuple[ModelConfig, DeepSpeedTensors]:
    """The config and the tensors of a checkpoint. Its experts keep no capacity outside training: with one, what a
    token gets would depend on its neighbours.

    Args:
        folder: one checkpoint, or the folder of several, whose `latest` names one.
        hints: what the checkpoint does not say of itself.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or asks for code, or the model is none that coterie can express.
    """
    hints = hints or Hints()
    checkpoint = read_checkpoint(folder)
    parts = _parts(checkpoint)
    whole = {name: _whole(name, ranks) for name, ranks in parts.items()}
    config = config_of(whole, checkpoint.args, hints)
    shapes, order = shapes_of(config), hints.qkv or _order(checkpoint)
    _check_ranks(config, checkpoint, order)
    made = {name: list(_made(name, config, order)) for name in shapes}
    problems = [problem for ones in made.values() for one in ones if (problem := _unfit(one, whole, parts, ones[0]))]
    used = {one.source for ones in made.values() for one in ones}
    problems += [f"{name} is unknown" for name in sorted(parts.keys() - used) if not _IGNORED.fullmatch(name)]
    if problems:
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ValueError(
            f"{checkpoint.folder} does not fit a GPT of Megatron-DeepSpeed: {'; '.join(problems[:20])}{more}"
        )
    return config, DeepSpeedTensors(checkpoint.folder, parts, shapes, made)


def _parts(checkpoint: Checkpoint) -> dict[str, list[Tensor]]:
    """Every tensor's parts on the ranks, under shorter names; one part where all ranks have the same.

    Raises:
        ValueError: ranks that differ where they must not, a name that cannot be printed.
    """
    ranks = [{_short(name): tensor for name, tensor in rank.items()} for rank in checkpoint.ranks]
    first = ranks[0]
    for number, rank in enumerate(ranks):
        if rank.keys() != first.keys():
            name = min(rank.keys() ^ first.keys())
            raise ValueError(f"{checkpoint.folder}: mp_rank 0 and {number} do not both have {name!r}")
    # Experts are cut only under enable_expert_tensor_parallelism; else every rank has all of each.
    sample = next((name for name in first if _EXPERTS.fullmatch(name) and _ROWS.fullmatch(name)), None)
    cut = sample is not None and not all(torch.equal(rank[sample], first[sample]) for rank in ranks)
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in first.items():
        if not name.isprintable():
            raise ValueError(f"{checkpoint.folder} holds a tensor of the name {name!r}")
        if _axis(name) is not None and (cut or not _EXPERTS.fullmatch(name)):
            parts[name] = [rank[name] for rank in ranks]
            continue
        if not _EXPERTS.fullmatch(name) and any(not torch.equal(rank[name], tensor) for rank in ranks[1:]):
            raise ValueError(f"{checkpoint.folder}: {name} differs between mp ranks, which should have the same")
        parts[name] = [tensor]
    return parts


def _short(name: str) -> str:
    """Names of all ages as the newest code has them, without the first word."""
    name = name.removeprefix("language_model.")
    name = re.sub(r"^transformer\.", "encoder.", name)
    return re.sub(r"^(encoder\.layers\.\d+)\.attention\.", r"\1.self_attention.", name)


def _axis(name: str) -> int | None:
    """Along what the ranks cut a tensor; None: each has it whole."""
    return 0 if _ROWS.fullmatch(name) else 1 if _COLUMNS.fullmatch(name) else None


def _whole(name: str, ranks: list[Tensor]) -> tuple[int, ...]:
    shape, axis = list(ranks[0].shape), _axis(name)
    if len(ranks) > 1 and axis is not None and axis < len(shape):
        shape[axis] *= len(ranks)
    return tuple(shape)


def _unfit(made: Made, whole: dict[str, tuple[int, ...]], parts: dict[str, list[Tensor]], beside: Made) -> str:
    """What is wrong with a tensor of theirs; "": nothing. `beside`: the first of those that make up one of ours."""
    if made.source not in parts:
        return f"{made.source} is missing"
    ranks = parts[made.source]
    if whole[made.source] != made.whole or any(rank.shape != ranks[0].shape for rank in ranks):
        return f"{made.source} has shape {list(whole[made.source])}, expected {list(made.whole)}"
    return (
        "" if ranks[0].dtype in KINDS else f"{made.source} is stored as {ranks[0].dtype}, which is no weight's type"
    )


def _check_ranks(config: ModelConfig, checkpoint: Checkpoint, order: str) -> None:
    count = len(checkpoint.ranks)
    if order == "last" and config.num_kv_heads != config.heads:
        raise ValueError(f"{checkpoint.folder} is of version 1, which has no fewer kv_heads than heads")
    for what, number in {"heads": config.heads, "kv_heads": config.num_kv_heads, "hidden": config.hidden}.items():
        if number % count:
            raise ValueError(f"{checkpoint.folder} has {count} mp ranks, which do not share {what}={number} evenly")


def _order(checkpoint: Checkpoint) -> str:
    """How rows of query_key_value follow each other."""
    if checkpoint.version < 2:
        return "last" if checkpoint.version >= 1 else "split"
    # Since Megatron-DeepSpeed 676a482 (December 2024), which brought this argument, heads are no longer side by side.
    return "split" if "ds_sequence_parallel_fpdt" in (checkpoint.args or {}) else "grouped"


def _made(name: str, config: ModelConfig, order: str) -> Iterator[Made]:
    """What one of our tensors is made of: one tensor of theirs, or one for each expert."""
    dim, words = config.dim, (config.vocab_size, config.dim)
    alone = {
        "embed.weight": Made("embedding.word_embeddings.weight", words, partial(_joined, 0)),
        "positions.weight": Made("embedding.position_embeddings.weight", (config.max_positions, dim), _first),
        "head.weight": Made("output_layer.weight", words, partial(_joined, 0)),
        "final_norm.weight": Made("encoder.final_layernorm.weight", (dim,), _first),
        "final_norm.bias": Made("encoder.final_layernorm.bias", (dim,), _first),
    }
    if name in alone:
        yield alone[name]
        return
    _, number, block, *rest = name.split(".")
    layer, kind = f"{LAYER}{number}", rest[-1]
    if block == "attention":
        yield _attention(layer, rest, config, order)
    elif block == "mlp":
        yield _feed_forward(f"{layer}.mlp", kind, dim, config.hidden, config.activation)
    elif block != "moe":
        theirs = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}[block]
        yield Made(f"{layer}.{theirs}.{kind}", (dim,), _first)
    elif rest[0] == "gate":
        yield Made(f"{layer}.{GATE}", (config.experts[int(number)], dim), _first)
    elif rest[0] == "coefficient":
        yield Made(f"{layer}.mlp.coefficient.{kind}", (2, dim) if kind == "weight" else (2,), _first)
    else:
        count = config.experts[int(number)]
        names = [f"{layer}.{EXPERT}{i}" for i in range(count)] if rest[0] == "experts" else [f"{layer}.mlp.mlp"]
        for theirs in names:
            yield _feed_forward(theirs, kind, dim, config.expert_hidden, config.moe.activation)


def _attention(layer: str, rest: list[str], config: ModelConfig, order: str) -> Made:
    heads, groups, width, dim = config.heads, config.num_kv_heads, config.width_per_head, config.dim
    if rest[0] in ("out", "out_bias"):
        if rest[0] == "out_bias":
            return Made(f"{layer}.self_attention.dense.bias", (dim,), _first)
        return Made(f"{layer}.self_attention.dense.weight", (dim, heads * width), partial(_joined, 1))
    rows = (heads + 2 * groups) * width
    whole = (rows, dim) if rest[1] == "weight" else (rows,)
    make = partial(_heads, rest[0], order, heads, groups, width)
    return Made(f"{layer}.self_attention.query_key_value.{rest[1]}", whole, make)


def _feed_forward(theirs: str, kind: str, dim: int, hidden: int, activation: str) -> Made:
    parts = 2 if activation == "swiglu" else 1
    return {
        "w_in": Made(f"{theirs}.dense_h_to_4h.weight", (parts * hidden, dim), partial(_gated, parts)),
        "b_in": Made(f"{theirs}.dense_h_to_4h.bias", (parts * hidden,), partial(_gated, parts)),
        "w_out": Made(f"{theirs}.dense_4h_to_h.weight", (dim, hidden), partial(_joined, 1)),
        "b_out": Made(f"{theirs}.dense_4h_to_h.bias", (dim,), _first),
    }[kind]


def _first(ranks: Sequence[Tensor]) -> Tensor:
    return ranks[0]


def _joined(axis: int, ranks: Sequence[Tensor]) -> Tensor:
    return ranks[0] if len(ranks) == 1 else torch.cat(list(ranks), axis)


def _gated(parts: int, ranks: Sequence[Tensor]) -> Tensor:
    """(P, F, D) or (P, F): each rank has its rows of the gate, then its rows of what that multiplies."""
    return torch.cat([rank.reshape(parts, -1, *rank.shape[1:]) for rank in ranks], 1)


def _heads(which: str, order: str, heads: int, groups: int, width: int, ranks: Sequence[Tensor]) -> Tensor:
    """q: (H, d, ...); kv: (2, G, d, ...). A rank has some of the heads and their keys and values."""
    h, g = heads // len(ranks), groups // len(ranks)
    found = []
    for rank in ranks:
        rest = rank.shape[1:]
        if order == "grouped":
            rows = rank.reshape(g, h // g + 2, width, *rest)
            q, k, v = rows[:, :-2].reshape(h, width, *rest), rows[:, -2], rows[:, -1]
        elif order == "last":
            q, k, v = rank.reshape(h, width, 3, *rest).unbind(2)
        else:
            q, k, v = (part.reshape(-1, width, *rest) for part in rank.split([h * width, g * width, g * width]))
        found.append(q if which == "q" else torch.stack([k, v]))
    return torch.cat(found, 0 if which == "q" else 1)
