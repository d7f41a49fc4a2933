"""One MoE layer from coterie and from others, all with the same router and the same experts, and the dense limit.

Shapes: T tokens, D model, E experts, F expert hidden, N = 2F.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..moe.config import GateConfig, MoEConfig
from ..moe.layer import MoE


@dataclass(frozen=True)
class Case:
    """One layer to measure: SwiGLU experts, dropless, weights of the k chosen ones summing to one."""

    tokens: int
    dim: int
    hidden: int
    experts: int
    top_k: int
    dtype: torch.dtype
    device: str = "cpu"

    @property
    def name(self) -> str:
        kind = str(self.dtype).removeprefix("torch.").replace("float32", "fp32").replace("bfloat16", "bf16")
        return f"{kind} T{self.tokens} d{self.dim} F{self.hidden} E{self.experts} k{self.top_k}"

    def __post_init__(self) -> None:
        if self.top_k < 2:
            raise ValueError("with top_k=1 the peers disagree on the weight of the one expert: give 2 or more")


class Weights(NamedTuple):
    router_ED: Tensor
    w_in_END: Tensor
    w_out_EDF: Tensor


class Layer(NamedTuple):
    """What is timed: (T, D) -> (T, D), and the parameters whose gradients it computes."""

    run: Callable[[Tensor], Tensor]
    module: nn.Module


def make_inputs(case: Case, seed: int = 0) -> tuple[Tensor, Weights]:
    """Tokens with a common direction and router rows of unequal length: a load as skewed as in early training."""
    generator = torch.Generator(case.device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=case.device)

    lengths_E = torch.linspace(-0.5, 0.5, case.experts, device=case.device).exp()
    lengths_E = lengths_E[torch.randperm(case.experts, generator=generator, device=case.device)]
    router_ED = normal(case.experts, case.dim) * (1.5 / math.sqrt(case.dim)) * lengths_E[:, None]
    x_TD = normal(case.tokens, case.dim) + 0.3 * normal(case.dim)
    w_in_END = torch.empty(case.experts, 2 * case.hidden, case.dim, dtype=case.dtype, device=case.device)
    w_out_EDF = torch.empty(case.experts, case.dim, case.hidden, dtype=case.dtype, device=case.device)
    for weight in (w_in_END, w_out_EDF):
        weight.normal_(std=weight.shape[-1] ** -0.5, generator=generator)
    return x_TD.to(case.dtype), Weights(router_ED, w_in_END, w_out_EDF)


class _Dense(nn.Module):
    def __init__(self, dim: int, hidden: int, **at: Any) -> None:
        super().__init__()
        self.w_in = nn.Linear(dim, 2 * hidden, bias=False, **at)
        self.w_out = nn.Linear(hidden, dim, bias=False, **at)

    def forward(self, x_TD: Tensor) -> Tensor:
        gate, up = self.w_in(x_TD).chunk(2, -1)
        return self.w_out(F.silu(gate) * up)


def dense(case: Case, weights: Weights) -> Layer:
    """The limit: one SwiGLU network of k times the width, the same multiplications for every token."""
    module = _Dense(case.dim, case.top_k * case.hidden, dtype=case.dtype, device=case.device)
    return Layer(module, module)


def coterie(case: Case, weights: Weights) -> Layer:
    """This package's layer, by its defaults."""
    config = MoEConfig(top_k=case.top_k, hidden=case.hidden, gate=GateConfig(aux_weight=0.0))
    module = MoE(case.dim, case.experts, config, device=case.device, dtype=case.dtype)
    _copy((module.gate.weight, module.experts.w_in, module.experts.w_out), weights)
    return Layer(lambda x_TD: module(x_TD[None]).y[0], module)


class _Loop(nn.Module):
    def __init__(self, case: Case, weights: Weights) -> None:
        super().__init__()
        self.top_k = case.top_k
        self.router = nn.Parameter(weights.router_ED.clone())
        self.w_in = nn.Parameter(weights.w_in_END.clone())
        self.w_out = nn.Parameter(weights.w_out_EDF.clone())

    def forward(self, x_TD: Tensor) -> Tensor:
        scores_TK, ids_TK = (x_TD.float() @ self.router.t()).topk(self.top_k)
        weights_TK = scores_TK.softmax(-1).to(x_TD.dtype)
        y_TD = torch.zeros_like(x_TD)
        for expert, (w_in, w_out) in enumerate(zip(self.w_in.unbind(), self.w_out.unbind(), strict=True)):
            token, choice = (ids_TK == expert).nonzero(as_tuple=True)
            gate, up = F.linear(x_TD[token], w_in).chunk(2, -1)
            out = F.linear(F.silu(gate) * up, w_out) * weights_TK[token, choice, None]
            y_TD = y_TD.index_add(0, token, out)
        return y_TD


def loop(case: Case, weights: Weights) -> Layer:
    """What one writes first: a loop over the experts under autograd."""
    module = _Loop(case, weights)
    return Layer(module, module)


def _hf(experts: str) -> Callable[[Case, Weights], Layer]:
    def make(case: Case, weights: Weights) -> Layer:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        config = MixtralConfig(
            hidden_size=case.dim,
            intermediate_size=case.hidden,
            num_local_experts=case.experts,
            num_experts_per_tok=case.top_k,
            router_jitter_noise=0.0,
        )
        config._experts_implementation = experts
        module: Any = MixtralSparseMoeBlock(config).to(case.device, case.dtype)
        _copy((module.gate.weight, module.experts.gate_up_proj, module.experts.down_proj), weights)
        return Layer(lambda x_TD: _first(module(x_TD[None]))[0], module)

    return make


def megatron(case: Case, weights: Weights) -> Layer:
    """megatron-core's MoELayer: local experts one by one, all-gather dispatcher, no balance loss.

    On a CPU two of its names are given from outside: its router moves to `torch.cuda.current_device()`, and
    without Transformer Engine `moe_utils.te_general_gemm` is used but never bound (0.16.1).
    """
    _one_rank(case.device)
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.transformer_config import TransformerConfig

    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # type: ignore[attr-defined]
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=case.dim,
        num_attention_heads=8,
        ffn_hidden_size=case.hidden,
        moe_ffn_hidden_size=case.hidden,
        num_moe_experts=case.experts,
        moe_router_topk=case.top_k,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="allgather",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        params_dtype=case.dtype,
        bf16=case.dtype == torch.bfloat16,
    )
    spec: Any = get_gpt_layer_local_spec(num_experts=case.experts, moe_grouped_gemm=False)
    module: Any = MoELayer(config, spec.submodules.mlp.submodules).to(case.device)
    _copy((module.router.weight,), weights)
    for expert, local in enumerate(module.experts.local_experts):
        _copy((local.linear_fc1.weight, local.linear_fc2.weight), (weights[1][expert], weights[2][expert]))
    return Layer(lambda x_TD: _first(module(x_TD[:, None]))[:, 0], module)


def deepspeed(case: Case, weights: Weights) -> Layer:
    """DeepSpeed's MoE layer without drops: every expert is padded to the fullest."""
    os.environ.setdefault("DS_ACCELERATOR", case.device)
    _one_rank(case.device)
    import deepspeed as package  # type: ignore[import-not-found]
    from deepspeed.moe.layer import MoE as Peer  # type: ignore[import-not-found]

    package.init_distributed(dist.get_backend())
    expert = _Dense(case.dim, case.hidden, dtype=case.dtype, device=case.device)
    module: Any = Peer(
        case.dim,
        expert,
        num_experts=case.experts,
        k=case.top_k,
        drop_tokens=False,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    ).to(case.device)
    module.set_deepspeed_parallelism()
    _copy((module.deepspeed_moe.gate.wg.weight,), weights)
    for index, local in enumerate(module.deepspeed_moe.experts.deepspeed_experts):
        _copy((local.w_in.weight, local.w_out.weight), (weights[1][index], weights[2][index]))
    return Layer(lambda x_TD: module(x_TD[None])[0][0], module)


LIMIT = "dense"
MAKERS: dict[str, Callable[[Case, Weights], Layer]] = {
    LIMIT: dense,
    "coterie": coterie,
    "loop": loop,
    "hf_grouped_mm": _hf("grouped_mm"),
    "hf_eager": _hf("eager"),
    "megatron": megatron,
    "deepspeed": deepspeed,
}


def disagreement(name: str, case: Case, tokens: int = 256) -> float:
    """The share of tokens whose answer in fp32 is not that of a plain loop over the experts."""
    small = replace(case, tokens=min(tokens, case.tokens), dtype=torch.float32)
    x_TD, weights = make_inputs(small)
    with torch.no_grad():
        expected_TD = loop(small, weights).run(x_TD)
        error_TD = MAKERS[name](small, weights).run(x_TD) - expected_TD
    return float((error_TD.norm(dim=1) > 1e-3 * expected_TD.norm(dim=1)).float().mean())


def _copy(parameters: tuple[Any, ...], values: tuple[Tensor, ...]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=False):
            parameter.copy_(value.reshape(parameter.shape))


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _one_rank(device: str) -> None:
    if not dist.is_initialized():
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=0, world_size=1)
