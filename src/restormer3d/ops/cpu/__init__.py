"""The CPU engine: fused Numba kernels that recompute rather than store, one autograd function per operator.

The backward passes keep the input (and, for attention, the values) and compute everything between again.
What the kernels cannot do (other dtypes, second derivatives) goes to the reference.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from restormer3d.ops import reference
from restormer3d.ops.cpu import kernels
from restormer3d.ops.cpu.attention import attention_gradients, attention_matrices, mix_heads
from restormer3d.ops.cpu.engine import array, busy, plan, pool, scratch, start_threads, zeros
from restormer3d.ops.cpu.loops import SUM_COLUMNS, SUM_ROWS, TILE_ROWS
from restormer3d.ops.cpu.simd import LANES
from restormer3d.ops.cpu.tiles import round_up
from restormer3d.ops.reference import second_order

_MANY_CHANNELS = 16  # from here on a dense convolution is better done as matrix products, by PyTorch


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
    """See :func:`restormer3d.ops.reference.conv3d`."""
    if not _fits(x, weight) or min(weight.shape[:2]) > _MANY_CHANNELS:
        return reference.conv3d(x, weight)
    return _Convolution.apply(x.contiguous(), weight, False)


def depthwise_conv3d(x: Tensor, weight: Tensor) -> Tensor:
    """See :func:`restormer3d.ops.reference.depthwise_conv3d`."""
    return (
        _Convolution.apply(x.contiguous(), weight, True) if _fits(x, weight) else reference.depthwise_conv3d(x, weight)
    )


def _fits(*tensors: Tensor) -> bool:
    return tensors[0].numel() > 0 and all(t.dtype == torch.float32 for t in tensors)


def _weights(weight: Tensor) -> np.ndarray:
    """Return matrices (…, rows, columns) with their rows filled up to TILE_ROWS."""
    weight = weight.detach().float()
    return array(functional.pad(weight, (0, 0, 0, -weight.shape[-2] % TILE_ROWS)))


def _taps(weight: Tensor, *, reverse: bool = False) -> np.ndarray:
    taps = weight.detach().reshape(-1, 27)
    return array(taps.flip(1) if reverse else taps).reshape(-1)


def _tap_gradient(sums: np.ndarray, like: Tensor) -> Tensor:
    """Add up threads and lanes."""
    return torch.from_numpy(sums).view(sums.shape[0], -1, LANES).sum((0, 2)).view_as(like)


class _Gdfn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        x, norm_weight, project_in, dwconv, project_out = inputs
        channels, hidden = project_out.shape[:2]
        with busy:
            out = pool.empty(x.shape)
            threads = start_threads(x.numel() * 2 * hidden)
            rows, chunks = plan(x.shape, 2 * hidden, threads)
            kernels.gdfn_forward(
                array(x), array(out), _weights(project_in.flatten(1) * norm_weight), _taps(dwconv),
                _weights(project_out.flatten(1)), rows, chunks,
                scratch(kernels.gdfn_sizes(channels, hidden, rows, x.shape[4]), threads),
            )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad_outputs[0]
        if torch.is_grad_enabled():
            return second_order(reference.gdfn, ctx.saved_tensors, grad)
        x, norm_weight, project_in, dwconv, project_out = ctx.saved_tensors
        channels, hidden = project_out.shape[:2]
        with busy:
            grad = grad.contiguous()
            threads = start_threads(x.numel() * 2 * hidden)
            rows, chunks = plan(x.shape, 2 * hidden, threads)
            tap_sums = zeros(threads, 2 * hidden * kernels.TAPS)
            out_sums = zeros(threads, round_up(hidden, SUM_ROWS), round_up(channels, SUM_COLUMNS))
            hidden_grad = pool.scratch("hidden", (x.shape[0], 2 * hidden, *x.shape[2:]))
            kernels.gdfn_backward(
                array(x), array(grad), _weights(project_in.flatten(1) * norm_weight), _taps(dwconv),
                _weights(project_out.flatten(1).T), rows, chunks,
                scratch(kernels.gdfn_sizes(channels, hidden, rows, x.shape[4]), threads),
                hidden_grad, tap_sums, out_sums,
            )  # fmt: skip
            x_grad, norm_grad, in_grad = _project_backward(x, grad, hidden_grad, project_in, dwconv, norm_weight)
        out_grad = torch.from_numpy(out_sums).sum(0)[:hidden, :channels].T.reshape(project_out.shape)
        return x_grad, norm_grad, in_grad, _tap_gradient(tap_sums, dwconv), out_grad


class _Mdta(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        x, norm_weight, qkv, dwconv, temperature, project_out = inputs
        batch, channels = x.shape[:2]
        heads = temperature.numel()
        size = channels // heads
        with busy:
            value, out = pool.empty(x.shape), pool.empty(x.shape)
            threads = start_threads(x.numel() * 3 * channels)
            rows, chunks = plan(x.shape, 3 * channels, threads)
            gram = zeros(threads, batch, heads, round_up(size, SUM_ROWS), round_up(size, SUM_COLUMNS))
            squares = zeros(threads, batch, 2 * channels)
            kernels.mdta_forward(
                array(x), array(value), _weights(qkv.flatten(1) * norm_weight), _taps(dwconv), heads, rows, chunks,
                scratch(kernels.mdta_sizes(channels, heads, rows, x.shape[4]), threads), gram, squares,
            )  # fmt: skip
            products = torch.from_numpy(gram).double().sum(0)[..., :size, :size]
            lengths = torch.from_numpy(squares).double().sum(0).view(batch, 2, heads, size)
            attention = attention_matrices(products, lengths, temperature)[1]
            mixed = mix_heads(project_out.flatten(1).double(), attention).float()
            torch.baddbmm(x.flatten(2), mixed, value.flatten(2), out=out.flatten(2))
        ctx.save_for_backward(*inputs, value, products, lengths)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad_outputs[0]
        *inputs, value, products, lengths = ctx.saved_tensors
        if torch.is_grad_enabled():
            return second_order(reference.mdta, tuple(inputs), grad)
        x, norm_weight, qkv, dwconv, temperature, project_out = inputs
        channels, heads = x.shape[1], temperature.numel()
        with busy:
            grad = grad.contiguous()
            outer = torch.bmm(grad.flatten(2), value.flatten(2).mT)
            small = attention_gradients(outer, products, lengths, temperature, project_out.flatten(1))
            threads = start_threads(x.numel() * 3 * channels)
            rows, chunks = plan(x.shape, 3 * channels, threads)
            tap_sums = zeros(threads, 3 * channels * kernels.TAPS)
            hidden_grad = pool.scratch("hidden", (x.shape[0], 3 * channels, *x.shape[2:]))
            kernels.mdta_backward(
                array(x), array(grad), _weights(qkv.flatten(1) * norm_weight), _taps(dwconv),
                _weights(small.products), _weights(small.products.mT), array(small.own.float()),
                _weights(small.mixed.mT), rows, chunks,
                scratch(kernels.mdta_sizes(channels, heads, rows, x.shape[4]), threads), hidden_grad, tap_sums,
            )  # fmt: skip
            x_grad, norm_grad, qkv_grad = _project_backward(x, grad, hidden_grad, qkv, dwconv, norm_weight)
        temperature_grad = small.temperature.float().view_as(temperature)
        project_grad = small.project_out.float().view_as(project_out)
        return x_grad, norm_grad, qkv_grad, _tap_gradient(tap_sums, dwconv), temperature_grad, project_grad


def _project_backward(
    x: Tensor, grad: Tensor, hidden_grad: np.ndarray, weight: Tensor, dwconv_weight: Tensor, norm_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x (the residual's included), of LayerNorm's weight and of the 1x1x1 weight."""
    hidden, channels = weight.shape[:2]
    matrix = weight.flatten(1)
    out = pool.empty(x.shape)
    threads = start_threads(x.numel() * hidden)
    rows, chunks = plan(x.shape, hidden, threads)
    sums = zeros(threads, round_up(hidden, SUM_ROWS), round_up(channels, SUM_COLUMNS))
    kernels.project_backward(
        array(x), array(grad), hidden_grad, _weights((matrix * norm_weight).T), _taps(dwconv_weight, reverse=True),
        rows, chunks, scratch(kernels.project_sizes(channels, hidden, rows, x.shape[4]), threads), array(out), sums,
    )  # fmt: skip
    folded = torch.from_numpy(sums).sum(0)[:hidden, :channels]
    return out, (folded * matrix).sum(0), (folded * norm_weight).view_as(weight)


class _Pointwise(torch.autograd.Function):
    """PyTorch's products, into memory that is there: what it would allocate costs more time than they do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        with busy:
            return _product(weight.flatten(1), x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad_outputs[0]
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            return second_order(reference.pointwise, (x, weight), grad)
        x_grad = weight_grad = None
        with busy:
            grad = grad.contiguous()
            if ctx.needs_input_grad[0]:
                x_grad = _product(weight.flatten(1).T, grad)
            if ctx.needs_input_grad[1]:
                weight_grad = torch.bmm(grad.flatten(2), x.flatten(2).mT).sum(0).view_as(weight)
        return x_grad, weight_grad


def _product(matrix: Tensor, x: Tensor) -> Tensor:
    """Multiply the channels of every voxel by a matrix."""
    out = pool.empty((len(x), len(matrix), *x.shape[2:]))
    torch.bmm(matrix.detach().expand(len(x), -1, -1), x.detach().flatten(2), out=out.flatten(2))
    return out


class _Convolution(torch.autograd.Function):
    """Dense or depth-wise. Depth-wise, every channel of every sample is a sample with one channel and its own taps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, depthwise: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.depthwise = depthwise
        with busy:
            return _convolve(x, weight, depthwise)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad_outputs[0]
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            operator = reference.depthwise_conv3d if ctx.depthwise else reference.conv3d
            return (*second_order(operator, (x, weight), grad), None)
        x_grad = weight_grad = None
        with busy:
            grad = grad.contiguous()
            if ctx.needs_input_grad[0]:
                mirrored = weight.detach().flip(2, 3, 4)
                x_grad = _convolve(grad, mirrored if ctx.depthwise else mirrored.transpose(0, 1), ctx.depthwise)
            if ctx.needs_input_grad[1]:
                weight_grad = _convolution_weight_gradient(x, grad, weight, ctx.depthwise)
        return x_grad, weight_grad, None


def _convolve(x: Tensor, weight: Tensor, depthwise: bool) -> Tensor:
    out = pool.empty((x.shape[0], weight.shape[0], *x.shape[2:]))
    taps = array(weight).reshape((-1, 1, 27) if depthwise else (1, weight.shape[0], -1))
    source, target = (_each_channel(x), _each_channel(out)) if depthwise else (x, out)
    threads = start_threads(27 * source.numel() * target.shape[1])
    rows, chunks = plan(source.shape, source.shape[1], threads)
    sizes = kernels.convolution_sizes(source.shape[1], target.shape[1], rows, x.shape[4])
    kernels.convolution_forward(array(source), array(target), taps, rows, chunks, scratch(sizes, threads))
    return out


def _convolution_weight_gradient(x: Tensor, grad: Tensor, weight: Tensor, depthwise: bool) -> Tensor:
    source, target = (_each_channel(x), _each_channel(grad)) if depthwise else (x, grad)
    sets = weight.shape[0] if depthwise else 1
    threads = start_threads(27 * source.numel() * target.shape[1])
    rows, chunks = plan(source.shape, source.shape[1], threads)
    sums = zeros(threads, sets, target.shape[1], source.shape[1] * kernels.TAPS)
    sizes = kernels.convolution_sizes(source.shape[1], target.shape[1], rows, x.shape[4])
    kernels.convolution_weight_gradient(array(source), array(target), sets, rows, chunks, scratch(sizes, threads), sums)
    return _tap_gradient(sums, weight)


def _each_channel(x: Tensor) -> Tensor:
    return x.flatten(0, 1).unsqueeze(1)
