"""A model over the ranks that serve it: cut as for training, but nothing is sharded, gathered or differentiated."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..moe.by_size import Serving
from ..moe.experts import Experts
from ..parallel.mesh import Mesh
from ..parallel.tensor import is_cut
from .fit import check_fit
from .gpt import GPT
from .tensor_parallel import cut_experts, spread_tensors
from .weights import load_model, read_config


def load_spread(
    directory: str | Path, mesh: Mesh, serving: Serving, *, device: torch.device, dtype: torch.dtype | None = None
) -> GPT:
    """This rank's part of the model of a directory; it reads no more than that.

    The tp ranks of a lane hold the same tokens throughout: attention is cut by heads, dense layers by their width,
    the vocabulary by words, and each layer's answer is summed. Experts are cut over ep and etp.

    Args:
        directory: as `load_model` takes it.
        mesh: the ranks.
        serving: how tokens reach experts.
        device: of this rank.
        dtype: as `load_model` takes it.

    Raises:
        FileNotFoundError, ValueError: as `load_model`; or the model does not fit the ranks.
    """
    check_fit(read_config(directory), mesh.layout)
    model = load_model(directory, device=device, dtype=dtype, lay=lambda model: _cut(model, mesh))
    _make_plain(model)
    for moe in model.moe_layers:
        moe.dispatch = serving.make(moe.gate, model.embed.weight.dtype)
        own = serving.owns[-1]
        if own is not None:
            _widen(moe.experts, own.slots)
    return model


def _widen(experts: Experts, slots: int) -> None:
    """Makes room for copies of other ranks' experts."""
    for name, parameter in list(experts.named_parameters(recurse=False)):
        if len(parameter) < slots:
            wide = parameter.new_zeros(slots, *parameter.shape[1:])
            wide[: len(parameter)] = parameter.detach()
            setattr(experts, name, nn.Parameter(wide, requires_grad=False))


def _cut(model: GPT, mesh: Mesh) -> None:
    spread_tensors(model, mesh, whole=True)
    for moe in model.moe_layers:
        cut_experts(moe, mesh)


def _make_plain(model: GPT) -> None:
    """DTensors become what this rank has of them: kernels take plain tensors, and wrappers cost time."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            local = parameter.to_local() if is_cut(parameter) else parameter  # type: ignore[attr-defined]
            setattr(module, name, nn.Parameter(local.detach(), requires_grad=False))
