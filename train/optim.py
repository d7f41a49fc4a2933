"""AdamW over local and sharded parameters, the learning rate by tokens, and the one true gradient norm."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from .config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW; decay on matrices only. State of every parameter exists from the start, so that a checkpoint
    can be read into it.

    A group holds parameters of one mesh: fused updates take no mixture of meshes.
    """
    groups: dict[tuple, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = _is_matrix(name, parameter)
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault((decays, mesh), []).append(parameter)
    if not groups:
        raise ValueError("the model has no parameter to train")
    optimizer = torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": config.weight_decay if decays else 0.0}
            for (decays, _), parameters in groups.items()
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    for parameters in groups.values():
        for parameter in parameters:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer


def _is_matrix(name: str, parameter: Tensor) -> bool:
    """Stacked experts keep their biases as (E, N): by shape a matrix, by meaning a vector."""
    return parameter.dim() >= 2 and not name.rpartition(".")[2].startswith(("b_", "bias"))


def learning_rate(config: OptimConfig, tokens: int, total_tokens: int) -> float:
    """The rate after `tokens` of `total_tokens` (all of the run's, padding included)."""
    end = config.decay_tokens or total_tokens
    warmup = min(config.warmup_tokens, end)
    if tokens < warmup:
        return config.lr * tokens / warmup
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        cooldown = config.cooldown_tokens or end // 10
        start = max(end - cooldown, warmup)
        progress = (tokens - start) / max(end - start, 1)
        return config.lr + (config.min_lr - config.lr) * min(max(progress, 0.0), 1.0)
    progress = min((tokens - warmup) / max(end - warmup, 1), 1.0)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


@torch.no_grad()
def local_square_sum(parameters: Iterable[nn.Parameter], world: int) -> Tensor:
    """This rank's part of the squared global gradient norm: summed over all `world` ranks it counts every logical
    parameter once. fp64 scalar on the gradients' device.

    A shard belongs to one rank. What several ranks hold alike (plain tensors, Replicate on a mesh dimension, ranks
    outside the mesh) is divided by the number of its copies.
    """
    parts: dict[int, list[Tensor]] = {}
    for parameter in parameters:
        grad = parameter.grad
        if grad is None:
            continue
        copies = world
        if isinstance(grad, DTensor):
            mesh, placements = grad.device_mesh, grad.placements
            copies = math.prod(mesh.size(i) for i, p in enumerate(placements) if isinstance(p, Replicate))
            copies *= world // mesh.size()
            grad = grad.to_local()
        if grad.numel():
            parts.setdefault(copies, []).append(grad)
    total: Tensor | None = None
    for copies, grads in parts.items():
        norms = torch.stack(torch._foreach_norm(grads)).double()  # pyright: ignore[reportPrivateImportUsage]
        part = norms.square().sum() / copies
        total = part if total is None else total + part
    return torch.zeros((), dtype=torch.float64) if total is None else total


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiplies every gradient in place."""
    grads = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in parameters if p.grad is not None]
    grads = [g for g in grads if g.numel()]
    if grads:
        torch._foreach_mul_(grads, factor)  # pyright: ignore[reportPrivateImportUsage]
