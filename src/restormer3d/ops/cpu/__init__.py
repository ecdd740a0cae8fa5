"""The CPU engine: fused Numba kernels that recompute rather than store, one autograd function per operator.

The backward passes keep the input (and the values, for attention) and compute everything between again.
What the kernels cannot do (other dtypes, second derivatives) goes to the reference.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from restormer3d.ops import reference
from restormer3d.ops.cpu import kernels
from restormer3d.ops.cpu.loops import BLOCK, SUM_COLUMNS, SUM_ROWS, TILE_ROWS
from restormer3d.ops.cpu.memory import Pool
from restormer3d.ops.cpu.simd import LANES
from restormer3d.ops.cpu.tiles import room

_RING_BYTES = 1_100_000  # half of a 2 MB second-level cache; smaller caches hold the part in use
_EPS = 1e-12  # of torch.nn.functional.normalize

_busy = threading.RLock()  # kernels use all cores and share the pool: one at a time
_pool = Pool()


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


def _plan(shape: torch.Size, hidden: int, threads: int) -> tuple[int, int]:
    """Return rows per strip, so that a ring of hidden channels fits the cache, and pieces of time, for all threads."""
    batch, _, frames, height, width = shape
    rows = int(_RING_BYTES / (12 * hidden * (width + 1))) - 2
    rows = max(BLOCK, rows // BLOCK * BLOCK)
    rows = _up(-(-height // -(-height // rows)), BLOCK)
    strips = batch * -(-height // rows)
    chunks = 1
    while chunks < frames and strips * chunks % threads and strips * chunks < 4 * threads:
        chunks += 1
    return rows, chunks


def _threads() -> int:
    """Make Numba use as many threads as PyTorch, and return how many."""
    wanted = torch.get_num_threads()
    threads = min(wanted, numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(threads)
    if torch.get_num_threads() != wanted:  # both may share one OpenMP library; starting Numba's threads resets it
        torch.set_num_threads(wanted)
    return threads


def _array(x: Tensor) -> np.ndarray:
    return x.detach().contiguous().numpy()


def _matrix(weight: Tensor, multiple: int = TILE_ROWS) -> np.ndarray:
    """Return the last two dimensions as matrices whose number of rows is filled up with zeros."""
    rows = _up(weight.shape[-2], multiple)
    return _array(torch.nn.functional.pad(weight.detach(), (0, 0, 0, rows - weight.shape[-2])))


def _taps(weight: Tensor, reverse: bool = False) -> np.ndarray:
    taps = weight.detach().reshape(-1, 27)
    return _array(taps.flip(1) if reverse else taps)


def _scratch(sizes: tuple[int, ...], threads: int) -> np.ndarray:
    return _pool.scratch("threads", (threads, sum(room(size) for size in sizes)))


def _tap_gradient(sums: np.ndarray, like: Tensor) -> Tensor:
    """Add up threads and lanes."""
    return torch.from_numpy(sums).view(sums.shape[0], -1, 27, LANES).sum((0, 3)).view_as(like)


def _usable(*tensors: Tensor) -> bool:
    return tensors[0].numel() > 0 and all(t.dtype == torch.float32 for t in tensors)


def _second_order(operator: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients as functions of the inputs, by the reference."""
    with torch.enable_grad():
        return torch.autograd.grad(operator(*inputs), inputs, grad, create_graph=True, allow_unused=True)


def _project_backward(x: Tensor, grad: Tensor, hidden_grad: np.ndarray, weight: Tensor, dwconv_weight: Tensor, norm_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x (the residual's included), of LayerNorm's weight and of the 1x1x1 weight."""
    hidden, channels = weight.shape[:2]
    matrix = weight.flatten(1)
    threads = _threads()
    rows, chunks = _plan(x.shape, hidden, threads)
    sums = np.zeros((threads, _up(hidden, SUM_ROWS), _up(channels, SUM_COLUMNS)), np.float32)
    out = _pool.empty(x.shape)
    scratch = _scratch(kernels.project_sizes(channels, hidden, rows, x.shape[4]), threads)
    kernels.project_backward(
        _array(x), _array(grad), hidden_grad, _matrix((matrix * norm_weight).T), _taps(dwconv_weight, reverse=True),
        rows, chunks, scratch, out.numpy(), sums,
    )  # fmt: skip
    folded = torch.from_numpy(sums).sum(0)[:hidden, :channels]
    return out, (folded * matrix).sum(0), (folded * norm_weight).view_as(weight)


class _Gdfn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, *inputs: Tensor) -> Tensor:
        x, norm_weight, project_in, dwconv, project_out = inputs
        ctx.save_for_backward(*inputs)
        with _busy:
            threads = _threads()
            hidden = project_out.shape[1]
            rows, chunks = _plan(x.shape, 2 * hidden, threads)
            out = _pool.empty(x.shape)
            scratch = _scratch(kernels.gdfn_sizes(x.shape[1], hidden, rows, x.shape[4]), threads)
            kernels.gdfn_forward(
                _array(x), out.numpy(), _matrix(project_in.flatten(1) * norm_weight), _taps(dwconv),
                _matrix(project_out.flatten(1)), rows, chunks, scratch,
            )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        inputs = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _second_order(reference.gdfn, inputs, grad)
        x, norm_weight, project_in, dwconv, project_out = inputs
        with _busy:
            channels, hidden = project_out.shape[:2]
            threads = _threads()
            rows, chunks = _plan(x.shape, 2 * hidden, threads)
            tap_sums = np.zeros((threads, 2 * hidden * 27 * LANES), np.float32)
            out_sums = np.zeros((threads, _up(hidden, SUM_ROWS), _up(channels, SUM_COLUMNS)), np.float32)
            hidden_grad = _pool.scratch("hidden", (x.shape[0], 2 * hidden, *x.shape[2:]))
            scratch = _scratch(kernels.gdfn_sizes(channels, hidden, rows, x.shape[4]), threads)
            kernels.gdfn_backward(
                _array(x), _array(grad), _matrix(project_in.flatten(1) * norm_weight), _taps(dwconv),
                _matrix(project_out.flatten(1).T), rows, chunks, scratch, hidden_grad, tap_sums, out_sums,
            )  # fmt: skip
            x_grad, norm_grad, in_grad = _project_backward(x, grad, hidden_grad, project_in, dwconv, norm_weight)
        out_grad = torch.from_numpy(out_sums).sum(0)[:hidden, :channels].T.reshape(project_out.shape)
        return x_grad, norm_grad, in_grad, _tap_gradient(tap_sums, dwconv), out_grad


def gdfn(x: Tensor, norm_weight: Tensor, project_in_weight: Tensor, dwconv_weight: Tensor, project_out_weight: Tensor) -> Tensor:
    """See :func:`restormer3d.ops.reference.gdfn`."""
    inputs = (x, norm_weight, project_in_weight, dwconv_weight, project_out_weight)
    if not _usable(*inputs):
        return reference.gdfn(*inputs)
    return _Gdfn.apply(x.contiguous(), *inputs[1:])


def _attention(gram: Tensor, squares: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the cosines of queries and keys, the attention, and the inverse lengths of queries and of keys.

    ``gram`` (B, heads, c, c) holds queries @ keys.T, ``squares`` (B, 2, heads, c) their squared lengths.
    """
    inverse = 1 / squares.sqrt().clamp_min(_EPS)
    cosines = gram * inverse[:, 0, :, :, None] * inverse[:, 1, :, None, :]
    attention = (cosines * temperature.view(1, -1, 1, 1)).softmax(-1)
    return cosines, attention, inverse[:, 0], inverse[:, 1]


def _block_product(matrix: Tensor, blocks: Tensor) -> Tensor:
    """Return ``matrix (…, R, C) @ block_diagonal(blocks)``, ``blocks`` (B, heads, c, c)."""
    heads, size = blocks.shape[1:3]
    split = matrix.unflatten(-1, (heads, size)).movedim(-2, -3)  # (…, heads, R, c)
    return (split @ blocks).movedim(-3, -2).flatten(-2)


class _Mdta(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        x, norm_weight, qkv, dwconv, temperature, project_out = inputs
        batch, channels = x.shape[:2]
        heads = temperature.numel()
        size = channels // heads
        with _busy:
            threads = _threads()
            rows, chunks = _plan(x.shape, 3 * channels, threads)
            value = _pool.empty(x.shape)
            gram = np.zeros((threads, batch, heads, _up(size, SUM_ROWS), _up(size, SUM_COLUMNS)), np.float32)
            squares = np.zeros((threads, batch, 2 * channels), np.float32)
            scratch = _scratch(kernels.mdta_sizes(channels, heads, rows, x.shape[4]), threads)
            kernels.mdta_forward(
                _array(x), value.numpy(), _matrix(qkv.flatten(1) * norm_weight), _taps(dwconv), heads, rows, chunks,
                scratch, gram, squares,
            )  # fmt: skip
            products = torch.from_numpy(gram).double().sum(0)[..., :size, :size]
            lengths = torch.from_numpy(squares).double().sum(0).view(batch, 2, heads, size)
            attention = _attention(products, lengths, temperature)[1]
            mixed = _block_product(project_out.flatten(1).double(), attention).float()
            out = _pool.empty(x.shape)
            torch.baddbmm(x.flatten(2), mixed, value.flatten(2), out=out.view(batch, channels, -1))
        ctx.save_for_backward(*inputs, value, products, lengths)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        *inputs, value, gram, squares = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _second_order(reference.mdta, tuple(inputs), grad)
        x, norm_weight, qkv, dwconv, temperature, project_out = inputs
        with _busy:
            batch, channels = x.shape[:2]
            grad = grad.contiguous()
            product = torch.bmm(grad.flatten(2), value.flatten(2).mT).double()
            small = _AttentionGradient.compute(product, gram, squares, temperature, project_out.flatten(1).double())
            threads = _threads()
            rows, chunks = _plan(x.shape, 3 * channels, threads)
            tap_sums = np.zeros((threads, 3 * channels * 27 * LANES), np.float32)
            hidden_grad = _pool.scratch("hidden", (batch, 3 * channels, *x.shape[2:]))
            scratch = _scratch(kernels.mdta_sizes(channels, temperature.numel(), rows, x.shape[4]), threads)
            kernels.mdta_backward(
                _array(x), _array(grad), _matrix(qkv.flatten(1) * norm_weight), _taps(dwconv),
                _matrix(small.gram.float()), _matrix(small.gram.mT.float()), _array(small.own.float()),
                _matrix(small.mixed.mT.float()), rows, chunks, scratch, hidden_grad, tap_sums,
            )  # fmt: skip
            x_grad, norm_grad, qkv_grad = _project_backward(x, grad, hidden_grad, qkv, dwconv, norm_weight)
        return (
            x_grad, norm_grad, qkv_grad, _tap_gradient(tap_sums, dwconv),
            small.temperature.float().view_as(temperature), small.project_out.float().view_as(project_out),
        )  # fmt: skip


@dataclass
class _AttentionGradient:
    """Gradients of the small matrices: of queries @ keys.T, of the lengths, of temperature and projection."""

    gram: Tensor
    own: Tensor
    mixed: Tensor
    temperature: Tensor
    project_out: Tensor

    @staticmethod
    def compute(product: Tensor, gram: Tensor, squares: Tensor, temperature: Tensor, project_out: Tensor) -> _AttentionGradient:
        """Go back through projection, softmax and normalization; ``product`` (B, C, C) is grad @ values.T."""
        cosines, attention, inverse_q, inverse_k = _attention(gram, squares, temperature)
        heads, size = gram.shape[1:3]
        columns = product.unflatten(2, (heads, size)).movedim(2, 1)  # (B, heads, C, c)
        projection = project_out.unflatten(1, (heads, size)).movedim(1, 0)  # (heads, C, c)
        attention_grad = projection.mT @ columns
        logits = attention * (attention_grad - (attention_grad * attention).sum(-1, keepdim=True))
        cosines_grad = logits * temperature.view(1, -1, 1, 1)
        pull = cosines_grad * cosines
        own = torch.stack([-pull.sum(-1) * inverse_q**2, -pull.sum(-2) * inverse_k**2], 1)
        own = own * (squares > _EPS**2)
        return _AttentionGradient(
            gram=cosines_grad * inverse_q[..., :, None] * inverse_k[..., None, :],
            own=own.flatten(1),
            mixed=_block_product(project_out, attention),
            temperature=(logits * cosines).sum((0, 2, 3)),
            project_out=_block_product(product, attention.mT).sum(0),
        )


def mdta(x: Tensor, norm_weight: Tensor, qkv_weight: Tensor, dwconv_weight: Tensor, temperature: Tensor, project_out_weight: Tensor) -> Tensor:
    """See :func:`restormer3d.ops.reference.mdta`."""
    inputs = (x, norm_weight, qkv_weight, dwconv_weight, temperature, project_out_weight)
    if not _usable(*inputs):
        return reference.mdta(*inputs)
    return _Mdta.apply(x.contiguous(), *inputs[1:])


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        with _busy:
            out = _pool.empty(x.shape)
            planes = x.flatten(0, 1)[:, None]
            threads = _threads()
            rows, chunks = _plan(planes.shape, 8, threads)
            scratch = _scratch(kernels.depthwise_sizes(rows, x.shape[4]), threads)
            kernels.depthwise_forward(_array(planes), out.flatten(0, 1)[:, None].numpy(), _taps(weight), rows, chunks, scratch)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _second_order(reference.depthwise_conv3d, (x, weight), grad)
        with _busy:
            out = _pool.empty(x.shape)
            planes, grads = x.flatten(0, 1)[:, None], grad.contiguous().flatten(0, 1)[:, None]
            threads = _threads()
            rows, chunks = _plan(planes.shape, 8, threads)
            scratch = _scratch(kernels.depthwise_sizes(rows, x.shape[4]), threads)
            tap_sums = np.zeros((threads, weight.shape[0] * 27 * LANES), np.float32)
            kernels.depthwise_backward(
                _array(planes), _array(grads), out.flatten(0, 1)[:, None].numpy(), _taps(weight, reverse=True), rows, chunks, scratch, tap_sums,
            )  # fmt: skip
        return out, _tap_gradient(tap_sums, weight)


def depthwise_conv3d(x: Tensor, weight: Tensor) -> Tensor:
    """See :func:`restormer3d.ops.reference.depthwise_conv3d`."""
    if not _usable(x, weight):
        return reference.depthwise_conv3d(x, weight)
    return _Depthwise.apply(x.contiguous(), weight)


def pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """See :func:`restormer3d.ops.reference.pointwise`."""
    return torch.matmul(weight.flatten(1), x.flatten(2)).view(x.shape[0], -1, *x.shape[2:])


def conv3d(x: Tensor, weight: Tensor) -> Tensor:
    """See :func:`restormer3d.ops.reference.conv3d`."""
    return reference.conv3d(x, weight)
