"""A model that several ranks hold together: opened by all of them, led by the engine on the first."""

from __future__ import annotations

from pathlib import Path

import torch

from ..models.gpt import GPT
from ..models.hub import resolve
from ..models.spread import load_spread
from ..models.tokenizer import Tokenizer
from ..moe.by_size import Serving
from ..moe.gathered import Turn
from ..parallel.launch import Ranks
from ..parallel.mesh import build_mesh
from .config import EngineConfig
from .fleet import Fleet
from .moving import Movers
from .open_model import keep_all, model_folder, open_tokenizer
from .pools import make_pool


def open_fleet(path: str | Path, config: EngineConfig, ranks: Ranks) -> tuple[GPT, Tokenizer | None, Fleet]:
    """This rank's part of the model, the tokenizer, and the ranks. Every rank must call.

    Raises:
        FileNotFoundError, ValueError: as `open_model`; or the model does not fit the ranks.
    """
    config.check_ranks(ranks.world)
    folder = model_folder(resolve(path))
    tokenizer = open_tokenizer(folder)
    mesh = build_mesh(ranks.device.type, tp=config.tp, ep=config.ep, etp=config.etp)
    turn = Turn(config.tp)
    serving = Serving(
        mesh, turn, exchange=config.exchange, ranks_per_node=config.ranks_per_node, spare=config.spare_experts
    )
    dtype = None if config.dtype is None else getattr(torch, config.dtype)
    model = load_spread(folder, mesh, serving, device=ranks.device, dtype=dtype)
    keep_all(model)
    movers = Movers([moe.experts for moe in model.moe_layers], serving.owns, serving.nodes(config.ep))
    return model, tokenizer, Fleet(model, turn, movers, tp=config.tp)


def follow(path: str | Path, config: EngineConfig, ranks: Ranks) -> None:
    """What every rank but the first does, until the first has done with it.

    Raises:
        FileNotFoundError, ValueError: as `open_fleet`.
        RankLost: another rank has failed.
    """
    model, _, fleet = open_fleet(path, config, ranks)
    fleet.use(make_pool(model, config, fleet=fleet))
    fleet.follow()
