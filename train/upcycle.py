"""From a dense model's directory to that of a MoE which says the same, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from ..models.config import ModelConfig
from ..models.files import TOKENIZER_BYTES, open_checked
from ..models.params import count_params
from ..models.parts import pieces
from ..models.tensor_files import Drafts, Head, write_tensors
from ..models.upcycle import Upcycled, Upcycling, difference
from ..models.weights import begin_model, open_model, stored_dtype
from .export import check_output, parse_bytes

CARRIED = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template", "generation_config")
"""Files beside a model that are taken along unchanged, by the beginning of their names."""


def upcycle(
    source: str | Path,
    output: str | Path,
    how: Upcycling,
    *,
    dtype: Literal["keep", "float32", "bfloat16"] = "keep",
    max_file_size: str = "5GB",
    force: bool = False,
) -> str:
    """Writes the MoE's directory; returns a sentence: what it is, and whether it says what the dense model says.

    Args:
        source: a dense model's directory, ours or one in the layout of Hugging Face.
        output: a new or an empty directory.
        dtype: of the matrices; the routers are in fp32.
        max_file_size: as `train.export.parse_bytes` reads it.
        force: replace the model that `output` holds.

    Raises:
        ValueError, FileNotFoundError: what was given does not fit; nothing is written.
        OSError: the disk is full; `output` is as it was.
    """
    source, output = Path(source), Path(output)
    limit = parse_bytes(max_file_size)
    if dtype not in ("keep", "float32", "bfloat16"):
        raise ValueError(f"dtype {dtype!r} is not one of keep, float32, bfloat16")
    check_output(output, force)
    config, dense = open_model(source)
    view = Upcycled(config, dense, how)
    kind = None if dtype == "keep" else getattr(torch, dtype)
    heads = {
        name: Head(view.dtype(name) if kind is None else stored_dtype(name, kind), view.shape(name))
        for name in view.names()
    }
    drafts = begin_model(output, view.config, None)
    try:
        _carry(source, drafts)
        write_tensors(drafts, heads, lambda name: pieces(view, name), limit)
    except BaseException:
        drafts.discard()
        raise
    drafts.publish()
    return describe(config, view.config, how)


def _carry(source: Path, drafts: Drafts) -> None:
    for file in sorted(source.iterdir()):
        if file.name.startswith(CARRIED) and file.suffix in (".json", ".jinja", ".txt"):
            with open_checked(file, TOKENIZER_BYTES) as opened:
                drafts.text(file.name, opened.read().decode("utf-8"))


def describe(dense: ModelConfig, moe: ModelConfig, how: Upcycling) -> str:
    """One sentence: layers, experts, sizes, and how the logits differ."""
    layers = sum(count > 0 for count in moe.experts)
    experts = "-".join(str(count) for count in sorted({count for count in moe.experts if count}))
    beside = f", a shared expert of width {moe.moe.shared_hidden}" if how.shared else ""
    beside += ", the dense layer" if how.residual else ""
    before, after = count_params(dense), count_params(moe)
    why = difference(how)
    return (
        f"{layers} of {moe.layers} layers have {experts} experts of width {moe.expert_hidden}{beside}; "
        f"a token visits {moe.moe.top_k}. {before.total / 1e6:,.1f}M parameters became {after.total / 1e6:,.1f}M, "
        f"of which {after.activated / 1e6:,.1f}M are activated. The logits are "
        + (f"not exactly those of the dense model: {why}" if why else "those of the dense model, up to rounding")
    )
