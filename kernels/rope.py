"""Rotary position embedding (arXiv 2104.09864) in the half-split convention of GPT-NeoX and Hugging Face.

Shapes: B batch, S sequence, H heads, d head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from ctypes import c_int, c_long, c_void_p

import torch
from torch import Tensor

from . import native
from .backend import choose, jit, on_device, tl, triton


def rope_table(
    positions: Tensor, head_dim: int, theta: float, scale: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of positions * theta^(-2i / head_dim): fp32, shape (*positions.shape, head_dim / 2).

    `scale` makes other rates, in radians per position, of these (head_dim / 2,).
    """
    if head_dim % 2:
        raise ValueError(f"rope needs an even head_dim, got {head_dim}")
    if positions.is_cpu and positions.dtype == torch.int64 and positions.is_contiguous() and native.ready():
        return _table_native(positions, _rates(head_dim, theta, scale))
    power = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    rates = 1.0 / theta**power
    angle = positions[..., None].float() * (rates if scale is None else scale(rates))
    return angle.cos(), angle.sin()


@functools.lru_cache(maxsize=64)
def _rates(head_dim: int, theta: float, scale: Callable[[Tensor], Tensor] | None) -> Tensor:
    with torch.inference_mode(False):
        rates = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        return rates if scale is None else scale(rates).contiguous()


def _table_native(positions: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
    half = len(rates)
    cos, sin = rates.new_empty((*positions.shape, half)), rates.new_empty((*positions.shape, half))
    _table_function()(
        positions.data_ptr(),
        rates.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        positions.numel(),
        half,
        torch.get_num_threads(),
    )
    return cos, sin


@functools.cache
def _table_function() -> Callable[..., None]:
    return native.function("rope_table", *[c_void_p] * 4, c_long, c_long, c_int)


def rope_reference(x_BSHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rope` in plain torch, differentiated by autograd."""
    wide = torch.promote_types(x_BSHd.dtype, torch.float32)
    first, second = x_BSHd.to(wide).chunk(2, -1)
    cos, sin = cos.to(wide).unsqueeze(-2), sin.to(wide).unsqueeze(-2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x_BSHd.dtype)


def rope(x_BSHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates (x[i], x[i + d/2]) by the angle of position s and frequency i; computed in fp32.

    x_BSHd (B, S, H, d) with any strides; cos and sin (S, d/2) or (B, S, d/2), without gradient. Contiguous output.
    """
    batch, sequence, _, width = x_BSHd.shape
    if cos.shape not in ((sequence, width // 2), (batch, sequence, width // 2)) or sin.shape != cos.shape:
        raise ValueError(f"rope: x {tuple(x_BSHd.shape)} with cos {tuple(cos.shape)} and sin {tuple(sin.shape)}")
    backend = choose(x_BSHd)
    if backend == "reference":
        return rope_reference(x_BSHd, cos, sin)
    if backend == "torch" and not (torch.is_grad_enabled() and x_BSHd.requires_grad):
        return _rotate_torch(x_BSHd, cos, sin, 1)
    return _rope(x_BSHd, cos, sin, False)


def rope_both_(q_BSHd: Tensor, k_BSGd: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rope` of queries and keys that nobody else needs: where inference runs on a CPU they are turned in place."""
    if not (native.ready(q_BSHd, cos, sin) and cos.dtype == sin.dtype == torch.float32 and _alike(q_BSHd, k_BSGd)):
        return rope(q_BSHd, cos, sin), rope(k_BSGd, cos, sin)
    batch, sequence, heads, width = q_BSHd.shape
    if cos.shape not in ((sequence, width // 2), (batch, sequence, width // 2)) or sin.shape != cos.shape:
        raise ValueError(f"rope: q {tuple(q_BSHd.shape)} with cos {tuple(cos.shape)} and sin {tuple(sin.shape)}")
    _functions()[q_BSHd.dtype](
        q_BSHd.data_ptr(),
        k_BSGd.data_ptr(),
        heads * width,
        k_BSGd.stride(1),
        cos.data_ptr(),
        sin.data_ptr(),
        batch * sequence,
        sequence if cos.dim() == 2 else batch * sequence,
        heads,
        k_BSGd.shape[2],
        width // 2,
        torch.get_num_threads(),
    )
    return q_BSHd, k_BSGd


def _alike(q_BSHd: Tensor, k_BSGd: Tensor) -> bool:
    """Whether the keys are of the queries' kind, every token's heads side by side, and all tokens at one distance."""
    batch, sequence, _, width = k_BSGd.shape
    across, along, *inner = k_BSGd.stride()
    if inner != [width, 1] or (batch > 1 and across != sequence * along):
        return False
    return k_BSGd.dtype == q_BSHd.dtype and q_BSHd.shape[::3] == (batch, width) and q_BSHd.shape[1] == sequence


@functools.cache
def _functions() -> dict[torch.dtype, Callable[..., None]]:
    kinds = [c_void_p] * 2 + [c_long] * 2 + [c_void_p] * 2 + [c_long] * 5 + [c_int]
    names = {torch.bfloat16: "rope_bf16", torch.float32: "rope_fp32"}
    return {dtype: native.function(name, *kinds) for dtype, name in names.items()}


def _rotate_torch(x_BSHd: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """Writes both halves of the output directly: four passes, no concatenation."""
    wide = torch.promote_types(x_BSHd.dtype, torch.float32)
    half = x_BSHd.shape[-1] // 2
    x_wide = x_BSHd.to(wide)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    out = torch.empty(x_BSHd.shape, dtype=wide, device=x_BSHd.device)
    first, second = x_wide[..., :half], x_wide[..., half:]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin, value=sign)
    return out.to(x_BSHd.dtype)


@jit
def _rope_kernel(
    x,
    cos,
    sin,
    out,
    S,
    H,
    HALF,
    stride_b,
    stride_s,
    stride_h,
    table_b,
    sign,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a token: all its heads share one row of the tables."""
    token = tl.program_id(0).to(tl.int64)
    b, s = token // S, token % S
    h = tl.arange(0, HEADS)[:, None].to(tl.int64)
    i = tl.arange(0, BLOCK)[None, :]
    keep_row = i < HALF
    keep = (h < H) & keep_row
    c = tl.load(cos + (b * table_b + s) * HALF + i, mask=keep_row, other=0.0).to(tl.float32)
    n = tl.load(sin + (b * table_b + s) * HALF + i, mask=keep_row, other=0.0).to(tl.float32) * sign
    source = x + b * stride_b + s * stride_s + h * stride_h + i
    first = tl.load(source, mask=keep, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=keep, other=0.0).to(tl.float32)
    target = out + (token * H + h) * (2 * HALF) + i
    tl.store(target, (first * c - second * n).to(out.dtype.element_ty), mask=keep)
    tl.store(target + HALF, (second * c + first * n).to(out.dtype.element_ty), mask=keep)


@on_device
def _rotate_triton(x_BSHd: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    if x_BSHd.stride(-1) != 1:
        x_BSHd = x_BSHd.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    batch, sequence, heads, width = x_BSHd.shape
    out = torch.empty(x_BSHd.shape, dtype=x_BSHd.dtype, device=x_BSHd.device)
    if out.numel() == 0:
        return out
    tile = {"HEADS": triton.next_power_of_2(heads), "BLOCK": triton.next_power_of_2(width // 2)}
    _rope_kernel[(batch * sequence,)](
        x_BSHd,
        cos,
        sin,
        out,
        sequence,
        heads,
        width // 2,
        *x_BSHd.stride()[:3],
        sequence if cos.dim() == 3 else 0,
        sign,
        **tile,
        num_warps=min(max(tile["HEADS"] * tile["BLOCK"] // 512, 1), 8),
    )
    return out


@torch.library.custom_op("coterie::rope", mutates_args=())
def _rope(x_BSHd: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    rotate = _rotate_triton if choose(x_BSHd) == "triton" else _rotate_torch
    return rotate(x_BSHd, cos, sin, -1 if inverse else 1)


@_rope.register_fake
def _(x_BSHd: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    return x_BSHd.new_empty(x_BSHd.shape)


def _save_rope(ctx, inputs, output) -> None:
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _differentiate_rope(ctx, dy_BSHd: Tensor):
    # A rotation's transpose is the rotation back.
    return _rope(dy_BSHd, *ctx.saved_tensors, not ctx.inverse), None, None, None


_rope.register_autograd(_differentiate_rope, setup_context=_save_rope)
