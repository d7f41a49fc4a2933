"""From a dense model's directory to that of a MoE which says the same, tensor by tensor."""

from __future__ import annotations

from pathlib import Path

from ..models.config import ModelConfig
from ..models.hub import resolve
from ..models.params import count_params
from ..models.upcycle import Upcycled, Upcycling, difference
from ..models.write import Width, model_of, ordered, write


def upcycle(
    source: str | Path,
    output: str | Path,
    how: Upcycling,
    *,
    dtype: Width = "keep",
    max_file_size: str = "5GB",
    force: bool = False,
) -> str:
    """Writes the MoE's directory; returns a sentence: what it is, and whether it says what the dense model says.

    Args:
        source: a dense model's directory, ours or one in the layout of Hugging Face.
        output: a new or an empty directory.
        dtype: of the matrices; the routers are in fp32.
        max_file_size: as `parse_bytes` reads it.
        force: replace the model that `output` holds.

    Raises:
        ValueError, FileNotFoundError: what was given does not fit; nothing is written.
        OSError: the disk is full; `output` is as it was.
    """
    source, output = resolve(source), Path(output)
    order = ordered("coterie", dtype, max_file_size, output, force)
    dense = model_of(source)
    view = Upcycled(dense.config, dense.tensors, how)
    write(output, dense._replace(config=view.config, tensors=view), order)
    return describe(dense.config, view.config, how)


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
