"""Root-mean-square norm (arXiv 1910.07467), alone and with the residual sum before it; computed in fp32.

Shapes: T tokens (all leading axes of x), D model, P programs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import norm_native
from .backend import choose, jit, on_device, tl, triton


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in plain torch, differentiated by autograd."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide = x.to(wide)
    scale = (x_wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (x_wide * scale * weight.to(wide)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis; x (..., D), weight (D,), y like x."""
    if norm_native.ready(x, weight):
        return norm_native.norm(x, weight, eps)
    _check(x, weight)
    backend = choose(x, weight)
    if backend == "reference":
        return rms_norm_reference(x, weight, eps)
    if backend == "torch" and not _needs_grad(x, weight):
        return _forward_torch(x, weight, eps)[0]  # decoding: no operator's overhead
    return _norm(x, weight, eps)[0]


def rms_norm_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns (rms_norm(h), h) of h = x + residual; both (..., D) of one dtype."""
    if norm_native.ready(x, weight, residual=residual):
        return norm_native.norm_add(x, residual, weight, eps)
    _check(x, weight)
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(
            f"rms_norm_add: x is {tuple(x.shape)} {x.dtype}, residual {tuple(residual.shape)} {residual.dtype}"
        )
    backend = choose(x, weight)
    if backend == "reference":
        h = x + residual
        return rms_norm_reference(h, weight, eps), h
    if backend == "torch" and not _needs_grad(x, residual, weight):
        h = x + residual
        return _forward_torch(h, weight, eps)[0], h
    y, h, _ = _norm_add(x, residual, weight, eps)
    return y, h


def _check(x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}")


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _forward_torch(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y and the reciprocal root mean square (..., 1), in the fewest passes that eager torch allows."""
    x_wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(x_wide, dim=-1, keepdim=True)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x_wide * scale).mul_(weight).to(x.dtype), scale


def _backward_torch(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """dx = s (dy w - x s^2 mean(dy w x)) and dw = sum_t s_t dy_t x_t, s being the saved scale."""
    dim = x.shape[-1]
    wide = scale.dtype
    x_TD, dy_TD, w_D = x.reshape(-1, dim).to(wide), dy.reshape(-1, dim).to(wide), weight.to(wide)
    scale_T = scale.reshape(-1)
    product_TD = dy_TD * x_TD
    dw_D = scale_T @ product_TD
    along_T = (product_TD @ w_D).mul_(scale_T.pow(3)).div_(dim)
    dx_TD = torch.mul(dy_TD, w_D, out=product_TD)
    dx_TD.mul_(scale_T[:, None]).addcmul_(x_TD, along_T[:, None], value=-1)
    return dx_TD.view(x.shape).to(x.dtype), dw_D.to(weight.dtype)


@jit
def _forward_kernel(x, residual, weight, y, h, scale, D, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """One program a row; with ADD the row is x + residual, rounded to h's dtype before it is normed."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    keep = d < D
    v = tl.load(x + row * D + d, mask=keep, other=0.0).to(tl.float32)
    if ADD:
        v += tl.load(residual + row * D + d, mask=keep, other=0.0).to(tl.float32)
        v = v.to(h.dtype.element_ty)
        tl.store(h + row * D + d, v, mask=keep)
        v = v.to(tl.float32)
    s = tl.rsqrt(tl.sum(v * v, axis=0) / D + eps)
    tl.store(scale + row, s)
    w = tl.load(weight + d, mask=keep, other=0.0).to(tl.float32)
    tl.store(y + row * D + d, (v * s * w).to(y.dtype.element_ty), mask=keep)


@jit
def _backward_kernel(dy, x, weight, scale, dh, dx, dw, T, D, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """A fixed number of programs walks the rows; each keeps its share of dw in registers."""
    program = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    keep = d < D
    w = tl.load(weight + d, mask=keep, other=0.0).to(tl.float32)
    share = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, T, tl.num_programs(0)):
        at = tl.cast(row, tl.int64) * D + d
        g = tl.load(dy + at, mask=keep, other=0.0).to(tl.float32)
        v = tl.load(x + at, mask=keep, other=0.0).to(tl.float32)
        s = tl.load(scale + row)
        share += g * v * s
        g *= w
        out = s * (g - v * (s * s * tl.sum(g * v, axis=0) / D))
        if ADD:
            out += tl.load(dh + at, mask=keep, other=0.0).to(tl.float32)
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=keep)
    tl.store(dw + tl.cast(program, tl.int64) * D + d, share, mask=keep)


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


@on_device
def _forward_triton(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, h (x itself without a residual) and the scale (..., 1)."""
    x, weight, dim = x.contiguous(), weight.contiguous(), x.shape[-1]
    y = torch.empty_like(x)
    h = x if residual is None else torch.empty_like(x)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(dim)
    if x.numel():
        other = x if residual is None else residual.contiguous()
        _forward_kernel[(x.numel() // dim,)](
            x, other, weight, y, h, scale, dim, eps, ADD=residual is not None, BLOCK=block, num_warps=_warps(block)
        )
    return y, h, scale


@on_device
def _backward_triton(
    dy: Tensor, dh: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    dy, x, weight, dim = dy.contiguous(), x.contiguous(), weight.contiguous(), x.shape[-1]
    rows = x.numel() // dim
    dx = torch.empty_like(x)
    if rows == 0:
        return dx, torch.zeros_like(weight)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    programs = min(rows, 4 * processors)
    shares_PD = torch.empty((programs, dim), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(dim)
    other = dy if dh is None else dh.contiguous()
    _backward_kernel[(programs,)](
        dy,
        x,
        weight,
        scale,
        other,
        dx,
        shares_PD,
        rows,
        dim,
        ADD=dh is not None,
        BLOCK=block,
        num_warps=_warps(block),
    )
    return dx, shares_PD.sum(0).to(weight.dtype)


@torch.library.custom_op("coterie::rms_norm", mutates_args=())
def _norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if choose(x, weight) == "triton":
        y, _, scale = _forward_triton(x, None, weight, eps)
        return y, scale
    return _forward_torch(x.contiguous(), weight, eps)


@torch.library.custom_op("coterie::rms_norm_add", mutates_args=())
def _norm_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    if choose(x, weight) == "triton":
        return _forward_triton(x, residual, weight, eps)
    h = (x + residual).contiguous()
    y, scale = _forward_torch(h, weight, eps)
    return y, h, scale


@torch.library.custom_op("coterie::rms_norm_backward", mutates_args=())
def _norm_backward(dy: Tensor, dh: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    if choose(x, weight) == "triton":
        return _backward_triton(dy, dh, x, weight, scale)
    dx, dw = _backward_torch(dy, x, weight, scale)
    return (dx if dh is None else dx.add_(dh)).contiguous(), dw


def _like(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=wide)


@_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _like(x)


@_norm_add.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return (x.new_empty(x.shape), *_like(x))


@_norm_backward.register_fake
def _(dy: Tensor, dh: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save_norm(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.set_materialize_grads(False)


def _differentiate_norm(ctx, dy: Tensor | None, _: Tensor | None):
    if dy is None:
        return None, None, None
    x, weight, scale = ctx.saved_tensors
    dx, dw = _norm_backward(dy, None, x, weight, scale)
    return dx, dw, None


def _save_norm_add(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1], inputs[2], output[2])
    ctx.set_materialize_grads(False)


def _differentiate_norm_add(ctx, dy: Tensor | None, dh: Tensor | None, _: Tensor | None):
    if dy is None:  # h alone was used
        return dh, dh, None, None
    h, weight, scale = ctx.saved_tensors
    dx, dw = _norm_backward(dy, dh, h, weight, scale)
    return dx, dx, dw, None


_norm.register_autograd(_differentiate_norm, setup_context=_save_norm)
_norm_add.register_autograd(_differentiate_norm_add, setup_context=_save_norm_add)
