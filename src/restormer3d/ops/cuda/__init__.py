"""The CUDA engine: Triton kernels for convolutions, matrix products and attention.

LayerNorm is folded into the matrix after it and its product, attention works on the Gram matrix of queries and keys
and is applied to the values together with the projection. The backward passes keep the input, what the first 1x1x1
convolution made of it and, of few channels, queries, keys and values; they compute the rest again. Other types than
float32, autocast and second derivatives go to the reference.
Triton's interpreter runs the same kernels on CPU tensors (``TRITON_INTERPRET=1``), which is how they are tested.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from restormer3d.ops import reference
from restormer3d.ops.cuda import launch
from restormer3d.ops.cuda.launch import outer_products, product
from restormer3d.ops.reference import second_order

_KEPT_CHANNELS = 32  # up to which queries, keys and values are kept: of more, memory would be short


def mdta(
    x: Tensor,
    norm_weight: Tensor,
    qkv_weight: Tensor,
    dwconv_weight: Tensor,
    temperature: Tensor,
    project_out_weight: Tensor,
) -> Tensor:
    """See :func:`restormer3d.ops.reference.mdta`."""
    inputs = (x, norm_weight, qkv_weight, dwconv_weight, temperature, project_out_weight)
    fits = _fits(*inputs) and x.shape[1] <= launch.MOST_HEAD_CHANNELS * temperature.numel()
    return _Mdta.apply(x.contiguous(), *inputs[1:]) if fits else reference.mdta(*inputs)


def gdfn(
    x: Tensor,
    norm_weight: Tensor,
    project_in_weight: Tensor,
    dwconv_weight: Tensor,
    project_out_weight: Tensor,
) -> Tensor:
    """See :func:`restormer3d.ops.reference.gdfn`."""
    inputs = (x, norm_weight, project_in_weight, dwconv_weight, project_out_weight)
    return _Gdfn.apply(x.contiguous(), *inputs[1:]) if _fits(*inputs) else reference.gdfn(*inputs)


def pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """See :func:`restormer3d.ops.reference.pointwise`."""
    return _Pointwise.apply(x.contiguous(), weight) if _fits(x, weight) else reference.pointwise(x, weight)


def conv3d(x: Tensor, weight: Tensor) -> Tensor:
    """See :func:`restormer3d.ops.reference.conv3d`."""
    return _Conv3d.apply(x.contiguous(), weight) if _fits(x, weight) else reference.conv3d(x, weight)


def depthwise_conv3d(x: Tensor, weight: Tensor) -> Tensor:
    """See :func:`restormer3d.ops.reference.depthwise_conv3d`."""
    return _Depthwise.apply(x.contiguous(), weight) if _fits(x, weight) else reference.depthwise_conv3d(x, weight)


def _fits(*tensors: Tensor) -> bool:
    x = tensors[0]
    autocast = torch.is_autocast_enabled(x.device.type)
    return x.numel() > 0 and not autocast and all(t.dtype == torch.float32 for t in tensors)


def _hidden(x: Tensor, norm_weight: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return 1 / the standard deviation of x (B, C, T, H, W), and the 1x1x1 convolution of its LayerNorm."""
    scale, hidden = launch.normalized_product(weight.flatten(1), norm_weight, x.flatten(2))
    return scale, hidden.unflatten(2, x.shape[2:])


def _hidden_backward(
    x: Tensor, grad: Tensor, scale: Tensor, hidden_grad: Tensor, norm_weight: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x (the residual's included), of LayerNorm's weight and of the 1x1x1 weight."""
    x_grad, matrix_grad, norm_grad = launch.normalized_product_backward(
        x.flatten(2), scale, hidden_grad.flatten(2), weight.flatten(1), norm_weight, grad.flatten(2)
    )
    return x_grad.view_as(x), norm_grad, matrix_grad.view_as(weight)


class _Gdfn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        x, norm_weight, project_in, dwconv, project_out = inputs
        scale, hidden = _hidden(x, norm_weight, project_in)
        ctx.save_for_backward(*inputs, scale, hidden)
        gated = launch.gated_depthwise(hidden, dwconv).flatten(2)
        return product(project_out.flatten(1), gated, residual=x.flatten(2)).view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, scale, hidden = ctx.saved_tensors
        if torch.is_grad_enabled():
            return second_order(reference.gdfn, tuple(inputs), grad_outputs[0])
        x, norm_weight, project_in, dwconv, project_out = inputs
        grad = grad_outputs[0].contiguous()
        gate_grad, out_grad = launch.gated_depthwise_backward(hidden, dwconv, project_out.flatten(1), grad.flatten(2))
        hidden_grad, tap_grad = launch.depthwise_backward(hidden, gate_grad, dwconv)
        del hidden, gate_grad
        into_hidden = _hidden_backward(x, grad, scale, hidden_grad, norm_weight, project_in)
        return *into_hidden, tap_grad, out_grad.view_as(project_out)


class _Mdta(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        x, norm_weight, qkv, dwconv, temperature, project_out = inputs
        scale, hidden = _hidden(x, norm_weight, qkv)
        mixture, squares = launch.depthwise(hidden, dwconv, with_squares=True)
        q, k, v = mixture.flatten(2).chunk(3, dim=1)
        products = outer_products(q, k, heads=temperature.numel())
        attention, mixed = launch.attention_matrix(products, squares, temperature, project_out.flatten(1))
        kept = mixture if x.shape[1] <= _KEPT_CHANNELS else mixture.new_empty(0)
        ctx.save_for_backward(*inputs, scale, hidden, kept, products, squares, attention, mixed)
        return product(mixed, v, residual=x.flatten(2)).view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, scale, hidden, kept, products, squares, attention, mixed = ctx.saved_tensors
        if torch.is_grad_enabled():
            return second_order(reference.mdta, tuple(inputs), grad_outputs[0])
        x, norm_weight, qkv, dwconv, temperature, project_out = inputs
        grad, heads, channels = grad_outputs[0].contiguous(), temperature.numel(), x.shape[1]
        mixture = (kept if kept.numel() else launch.depthwise(hidden, dwconv)[0]).flatten(2)
        outer = outer_products(grad.flatten(2), mixture[:, 2 * channels :])
        query_key, temperature_grad, out_grad = launch.attention_backward(
            outer, products, squares, attention, temperature, project_out.flatten(1)
        )
        mixture_grad = torch.empty_like(mixture)
        product(query_key, mixture[:, : 2 * channels], out=mixture_grad[:, : 2 * channels], heads=heads)
        product(mixed.mT, grad.flatten(2), out=mixture_grad[:, 2 * channels :])
        del mixture, kept
        hidden_grad, tap_grad = launch.depthwise_backward(hidden, mixture_grad.view_as(hidden), dwconv)
        del hidden, mixture_grad
        return (
            *_hidden_backward(x, grad, scale, hidden_grad, norm_weight, qkv),
            tap_grad,
            temperature_grad.view_as(temperature),
            out_grad.view_as(project_out),
        )


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(weight.flatten(1), x.flatten(2)).unflatten(2, x.shape[2:])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            return second_order(reference.pointwise, (x, weight), grad_outputs[0])
        grad = grad_outputs[0].flatten(2).contiguous()
        x_grad = product(weight.flatten(1).mT, grad).view_as(x) if ctx.needs_input_grad[0] else None
        wanted = ctx.needs_input_grad[1]
        return x_grad, outer_products(grad, x.flatten(2), over_samples=True).view_as(weight) if wanted else None


class _Conv3d(torch.autograd.Function):
    """A dense convolution as one product over channels, shifted where there are fewer of them: before it or after."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        if x.shape[1] <= len(weight):
            return product(weight.flatten(1), _shifts(x)).unflatten(2, x.shape[2:])
        return _sum_shifts(product(_by_tap(weight), x.flatten(2)), x.shape[2:])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            return second_order(reference.conv3d, (x, weight), grad_outputs[0])
        grad, x_grad = grad_outputs[0].contiguous(), None
        if x.shape[1] <= len(weight):
            if ctx.needs_input_grad[0]:
                # The adjoint of shifting is shifting the other way.
                shares = product(weight.flatten(1).mT, grad.flatten(2))
                x_grad = _sum_shifts(shares.unflatten(1, (-1, 27)).flip(2).flatten(1, 2), x.shape[2:])
            return x_grad, outer_products(grad.flatten(2), _shifts(x), over_samples=True).view_as(weight)
        shifted = _shifts(grad).unflatten(1, (-1, 27)).flip(2).flatten(1, 2)
        if ctx.needs_input_grad[0]:
            x_grad = product(_by_tap(weight).mT, shifted).view_as(x)
        taps = outer_products(shifted, x.flatten(2), over_samples=True).unflatten(0, (-1, 27))
        return x_grad, taps.mT.reshape(weight.shape)


def _shifts(x: Tensor) -> Tensor:
    """Return the 27 voxels around each one, zero outside: (B, C, T, H, W) to (B, C * 27, THW)."""
    around = F.pad(x, (1,) * 6).unfold(2, 3, 1).unfold(3, 3, 1).unfold(4, 3, 1)  # (B, C, T, H, W, 3, 3, 3)
    return around.permute(0, 1, 5, 6, 7, 2, 3, 4).reshape(x.shape[0], 27 * x.shape[1], -1)


def _sum_shifts(x: Tensor, size: torch.Size) -> Tensor:
    """Add up what each of the 27 voxels around one holds for it: (B, C * 27, THW) to (B, C, T, H, W)."""
    padded = F.pad(x.unflatten(2, size), (1,) * 6)
    sample, channel, *along = padded.stride()
    steps = [27 * channel, *(many * channel + step for many, step in zip((9, 3, 1), along, strict=True))]
    view = padded.as_strided((x.shape[0], x.shape[1] // 27, 3, 3, 3, *size), (sample, *steps, *along))
    return view.sum((2, 3, 4))


def _by_tap(weight: Tensor) -> Tensor:
    """Reorder (C_out, C_in, 3, 3, 3) to (C_out * 27, C_in)."""
    return weight.flatten(2).mT.reshape(-1, weight.shape[1])


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return launch.depthwise(x, weight)[0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            return second_order(reference.depthwise_conv3d, (x, weight), grad_outputs[0])
        return launch.depthwise_backward(x, grad_outputs[0].contiguous(), weight)
