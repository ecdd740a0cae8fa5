"""The operators of Restormer3D in plain PyTorch: the definition every faster engine is checked against.

Tensors are (B, C, T, H, W); weights have the layout of ``torch.nn.Conv3d``. Nothing here has a bias.
Source: Zamir et al., "Restormer: Efficient Transformer for High-Resolution Image Restoration", CVPR 2022,
carried over to three dimensions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

NORM_EPS = 1e-5
"""Added to the variance in the bias-free LayerNorm."""


def layer_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Bias-free LayerNorm over channels: ``x / sqrt(var_c(x) + 1e-5) * weight``; x is not centered.

    Parameters
    ----------
    x
        Shape (B, C, T, H, W).
    weight
        Shape (C,).
    """
    variance = x.var(dim=1, keepdim=True, unbiased=False)
    return x / torch.sqrt(variance + NORM_EPS) * weight.view(1, -1, 1, 1, 1)


def pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve 1x1x1: ``weight`` (C_out, C_in, 1, 1, 1)."""
    return functional.conv3d(x, weight)


def conv3d(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve 3x3x3 with zero padding 1: ``weight`` (C_out, C_in, 3, 3, 3)."""
    return functional.conv3d(x, weight, padding=1)


def depthwise_conv3d(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve every channel with its own 3x3x3 kernel, zero padding 1: ``weight`` (C, 1, 3, 3, 3)."""
    return functional.conv3d(x, weight, padding=1, groups=weight.shape[0])


def mdta(
    x: Tensor,
    norm_weight: Tensor,
    qkv_weight: Tensor,
    dwconv_weight: Tensor,
    temperature: Tensor,
    project_out_weight: Tensor,
) -> Tensor:
    """Multi-Dconv head transposed attention with its LayerNorm and residual: ``x + MDTA(LayerNorm(x))``.

    Parameters
    ----------
    x
        Shape (B, C, T, H, W).
    norm_weight
        Shape (C,).
    qkv_weight
        Shape (3C, C, 1, 1, 1): queries, keys and values in this order.
    dwconv_weight
        Shape (3C, 1, 3, 3, 3).
    temperature
        Shape (heads, 1, 1); its length is the number of heads.
    project_out_weight
        Shape (C, C, 1, 1, 1).
    """
    batch, channels, *size = x.shape
    heads = temperature.numel()
    qkv = depthwise_conv3d(pointwise(layer_norm(x, norm_weight), qkv_weight), dwconv_weight)
    q, k, v = qkv.reshape(batch, 3, heads, channels // heads, -1).unbind(1)  # each (B, heads, C/heads, THW)
    q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
    attention = (q @ k.transpose(-2, -1) * temperature.view(heads, 1, 1)).softmax(dim=-1)
    out = (attention @ v).reshape(batch, channels, *size)
    return x + pointwise(out, project_out_weight)


def gdfn(
    x: Tensor,
    norm_weight: Tensor,
    project_in_weight: Tensor,
    dwconv_weight: Tensor,
    project_out_weight: Tensor,
) -> Tensor:
    """Gated-Dconv feed-forward network with its LayerNorm and residual: ``x + GDFN(LayerNorm(x))``.

    Parameters
    ----------
    x
        Shape (B, C, T, H, W).
    norm_weight
        Shape (C,).
    project_in_weight
        Shape (2h, C, 1, 1, 1) for h hidden channels: the half that passes GELU, then the other factor.
    dwconv_weight
        Shape (2h, 1, 3, 3, 3).
    project_out_weight
        Shape (C, h, 1, 1, 1).
    """
    hidden = depthwise_conv3d(pointwise(layer_norm(x, norm_weight), project_in_weight), dwconv_weight)
    gate, value = hidden.chunk(2, dim=1)
    return x + pointwise(functional.gelu(gate) * value, project_out_weight)


def second_order(
    operator: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Return gradients that can be differentiated again: what a faster engine leaves to the operators here."""
    wanted = [i for i in inputs if i.requires_grad]
    with torch.enable_grad():
        found = iter(torch.autograd.grad(operator(*inputs), wanted, grad, create_graph=True))
    return tuple(next(found) if i.requires_grad else None for i in inputs)
