"""The commands of `coterie` that take a model: they write text, or another directory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

Text = tyro.conf.Positional


def generate(
    model: Text[Path],
    prompt: str,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    greedy: bool = False,
    seed: int = 0,
    device: str = "",
) -> None:
    """Continue a prompt with a model directory's or a run's model.

    Args:
        model: A directory of a model, ours or Hugging Face's (config.json, safetensors, tokenizer.json), or of a run.
        prompt: The text to continue; - reads standard input.
        max_new_tokens: How many tokens to write at most.
        temperature: Of the softmax; lower is safer.
        top_k: Sample among the k likeliest tokens; 0: all.
        top_p: Sample among the likeliest tokens that hold this much probability.
        greedy: Always take the likeliest token.
        seed: The same seed gives the same text.
        device: cpu or cuda; empty picks cuda when there is one.
    """
    from .infer.pipeline import stream_text

    text = sys.stdin.read() if prompt == "-" else prompt
    options = {"temperature": 0.0 if greedy else temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    pieces = stream_text(model, text, max_new_tokens=max_new_tokens, device=device or None, **options)
    print(text, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def convert(
    source: Text[Path],
    output: Text[Path],
    to: Literal["coterie", "hf"] = "coterie",
    from_: Annotated[Literal["any", "deepspeed"], tyro.conf.arg(name="from")] = "any",
    dtype: Literal["keep", "float32", "bfloat16"] = "keep",
    max_file_size: str = "5GB",
    force: bool = False,
    heads: int | None = None,
    kv_heads: int | None = None,
    top_k: int | None = None,
    qkv: Literal["grouped", "split", "last"] | None = None,
    tanh_gelu: bool = False,
) -> None:
    """Turn a model of Hugging Face's layout into one of ours, or ours into one that transformers opens.

    Args:
        source: A model directory of either kind, hf://org/name[@revision], a run directory or a checkpoint.
        output: The model directory to make.
        to: coterie, or hf: the architecture of transformers that computes the same, if there is one.
        from_: deepspeed: SOURCE is a training checkpoint of Megatron-DeepSpeed. any: all else, told by its files.
        dtype: Of the matrices; routers stay in float32. keep: every tensor as it is stored.
        max_file_size: A larger model becomes several files: 5GB, 500MB, 2GiB.
        force: Replace the model that is there.
        heads: Of a DeepSpeed checkpoint that does not say it, as the next four.
        kv_heads: Key and value heads.
        top_k: Experts that a token visits.
        qkv: How the rows of query_key_value lie.
        tanh_gelu: Take the tanh form of gelu for the exact one.
    """
    from .models.deepspeed_config import Hints
    from .models.write import how_to_open
    from .train.convert import convert as run

    hints = Hints(heads, kv_heads, top_k, qkv, tanh_gelu)
    if from_ == "any" and hints != Hints():
        raise ValueError("--heads, --kv-heads, --top-k, --qkv and --tanh-gelu are for --from deepspeed alone")
    deepspeed = hints if from_ == "deepspeed" else None
    run(source, output, to=to, dtype=dtype, max_file_size=max_file_size, force=force, deepspeed=deepspeed)
    print(output if to == "coterie" else how_to_open(output))


def export(
    source: Text[Path],
    output: Text[Path],
    to: Literal["coterie", "hf"] = "coterie",
    dtype: Literal["keep", "float32", "bfloat16"] = "keep",
    max_file_size: str = "5GB",
    step: int | None = None,
    force: bool = False,
) -> None:
    """Turn a run's checkpoint, written on any number of ranks, into a model directory.

    Args:
        source: A run directory or one checkpoint in it.
        output: The model directory to make: config.json, safetensors files, tokenizer.json.
        to: coterie, or hf: the architecture of transformers that computes the same, if there is one.
        dtype: Of the matrices; routers stay in float32.
        max_file_size: A larger model becomes several files: 5GB, 500MB, 2GiB.
        step: Which checkpoint of a run; the newest whole one if not given.
        force: Replace the model that is there.
    """
    from .models.write import how_to_open
    from .train.export import export as run

    run(source, output, to=to, dtype=dtype, max_file_size=max_file_size, step=step, force=force)
    print(output if to == "coterie" else how_to_open(output))


def upcycle(
    dense: Text[Path],
    output: Text[Path],
    experts: str,
    top_k: int = 2,
    granularity: int = 1,
    every: int = 1,
    layers: tuple[int, ...] = (),
    shared: int = 0,
    shared_gate: bool = False,
    residual: bool = False,
    score: Literal["softmax", "sigmoid"] = "softmax",
    renormalize: Literal["none", "before_drop", "after_drop"] = "before_drop",
    bias_update: float = 0.0,
    router_std: float = 0.02,
    noise: float = 0.0,
    seed: int = 1234,
    dtype: Literal["keep", "float32", "bfloat16"] = "keep",
    max_file_size: str = "5GB",
    force: bool = False,
) -> None:
    """Turn a dense model into a MoE that says the same, to go on training from: see docs/upcycling.md.

    Args:
        dense: A dense model's directory, ours or one in the layout of Hugging Face.
        output: The model directory to make.
        experts: Of every MoE layer, or a list: 8, or 8x10,16x2, or 0,8,0,16 (0 stays dense).
        top_k: Experts that a token visits: a multiple of the slices that are not shared.
        granularity: Slices that the dense width is cut into; an expert is as wide as one.
        every: Only each so-many-th layer becomes a MoE layer.
        layers: Only these layers do, counted from 0.
        shared: Slices that become one shared expert.
        shared_gate: Put a gate on the shared expert.
        residual: PR-MoE: keep the dense layer beside the experts; needs granularity 1.
        score: Of the router.
        renormalize: Let a token's weights sum to one; none keeps the function with --router-std 0 alone.
        bias_update: Balance by a bias of the choice, with steps of this size.
        router_std: Of the router's initial rows.
        noise: Multiply each weight of an expert by 1 + noise * normal; more than 0 does not keep the function.
        seed: Of the router and the noise.
        dtype: Of the matrices; routers stay in float32.
        max_file_size: A larger model becomes several files: 5GB, 500MB, 2GiB.
        force: Replace the model that is there.
    """
    from .models.hub import resolve
    from .models.upcycle import Upcycling, experts_of_layers
    from .models.weights import read_config
    from .moe.config import GateConfig
    from .train.upcycle import upcycle as run

    dense = resolve(dense)
    counts = experts_of_layers(experts, read_config(dense).layers, every, layers)
    gate = GateConfig(score=score, renormalize=renormalize, bias_update=bias_update)
    how = Upcycling(counts, top_k, granularity, shared, shared_gate, residual, gate, router_std, noise, seed)
    print(f"{output}: {run(dense, output, how, dtype=dtype, max_file_size=max_file_size, force=force)}")
