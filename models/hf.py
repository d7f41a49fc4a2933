"""Models of other projects in the layout of Hugging Face: their config.json as ours, their tensors under our names.

An architecture is a `Family`: two translations of a config and a table of tensors.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..moe.config import GateConfig, MoEConfig
from .config import ModelConfig
from .config_file import MODEL_TYPE, config_from_dict
from .gpt import GPT
from .hf_family import Family, Fields
from .hf_gpt2 import GPT2
from .hf_llama import families
from .parts import Inward, Outward, Source, Table, pieces

FAMILIES: dict[str, Family] = {family.model_type: family for family in (*families(), GPT2)}
"""By model_type."""

_NOT_YET = {"deepseek_v3": "its latent attention", "gpt_oss": "its attention sinks and windows"}


def config_of(data: dict[str, Any]) -> ModelConfig:
    """A config.json as a `ModelConfig`: of ours, or of one of `FAMILIES`.

    Raises:
        ValueError: an architecture or a feature that coterie lacks, a missing or wrong field: all in one message.
    """
    kind = data.get("model_type")
    if kind == MODEL_TYPE:
        return config_from_dict(data)
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = ", ".join((MODEL_TYPE, *FAMILIES))
        why = "does not know" if str(kind) not in _NOT_YET else f"does not read yet, because of {_NOT_YET[kind]}"
        said = "no model_type" if kind is None else f"model_type {kind!r}, which coterie {why}"
        raise ValueError(f"config.json has {said}: coterie reads {known}")
    fields, config, trouble = Fields(data), None, None
    try:
        config = FAMILIES[kind].read(fields)
    except ValueError as error:
        trouble = str(error)
    fields.leftover()
    problems = fields.problems or ([trouble] if trouble else [])
    if problems or config is None:
        raise ValueError(f"config.json of a {kind} model: " + "; ".join(problems))
    return config


def inward(family: Family, config: ModelConfig, stored: Source) -> Inward:
    """The tensors of a stored model under our names, whether its experts are stacked or not, and with or without
    the first word of its names.

    Raises:
        ValueError: what is stored does not fit the config: all in one message; or a stored head that should be tied
            to the embedding is not equal to it.
    """
    names = stored.names()
    fused = any(name.endswith(".experts.gate_up_proj") for name in names)
    least = config.layers if fused or not config.experts else sum(config.experts)
    if least > len(names):  # before a table of that many rows is made
        raise ValueError(f"{stored.source} does not fit its config.json: that asks for more than {least} tensors")
    table = family.table(config, fused)
    prefix = table["embed.weight"][0].name.partition(".")[0] + "."
    if not any(name.startswith(prefix) for name in names):
        table = _without(prefix, table)
    ignored = family.ignored
    if config.tied_head and "lm_head.weight" in names:
        _check_tied(stored, table["embed.weight"][0].name)
        ignored += r"|lm_head\.weight"
    return Inward(stored, table, shapes_of(config), ignored)


def _without(prefix: str, table: Table) -> Table:
    return {
        ours: [part._replace(name=part.name.removeprefix(prefix)) for part in parts] for ours, parts in table.items()
    }


def _check_tied(stored: Source, embed: str) -> None:
    same = embed in stored.names() and stored.shape(embed) == stored.shape("lm_head.weight")
    pairs = zip(pieces(stored, embed), pieces(stored, "lm_head.weight"), strict=True) if same else ()
    if not same or not all(torch.equal(one, other) for one, other in pairs):
        raise ValueError(
            f"{stored.source} holds an lm_head.weight that differs from {embed}, but its config.json has "
            "tie_word_embeddings: set that to false if the head is meant"
        )


def outline(config: ModelConfig) -> GPT:
    """The model without its tensors' memory.

    Raises:
        ValueError: sizes that no tensor can have.
    """
    try:
        return GPT(config, device="meta")
    except (RuntimeError, OverflowError, TypeError):
        raise ValueError("config.json asks for tensors larger than any can be") from None


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors."""
    return {name: tuple(tensor.shape) for name, tensor in outline(config).state_dict().items()}


def outward(family: Family, config: ModelConfig, ours: Source) -> Outward:
    """Our tensors under the family's names, expert by expert, as transformers writes them."""
    return Outward(ours, family.table(config, False))


def upstream(config: ModelConfig) -> Family | None:
    """The architecture that computes what a model computes, so that others can open it; None: there is none."""
    for family in FAMILIES.values():
        try:
            again = config_of(family.write(config))
        except ValueError:
            continue
        if same_function(again, config):
            return family
    return None


def same_function(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether models of two configs compute the same from the same tensors outside training."""
    return _essence(one) == _essence(other)


def _essence(config: ModelConfig) -> ModelConfig:
    """The config with all that changes nothing outside training, or nothing at all, set alike."""
    sparse = any(config.experts)
    return replace(
        config,
        kv_heads=config.num_kv_heads,
        head_dim=config.width_per_head,
        hidden=1 if sparse and all(config.experts) else config.hidden,
        activation=config.moe.activation if sparse and all(config.experts) else config.activation,
        mlp_bias=config.mlp_bias and not (sparse and all(config.experts)),
        rope_theta=1.0 if config.positions == "learned" else config.rope_theta,
        init_std=1.0,
        experts=config.experts if sparse else (),
        moe=_essence_of_moe(config) if sparse else MoEConfig(),
    )


def _essence_of_moe(config: ModelConfig) -> MoEConfig:
    moe, gate = config.moe, config.moe.gate
    plain, drops = GateConfig(), gate.eval_capacity_factor is not None
    renormalize = gate.renormalize if drops or gate.renormalize == "none" else "before_drop"
    return replace(
        moe,
        hidden=config.expert_hidden,
        gate=replace(
            plain,
            score=gate.score,
            renormalize="none" if moe.top_k == 1 else renormalize,
            eval_capacity_factor=gate.eval_capacity_factor,
            min_capacity=gate.min_capacity if drops else plain.min_capacity,
            drop_policy=gate.drop_policy if drops else plain.drop_policy,
            groups=gate.groups if gate.topk_groups < gate.groups else 1,
            topk_groups=gate.topk_groups if gate.topk_groups < gate.groups else 1,
            route_scale=gate.route_scale,
            bias_update=float(gate.bias_update > 0),  # there is a tensor of biases, at any speed
        ),
    )
