"""The CUDA engine: Triton kernels for what memory bounds, matrix products (cuBLAS) for the rest.

LayerNorm's weight is folded into the matrix after it, attention works on the Gram matrix of queries and keys and
is applied to the values together with the projection. The backward passes keep the input and compute everything
between again. Other types than float32, autocast and second derivatives go to the reference.
Triton's interpreter runs the same kernels on CPU tensors (``TRITON_INTERPRET=1``), which is how they are tested.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from restormer3d.ops import reference
from restormer3d.ops.attention import attention_gradients, attention_matrices, mix_heads
from restormer3d.ops.cuda import launch
from restormer3d.ops.cuda.launch import apply_matrix, outer_products
from restormer3d.ops.reference import second_order


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
    return _Mdta.apply(x.contiguous(), *inputs[1:]) if _fits(*inputs) else reference.mdta(*inputs)


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
    """See :func:`restormer3d.ops.reference.conv3d`; two layers of the network, left to cuDNN."""
    return reference.conv3d(x, weight)


def depthwise_conv3d(x: Tensor, weight: Tensor) -> Tensor:
    """See :func:`restormer3d.ops.reference.depthwise_conv3d`."""
    return _Depthwise.apply(x.contiguous(), weight) if _fits(x, weight) else reference.depthwise_conv3d(x, weight)


def _fits(*tensors: Tensor) -> bool:
    x = tensors[0]
    autocast = torch.is_autocast_enabled(x.device.type)
    return x.numel() > 0 and not autocast and all(t.dtype == torch.float32 for t in tensors)


def _hidden(x: Tensor, norm_weight: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return x (B, C, T, H, W) normalized but for the weight (B, C, THW), and its 1x1x1 convolution (B, R, T, H, W)."""
    normalized = launch.normalize(x.flatten(2))
    return normalized, apply_matrix(weight.flatten(1) * norm_weight, normalized).unflatten(2, x.shape[2:])


def _hidden_backward(
    x: Tensor, grad: Tensor, normalized: Tensor, hidden_grad: Tensor, norm_weight: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x (the residual's included), of LayerNorm's weight and of the 1x1x1 weight."""
    matrix = weight.flatten(1)
    folded = outer_products(hidden_grad.flatten(2), normalized).sum(0)
    normalized_grad = apply_matrix((matrix * norm_weight).mT, hidden_grad.flatten(2))
    x_grad = launch.normalize_backward(x.flatten(2), normalized_grad, grad.flatten(2)).view_as(x)
    return x_grad, (folded * matrix).sum(0), (folded * norm_weight).view_as(weight)


class _Gdfn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        x, norm_weight, project_in, dwconv, project_out = inputs
        gated = launch.gated_depthwise(_hidden(x, norm_weight, project_in)[1], dwconv)
        return _project(x, project_out.flatten(1), gated)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return second_order(reference.gdfn, ctx.saved_tensors, grad_outputs[0])
        x, norm_weight, project_in, dwconv, project_out = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        normalized, hidden = _hidden(x, norm_weight, project_in)
        gated_grad = apply_matrix(project_out.flatten(1).mT, grad.flatten(2)).unflatten(2, x.shape[2:])
        gated, gate_grad = launch.gated_depthwise_backward(hidden, dwconv, gated_grad)
        out_grad = outer_products(grad.flatten(2), gated.flatten(2)).sum(0).view_as(project_out)
        del gated, gated_grad
        hidden_grad, tap_grad = launch.depthwise_backward(hidden, gate_grad, dwconv)
        del hidden, gate_grad
        return *_hidden_backward(x, grad, normalized, hidden_grad, norm_weight, project_in), tap_grad, out_grad


class _Mdta(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        x, norm_weight, qkv, dwconv, temperature, project_out = inputs
        mixture, squares = launch.depthwise(_hidden(x, norm_weight, qkv)[1], dwconv, with_squares=True)
        q, k, v = mixture.flatten(2).chunk(3, dim=1)
        products = _head_products(q, k, temperature.numel())
        lengths = squares.double().sum(2).unflatten(1, (3, temperature.numel(), -1))[:, :2]
        attention = attention_matrices(products, lengths, temperature)[1]
        ctx.save_for_backward(*inputs, products, lengths)
        return _project(x, mix_heads(project_out.flatten(1).double(), attention).float(), v)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, products, lengths = ctx.saved_tensors
        if torch.is_grad_enabled():
            return second_order(reference.mdta, tuple(inputs), grad_outputs[0])
        x, norm_weight, qkv, dwconv, temperature, project_out = inputs
        grad = grad_outputs[0].contiguous()
        normalized, hidden = _hidden(x, norm_weight, qkv)
        mixture = launch.depthwise(hidden, dwconv)[0].flatten(2)
        values = mixture[:, 2 * x.shape[1] :]
        outer = outer_products(grad.flatten(2), values)
        small = attention_gradients(outer, products, lengths, temperature, project_out.flatten(1))
        mixture_grad = _mixture_gradient(mixture, grad.flatten(2), small.query_key_matrix(), small.mixed)
        del mixture, values
        hidden_grad, tap_grad = launch.depthwise_backward(hidden, mixture_grad.view_as(hidden), dwconv)
        del hidden, mixture_grad
        x_grad, norm_grad, qkv_grad = _hidden_backward(x, grad, normalized, hidden_grad, norm_weight, qkv)
        temperature_grad = small.temperature.float().view_as(temperature)
        return x_grad, norm_grad, qkv_grad, tap_grad, temperature_grad, small.project_out.float().view_as(project_out)


def _project(x: Tensor, matrix: Tensor, inner: Tensor) -> Tensor:
    """Return ``x + matrix @ inner``."""
    matrix = matrix.expand(x.shape[0], -1, -1)
    return torch.baddbmm(x.flatten(2), matrix, inner.flatten(2)).view_as(x)


def _head_products(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """Return ``q @ k.T`` of every head in float64: (B, C, N) to (B, heads, c, c)."""
    products = outer_products(q, k).double().unflatten(2, (heads, -1)).unflatten(1, (heads, -1))
    return products.diagonal(dim1=1, dim2=3).movedim(-1, 1)


def _mixture_gradient(mixture: Tensor, grad: Tensor, query_key: Tensor, mixed: Tensor) -> Tensor:
    """Return the gradient of queries, keys and values (B, 3C, N)."""
    channels = grad.shape[1]
    out = torch.empty_like(mixture)
    torch.bmm(query_key.float(), mixture[:, : 2 * channels], out=out[:, : 2 * channels])
    torch.bmm(mixed.float().mT, grad, out=out[:, 2 * channels :])
    return out


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return apply_matrix(weight.flatten(1), x.flatten(2)).unflatten(2, x.shape[2:])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            return second_order(reference.pointwise, (x, weight), grad_outputs[0])
        grad = grad_outputs[0].flatten(2).contiguous()
        x_grad = apply_matrix(weight.flatten(1).mT, grad).view_as(x) if ctx.needs_input_grad[0] else None
        wanted = ctx.needs_input_grad[1]
        return x_grad, outer_products(grad, x.flatten(2)).sum(0).view_as(weight) if wanted else None


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
