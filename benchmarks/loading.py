"""`coterie bench load`: a synthetic Mixtral of 4 GB from disk into a model, beside transformers' `from_pretrained`.

Every load is a process of its own, begins with files that are not in memory (posix_fadvise), and ends with weights
of which each page was written. The limit of a rate is reading the same files in order into one small buffer. A
peak is what the process took over what it had after its imports: mapped pages of files are in it.
"""

from __future__ import annotations

import argparse
import json as json_module
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.tensor_files import Drafts, Head, write_tensors
from .rows import Row, show, write
from .timing import median_and_spread

BENCH = "load"
IMPLS = ("coterie", "transformers")
_FULL = {"hidden_size": 2048, "intermediate_size": 7168, "num_hidden_layers": 5, "vocab_size": 32000}
_QUICK = {"hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 4, "vocab_size": 8000}
_REST: dict[str, Any] = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
_ALLOWED = 200 * 2**20  # bytes over the model and its largest tensor


def main(json: str | Path | None = None, quick: bool = False) -> list[Row]:
    """Makes the checkpoint in a temporary folder, loads it in turns, shows the table and writes it to `json`.

    Args:
        quick: a model of 0.2 GB, few repeats.
    """
    config = _REST | (_QUICK if quick else _FULL)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        heads = make(folder, config)
        taken: dict[str, list[float]] = {impl: [] for impl in ("read", *IMPLS)}
        peaks: dict[str, list[float]] = {impl: [] for impl in IMPLS}
        for _ in range(2 if quick else 5):
            taken["read"].append(_read(folder))
            for impl in IMPLS:
                found = _in_process(folder, impl)
                taken[impl].append(found["seconds"])
                peaks[impl].append(found["peak"])
    total = sum(head.bytes for head in heads.values())
    limit = total + max(head.bytes for head in heads.values()) + _ALLOWED
    rows = _rows(f"Mixtral of {total / 1e9:.2f} GB in bf16", total, limit, taken, peaks)
    show(rows)
    if json is not None:
        write(rows, json)
    return rows


def _rows(
    case: str, total: int, limit: int, taken: dict[str, list[float]], peaks: dict[str, list[float]]
) -> list[Row]:
    allowed = total / statistics.median(taken["read"]) / 1e9
    rows = []
    for impl, seconds in taken.items():
        rate, spread = median_and_spread([total / s / 1e9 for s in seconds])
        rows.append(Row(BENCH, case, impl, "rate", rate, "GB/s", spread, allowed, rate / allowed))
    for impl, found in peaks.items():
        peak = statistics.median(found) / 2**20
        rows.append(Row(BENCH, case, impl, "peak", peak, "MiB", None, limit / 2**20, peak / (limit / 2**20)))
    return rows


def make(folder: Path, config: dict[str, Any]) -> dict[str, Head]:
    """Writes a Mixtral of random numbers with an expert's matrices one by one, as the hub has it."""
    dim, hidden, words = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    keys = dim // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (words, dim), "model.norm.weight": (dim,), "lm_head.weight": (words, dim)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{n}_proj.weight": (r, dim) for n, r in (("q", dim), ("k", keys), ("v", keys))}
        shapes[f"{at}.self_attn.o_proj.weight"] = (dim, dim)
        shapes |= {f"{at}.{n}_layernorm.weight": (dim,) for n in ("input", "post_attention")}
        shapes[f"{at}.block_sparse_moe.gate.weight"] = (config["num_local_experts"], dim)
        for expert in range(config["num_local_experts"]):
            one = f"{at}.block_sparse_moe.experts.{expert}"
            shapes |= {f"{one}.w1.weight": (hidden, dim), f"{one}.w3.weight": (hidden, dim)}
            shapes[f"{one}.w2.weight"] = (dim, hidden)
    heads = {name: Head(torch.bfloat16, shape) for name, shape in shapes.items()}
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    drafts = Drafts(folder)
    drafts.text("config.json", json_module.dumps(config))
    write_tensors(drafts, heads, lambda name: _repeated(noise, heads[name]), file_bytes=2 * 10**9)
    drafts.publish()
    return heads


def _repeated(noise: Tensor, head: Head) -> Iterator[Tensor]:
    left = head.bytes // 2
    while left:
        yield noise[: min(left, len(noise))]
        left -= min(left, len(noise))


def _forget(folder: Path) -> None:
    """Takes the files out of the page cache, where the system allows it."""
    for file in folder.glob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def _read(folder: Path) -> float:
    """Seconds of reading all files in order, 16 MiB at a time."""
    _forget(folder)
    buffer, begin = bytearray(1 << 24), time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    return time.perf_counter() - begin


def _in_process(folder: Path, impl: str) -> dict[str, float]:
    _forget(folder)
    command = [sys.executable, "-m", "coterie.benchmarks.loading", "--load", impl, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{impl} could not load the checkpoint: {done.stderr.strip().splitlines()[-1]}")
    return json_module.loads(done.stdout.splitlines()[-1])


def _load(impl: str, folder: str) -> None:
    """In a process of its own: prints seconds, and bytes at the peak beyond those before."""
    if impl == "coterie":
        from ..models.weights import load_model as load
    else:
        from transformers import MixtralForCausalLM, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()

        def load(directory: str) -> Any:
            return MixtralForCausalLM.from_pretrained(directory, dtype="auto")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    model = load(folder)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    # Weights that are still pages of the file are read here, so that all loads have done the same.
    begin = time.perf_counter()
    for parameter in model.parameters():
        parameter.detach().flatten()[::2048].sum()
    seconds += time.perf_counter() - begin
    peak = max(peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    print(json_module.dumps({"seconds": seconds, "peak": peak * (1 if sys.platform == "darwin" else 1024)}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Load a 4 GB Mixtral, beside transformers.")
    parser.add_argument("--json", type=Path, help="write the tidy rows here")
    parser.add_argument("--quick", action="store_true", help="a small model, few repeats")
    parser.add_argument("--load", nargs=2, metavar=("IMPL", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        _load(*arguments.load)
    else:
        main(arguments.json, arguments.quick)
