"""`coterie bench train`: a whole training step (forward, backward, fused AdamW) beside transformers' Mixtral.

Both start from the same weights and see the same tokens; loss and gradient norm must agree before anything is timed.
The limit is the matrix rate of this machine over the model's operations per token: a step of nothing but GEMMs.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import cpu_gemm
from ..models.config import ModelConfig
from ..models.gpt import GPT
from ..models.params import count_params, flops_per_token
from ..moe.config import GateConfig, MoEConfig
from ..parallel.launch import keep_freed_memory
from .rows import Row, show, write
from .timing import interleaved, median_and_spread, ratios

BENCH = "train"
PARTS = ("forward", "backward", "optimizer")
PEERS = {"hf_eager": "eager", "hf_grouped_mm": "grouped_mm"}


@dataclass(frozen=True)
class Case:
    """One model and batch; the head is not tied, the router losses are off on both sides."""

    layers: int
    dim: int
    hidden: int
    experts: int
    vocab: int
    batch: int
    sequence: int
    dtype: torch.dtype
    device: str = "cpu"

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(
            vocab_size=self.vocab,
            max_positions=self.sequence,
            layers=self.layers,
            dim=self.dim,
            heads=self.dim // 64,
            kv_heads=self.dim // 128,
            hidden=self.hidden,
            tied_head=False,
            experts=(self.experts,) * self.layers,
            moe=MoEConfig(top_k=2, hidden=self.hidden, gate=GateConfig(aux_weight=0.0)),
        )

    @property
    def name(self) -> str:
        kind = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]
        millions = round(count_params(self.config).total / 1e6)
        shape = f"L{self.layers} d{self.dim} F{self.hidden} E{self.experts} k2 V{self.vocab}"
        return f"{kind} {millions}M {shape} B{self.batch} S{self.sequence}"


CPU_CASES = tuple(
    Case(4, 256, 512, 8, vocab, 8, 256, dtype) for vocab in (4096, 50257) for dtype in (torch.float32, torch.bfloat16)
)
GPU_CASES = (
    Case(8, 1024, 1024, 16, 32000, 8, 1024, torch.bfloat16, "cuda"),
    Case(8, 1024, 512, 64, 32000, 8, 1024, torch.bfloat16, "cuda"),
)


@dataclass
class Step:
    """A model with its optimizer; a call is one training step, whose parts are noted where no device runs ahead."""

    model: nn.Module
    loss: Callable[[Tensor], Tensor]
    batches: Iterator[Tensor]
    seconds: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def __call__(self) -> None:
        stamps = [time.perf_counter()]
        loss = self.loss(next(self.batches))
        stamps.append(time.perf_counter())
        loss.backward()
        stamps.append(time.perf_counter())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        stamps.append(time.perf_counter())
        for part, start, end in zip(PARTS, stamps, stamps[1:], strict=False):
            self.seconds[part].append(end - start)


def main(json: str | Path | None = None, quick: bool = False, threads: int | None = None) -> list[Row]:
    """Measures all cases of this machine, shows the table, and writes the rows to `json`.

    quick: the small vocabulary and few repeats.
    """
    keep_freed_memory()  # as training does; for the peer too
    if threads is not None:
        torch.set_num_threads(threads)
    cases = GPU_CASES if torch.cuda.is_available() else CPU_CASES
    rows: list[Row] = []
    for case in cases[: max(len(cases) // 2, 1)] if quick else cases:
        rows += measure(case, repeats=5 if quick else 11)
        if json is not None:
            write(rows, json)
    show([row for row in rows if row.metric not in PARTS])
    return rows


def measure(case: Case, repeats: int) -> list[Row]:
    """The rows of one case. Without transformers, coterie alone is measured."""
    check(case)
    steps = build(case)
    timed = interleaved(steps, repeats, case.device)
    tokens = case.batch * case.sequence
    limit = matrix_rate(case) / flops_per_token(case.config, case.sequence)
    rows: list[Row] = []
    for name, values in timed.items():
        value, spread = median_and_spread([tokens / v for v in values])
        rows.append(Row(BENCH, case.name, name, "throughput", value, "tokens/s", spread, limit, value / limit))
        if case.device == "cpu":
            for part, parts in steps[name].seconds.items():
                value, spread = median_and_spread([1e3 * v for v in parts[-repeats:]])
                rows.append(Row(BENCH, case.name, name, part, value, "ms", spread))
    for name in [name for name in timed if name != "coterie"]:
        value, spread = median_and_spread(ratios(timed[name], timed["coterie"]))
        rows.append(Row(BENCH, case.name, "coterie", f"speed_over_{name}", value, "x", spread))
    if case.device == "cuda":
        rows += [Row(BENCH, case.name, n, "peak_memory", _peak(s) / 2**20, "MiB") for n, s in steps.items()]
    del steps
    gc.collect()
    return rows


def build(case: Case) -> dict[str, Step]:
    """coterie and every peer that can be imported, with equal weights and equal batches."""
    model = GPT(case.config, device=case.device, dtype=case.dtype)
    model.init_weights(0)
    with torch.no_grad():
        for moe in model.moe_layers:
            moe.gate.weight.copy_(_skewed_router(case))
    steps = {"coterie": Step(model, lambda tokens: coterie_loss(model, tokens), _batches(case))}
    for name, experts in PEERS.items():
        try:
            peer = mixtral(case, experts)
        except ImportError:
            print(f"{case.name}: without {name}: transformers is not installed (pip install 'coterie[hf]')")
            break
        copy_weights(model, peer)
        steps[name] = Step(peer, _peer_loss(peer), _batches(case))
    return steps


def coterie_loss(model: nn.Module, tokens_BS: Tensor) -> Tensor:
    """Mean cross-entropy of each next token."""
    targets_BS = torch.full_like(tokens_BS, -100)
    targets_BS[:, :-1] = tokens_BS[:, 1:]
    return model(tokens_BS, targets_BS=targets_BS).lm / (tokens_BS.shape[0] * (tokens_BS.shape[1] - 1))


def _peer_loss(model: Any) -> Callable[[Tensor], Tensor]:
    return lambda tokens_BS: model(input_ids=tokens_BS, labels=tokens_BS).loss


def mixtral(case: Case, experts: str) -> nn.Module:
    """transformers' Mixtral of the same shape; its attention is torch's, as ours."""
    from transformers import MixtralConfig, MixtralForCausalLM

    ours = case.config
    config = MixtralConfig(
        vocab_size=ours.vocab_size,
        hidden_size=ours.dim,
        num_hidden_layers=ours.layers,
        num_attention_heads=ours.heads,
        num_key_value_heads=ours.num_kv_heads,
        head_dim=ours.width_per_head,
        intermediate_size=ours.expert_hidden,
        num_local_experts=case.experts,
        num_experts_per_tok=ours.moe.top_k,
        max_position_embeddings=ours.max_positions,
        rms_norm_eps=ours.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": ours.rope_theta},
        router_jitter_noise=0.0,
        sliding_window=None,
        tie_word_embeddings=False,
        use_cache=False,
    )
    kind: Any = MixtralForCausalLM
    return kind._from_config(config, dtype=case.dtype, experts_implementation=experts).to(case.device).train()


@torch.no_grad()
def copy_weights(model: GPT, peer: nn.Module) -> None:
    """Gives the peer coterie's weights; every parameter of the peer must be met."""
    ours = dict(model.named_parameters())
    values: dict[str, Tensor] = {
        "model.embed_tokens.weight": ours["embed.weight"],
        "model.norm.weight": ours["final_norm.weight"],
        "lm_head.weight": ours["head.weight"],
    }
    names = {
        "self_attn.o_proj.weight": "attention.out.weight",
        "input_layernorm.weight": "attention_norm.weight",
        "post_attention_layernorm.weight": "mlp_norm.weight",
        "mlp.gate.weight": "moe.gate.weight",
        "mlp.experts.gate_up_proj": "moe.experts.w_in",
        "mlp.experts.down_proj": "moe.experts.w_out",
    }
    for layer in range(model.config.layers):
        values |= {f"model.layers.{layer}.{their}": ours[f"blocks.{layer}.{our}"] for their, our in names.items()}
        parts = ours[f"blocks.{layer}.attention.q.weight"], *ours[f"blocks.{layer}.attention.kv.weight"]
        for part, value in zip("qkv", parts, strict=True):
            values[f"model.layers.{layer}.self_attn.{part}_proj.weight"] = value
    for name, parameter in peer.named_parameters():
        parameter.copy_(values.pop(name).reshape(parameter.shape))
    if values:
        raise ValueError(f"the peer has no {', '.join(values)}")


def _skewed_router(case: Case) -> Tensor:
    """Rows of unequal length: some experts are asked more often, as in early training."""
    generator = torch.Generator().manual_seed(0)
    lengths_E = torch.linspace(-0.5, 0.5, case.experts).exp()[torch.randperm(case.experts, generator=generator)]
    return torch.randn(case.experts, case.dim, generator=generator) * (1.5 * case.dim**-0.5) * lengths_E[:, None]


def _batches(case: Case) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    while True:
        tokens_BS = torch.randint(0, case.vocab, (case.batch, case.sequence), generator=generator)
        yield tokens_BS.to(case.device)


def check(case: Case) -> None:
    """Compares first loss and gradient norm with each peer's, at an eighth of the batch.

    Raises:
        ValueError: they differ by more than rounding.
    """
    small = Case(**{**vars(case), "batch": max(case.batch // 8, 1)})
    expected: tuple[float, float] | None = None
    for name, step in build(small).items():
        loss = step.loss(next(step.batches))
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in step.model.parameters() if p.grad is not None])
        got = float(loss.detach()), float(norm)
        expected = expected or got
        loss_bound, norm_bound = (1e-5, 1e-3) if case.dtype == torch.float32 else (2e-3, 5e-2)
        if abs(got[0] / expected[0] - 1) > loss_bound or abs(got[1] / expected[1] - 1) > norm_bound:
            raise ValueError(f"{case.name}: {name} has loss and gradient norm {got}, coterie has {expected}")


def matrix_rate(case: Case) -> float:
    """Operations per second of a large square product in the case's dtype."""
    size = 8192 if case.device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=case.device).to(case.dtype) for _ in range(2))
    out = torch.empty_like(a)
    # On a CPU torch.mm is not always torch's fastest product.
    run = (lambda: torch.mm(a, b, out=out)) if case.device == "cuda" else (lambda: cpu_gemm.matmul(a, b, out))
    seconds = interleaved({"mm": run}, 5, case.device)["mm"]
    return 2 * size**3 / statistics.median(seconds)


def _peak(step: Step) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time a training step beside transformers' Mixtral.")
    parser.add_argument("--json", type=Path, help="write the tidy rows here")
    parser.add_argument("--quick", action="store_true", help="the small vocabulary, few repeats")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    arguments = parser.parse_args()
    main(arguments.json, arguments.quick, arguments.threads)
