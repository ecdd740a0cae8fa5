"""The fused kernels of the CPU engine: each walks strips of rows through time and keeps what it needs in cache.

A strip's three latest frames of hidden channels live in a ring of three tiles. When a frame arrives it is
normalized, multiplied by the 1x1x1 weights and put into the ring; then the depth-wise convolution of the frame before
it can be finished, and what follows (gate, Gram matrix, projection) happens on that one tile.

Every thread has its own scratch and its own sums: results do not depend on timing. Common arguments: ``x`` and
``grad`` (B, C, T, H, W); ``taps`` (27 per channel, flat); weights (rows filled up to TILE_ROWS, columns);
``rows`` of a strip; ``chunks``, pieces of the time axis; ``scratch`` (threads, floats).
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from restormer3d.ops.cpu.loops import add_multiple, add_squares, SUM_COLUMNS, SUM_ROWS, TILE_ROWS, gate, gate_backward, normalize, normalize_backward
from restormer3d.ops.cpu.simd import LANES
from restormer3d.ops.cpu.strips import (
    bounds,
    clear_unused,
    convolve,
    correlate,
    count_tasks,
    push,
    push_projected,
    ring_size,
    strides,
)
from restormer3d.ops.cpu.tiles import (
    clear_borders,
    compiled,
    load,
    matrix_product,
    part,
    round_up,
    store,
    store_sum,
    sum_product,
    transpose_tile,
)

parallel = numba.njit(parallel=True, fastmath={"contract", "reassoc", "nsz"}, nogil=True, cache=True)


# --- feed-forward network -------------------------------------------------------------------------------------


@compiled
def gdfn_sizes(channels: int, hidden: int, rows: int, width: int) -> tuple[int, ...]:
    """Return the parts of a thread's scratch: ring, input, statistics, gradient, its transpose, gated, value, result."""
    wide, narrow, columns = strides(rows, width)
    return (
        ring_size(2 * hidden, rows, width),
        round_up(channels, LANES) * wide,
        2 * wide + 1,
        round_up(channels, LANES) * narrow,
        columns * round_up(channels, SUM_COLUMNS),
        round_up(hidden, SUM_ROWS) * narrow,
        2 * narrow,
        round_up(channels, TILE_ROWS) * narrow,
    )


@parallel
def gdfn_forward(x: Any, out: Any, w_in: Any, taps: Any, w_out: Any, rows: int, chunks: int, scratch: Any) -> None:
    """Write ``x + w_out @ (gelu(a) * b)``, (a, b) the depth-wise convolved ``w_in @ normalize(x)``."""
    channels, width, hidden = x.shape[1], x.shape[4], w_out.shape[1]
    narrow, columns = strides(rows, width)[1:]
    sizes = gdfn_sizes(channels, hidden, rows, width)
    threads = scratch.shape[0]
    for thread in numba.prange(threads):
        ring, tile, statistics = part(scratch[thread], sizes, 0), part(scratch[thread], sizes, 1), part(scratch[thread], sizes, 2)
        gated, value, result = part(scratch[thread], sizes, 5), part(scratch[thread], sizes, 6), part(scratch[thread], sizes, 7)
        for task in range(thread, count_tasks(x.shape, rows, chunks), threads):
            b, h0, valid, first, last = bounds(task, x.shape, rows, chunks)
            clear_unused(ring, taps.size // 27, rows, width)
            for t in range(first - 1, last + 1):
                push_projected(x, b, t, h0, rows, w_in, ring, tile, statistics)
                if t <= first:
                    continue
                for c in range(hidden):
                    convolve(ring, 2 * hidden, c, t - 1, rows, width, taps, gated, c * narrow)
                    convolve(ring, 2 * hidden, hidden + c, t - 1, rows, width, taps, value, 0)
                    gate(gated, c * narrow, value, 0, gated, c * narrow, columns)
                matrix_product(w_out, gated, 0, narrow, result, 0, narrow, columns)
                store_sum(result, narrow, x, out, b, t - 1, h0, valid)


@parallel
def gdfn_backward(x: Any, grad: Any, w_in: Any, taps: Any, w_out_t: Any, rows: int, chunks: int, scratch: Any, hidden_grad: Any, tap_sums: Any, out_sums: Any) -> None:
    """Write the gradient of the convolution's output; add up the gradients of its weights and of ``w_out``."""
    channels, width, hidden = x.shape[1], x.shape[4], hidden_grad.shape[1] // 2
    narrow, columns = strides(rows, width)[1:]
    sizes = gdfn_sizes(channels, hidden, rows, width)
    threads = scratch.shape[0]
    for thread in numba.prange(threads):
        ring, tile, statistics, gradient = part(scratch[thread], sizes, 0), part(scratch[thread], sizes, 1), part(scratch[thread], sizes, 2), part(scratch[thread], sizes, 3)
        transposed, gated, pair = part(scratch[thread], sizes, 4), part(scratch[thread], sizes, 5), part(scratch[thread], sizes, 6)
        for task in range(thread, count_tasks(x.shape, rows, chunks), threads):
            b, h0, valid, first, last = bounds(task, x.shape, rows, chunks)
            clear_unused(ring, taps.size // 27, rows, width)
            for t in range(first - 1, last + 1):
                push_projected(x, b, t, h0, rows, w_in, ring, tile, statistics)
                if t <= first:
                    continue
                load(grad, b, t - 1, h0, rows, gradient, 0, narrow)
                matrix_product(w_out_t, gradient, 0, narrow, gated, 0, narrow, columns)
                for c in range(hidden):
                    convolve(ring, 2 * hidden, c, t - 1, rows, width, taps, pair, 0)
                    convolve(ring, 2 * hidden, hidden + c, t - 1, rows, width, taps, pair, narrow)
                    gate_backward(pair, 0, pair, narrow, gated, c * narrow, columns)
                    for half in range(2):
                        channel = half * hidden + c
                        correlate(ring, 2 * hidden, channel, t - 1, rows, width, pair, half * narrow, tap_sums[thread], channel * 27 * LANES)
                        store(pair, half * narrow, hidden_grad, b, channel, t - 1, h0, valid)
                clear_borders(gated, hidden, narrow, valid, width)
                transpose_tile(gradient, 0, narrow, channels, columns, transposed, round_up(channels, SUM_COLUMNS))
                sum_product(gated, 0, narrow, transposed, out_sums[thread], hidden, round_up(channels, SUM_COLUMNS), columns)


# --- attention ------------------------------------------------------------------------------------------------


@compiled
def mdta_sizes(channels: int, heads: int, rows: int, width: int) -> tuple[int, ...]:
    """Return the parts of a thread's scratch: ring, input, statistics, gradient, transposed keys, queries and keys, output."""
    wide, narrow, columns = strides(rows, width)
    return (
        ring_size(3 * channels, rows, width),
        round_up(channels, LANES) * wide,
        2 * wide + 1,
        round_up(channels, LANES) * narrow,
        columns * round_up(channels // heads, SUM_COLUMNS),
        round_up(2 * channels + SUM_ROWS, LANES) * narrow,
        round_up(3 * channels, TILE_ROWS) * narrow,
    )


@parallel
def mdta_forward(x: Any, value: Any, w_qkv: Any, taps: Any, heads: int, rows: int, chunks: int, scratch: Any, gram: Any, squares: Any) -> None:
    """Write the values; add up ``queries @ keys.T`` of each head and the squares of every query and key channel."""
    channels, width = x.shape[1], x.shape[4]
    size = channels // heads
    narrow, columns = strides(rows, width)[1:]
    sizes = mdta_sizes(channels, heads, rows, width)
    threads = scratch.shape[0]
    for thread in numba.prange(threads):
        ring, tile, statistics = part(scratch[thread], sizes, 0), part(scratch[thread], sizes, 1), part(scratch[thread], sizes, 2)
        keys_t, qk, v = part(scratch[thread], sizes, 4), part(scratch[thread], sizes, 5), part(scratch[thread], sizes, 6)
        for task in range(thread, count_tasks(x.shape, rows, chunks), threads):
            b, h0, valid, first, last = bounds(task, x.shape, rows, chunks)
            clear_unused(ring, taps.size // 27, rows, width)
            for t in range(first - 1, last + 1):
                push_projected(x, b, t, h0, rows, w_qkv, ring, tile, statistics)
                if t <= first:
                    continue
                for c in range(channels):
                    convolve(ring, 3 * channels, 2 * channels + c, t - 1, rows, width, taps, v, 0)
                    store(v, 0, value, b, c, t - 1, h0, valid)
                for c in range(2 * channels):
                    convolve(ring, 3 * channels, c, t - 1, rows, width, taps, qk, c * narrow)
                clear_borders(qk, 2 * channels, narrow, valid, width)
                for c in range(2 * channels):
                    add_squares(qk, c * narrow, columns, squares[thread, b], c)
                for head in range(heads):
                    keys = (channels + head * size) * narrow
                    transpose_tile(qk, keys, narrow, size, columns, keys_t, round_up(size, SUM_COLUMNS))
                    sum_product(qk, head * size * narrow, narrow, keys_t, gram[thread, b, head], size, round_up(size, SUM_COLUMNS), columns)


@parallel
def mdta_backward(x: Any, grad: Any, w_qkv: Any, taps: Any, from_keys: Any, from_queries: Any, own: Any, from_grad: Any, rows: int, chunks: int, scratch: Any, hidden_grad: Any, tap_sums: Any) -> None:
    """Write the gradient of the convolution's output and add up the gradients of its weights.

    Per sample: queries get ``from_keys @ keys + own * queries``, keys likewise, values ``from_grad @ grad``.
    """
    channels, width, heads = x.shape[1], x.shape[4], from_keys.shape[1]
    size = channels // heads
    narrow, columns = strides(rows, width)[1:]
    sizes = mdta_sizes(channels, heads, rows, width)
    threads = scratch.shape[0]
    for thread in numba.prange(threads):
        ring, tile, statistics, gradient = part(scratch[thread], sizes, 0), part(scratch[thread], sizes, 1), part(scratch[thread], sizes, 2), part(scratch[thread], sizes, 3)
        qk, out = part(scratch[thread], sizes, 5), part(scratch[thread], sizes, 6)
        for task in range(thread, count_tasks(x.shape, rows, chunks), threads):
            b, h0, valid, first, last = bounds(task, x.shape, rows, chunks)
            clear_unused(ring, taps.size // 27, rows, width)
            for t in range(first - 1, last + 1):
                push_projected(x, b, t, h0, rows, w_qkv, ring, tile, statistics)
                if t <= first:
                    continue
                for c in range(2 * channels):
                    convolve(ring, 3 * channels, c, t - 1, rows, width, taps, qk, c * narrow)
                clear_borders(qk, 2 * channels, narrow, valid, width)
                load(grad, b, t - 1, h0, rows, gradient, 0, narrow)
                for head in range(heads):
                    queries, keys = head * size * narrow, (channels + head * size) * narrow
                    matrix_product(from_keys[b, head], qk, keys, narrow, out, queries, narrow, columns)
                for head in range(heads):
                    queries, keys = head * size * narrow, (channels + head * size) * narrow
                    matrix_product(from_queries[b, head], qk, queries, narrow, out, keys, narrow, columns)
                matrix_product(from_grad[b], gradient, 0, narrow, out, 2 * channels * narrow, narrow, columns)
                for c in range(2 * channels):
                    add_multiple(qk, own[b], c, out, c * narrow, columns)
                for c in range(3 * channels):
                    correlate(ring, 3 * channels, c, t - 1, rows, width, out, c * narrow, tap_sums[thread], c * 27 * LANES)
                    store(out, c * narrow, hidden_grad, b, c, t - 1, h0, valid)


# --- what both share: back through the depth-wise convolution, the 1x1x1 convolution and LayerNorm ------------


@compiled
def project_sizes(channels: int, hidden: int, rows: int, width: int) -> tuple[int, ...]:
    """Return the parts of a thread's scratch: ring, hidden gradient, input, its transpose, statistics, result."""
    narrow, columns = strides(rows, width)[1:]
    return (
        ring_size(hidden, rows, width),
        round_up(hidden, SUM_ROWS) * narrow,
        round_up(channels, LANES) * narrow,
        columns * round_up(channels, SUM_COLUMNS),
        2 * narrow + 1,
        round_up(channels, TILE_ROWS) * narrow,
    )


@parallel
def project_backward(x: Any, grad: Any, hidden_grad: Any, weight_t: Any, taps: Any, rows: int, chunks: int, scratch: Any, out: Any, sums: Any) -> None:
    """Write the gradient of x, the residual's included; add up the gradient of the 1x1x1 weights. ``taps`` are reversed."""
    channels, width, hidden = x.shape[1], x.shape[4], hidden_grad.shape[1]
    narrow, columns = strides(rows, width)[1:]
    sizes = project_sizes(channels, hidden, rows, width)
    threads = scratch.shape[0]
    for thread in numba.prange(threads):
        ring, inner, tile = part(scratch[thread], sizes, 0), part(scratch[thread], sizes, 1), part(scratch[thread], sizes, 2)
        transposed, statistics, result = part(scratch[thread], sizes, 3), part(scratch[thread], sizes, 4), part(scratch[thread], sizes, 5)
        for task in range(thread, count_tasks(x.shape, rows, chunks), threads):
            b, h0, valid, first, last = bounds(task, x.shape, rows, chunks)
            clear_unused(ring, hidden, rows, width)
            for t in range(first - 1, last + 1):
                push(hidden_grad, b, t, h0, rows, ring)
                if t <= first:
                    continue
                for c in range(hidden):
                    convolve(ring, hidden, c, t - 1, rows, width, taps, inner, c * narrow)
                clear_borders(inner, hidden, narrow, valid, width)
                load(x, b, t - 1, h0, rows, tile, 0, narrow)
                normalize(tile, narrow, channels, columns, statistics)
                transpose_tile(tile, 0, narrow, channels, columns, transposed, round_up(channels, SUM_COLUMNS))
                sum_product(inner, 0, narrow, transposed, sums[thread], hidden, round_up(channels, SUM_COLUMNS), columns)
                matrix_product(weight_t, inner, 0, narrow, result, 0, narrow, columns)
                normalize_backward(tile, result, narrow, channels, columns, statistics)
                store_sum(result, narrow, grad, out, b, t - 1, h0, valid)


# --- the depth-wise convolution alone -------------------------------------------------------------------------


@compiled
def depthwise_sizes(rows: int, width: int) -> tuple[int, ...]:
    """Return the parts of a thread's scratch: ring of the input, ring of the gradient, result."""
    return ring_size(1, rows, width), ring_size(1, rows, width), strides(rows, width)[1]


@parallel
def depthwise_forward(x: Any, out: Any, taps: Any, rows: int, chunks: int, scratch: Any) -> None:
    """Convolve x (B * C, 1, T, H, W) with taps (C, 27)."""
    threads = scratch.shape[0]
    width = x.shape[4]
    sizes = depthwise_sizes(rows, width)
    for thread in numba.prange(threads):
        ring, result = part(scratch[thread], sizes, 0), part(scratch[thread], sizes, 2)
        for task in range(thread, count_tasks(x.shape, rows, chunks), threads):
            b, h0, valid, first, last = bounds(task, x.shape, rows, chunks)
            weights = taps[b % taps.shape[0]]
            for t in range(first - 1, last + 1):
                push(x, b, t, h0, rows, ring)
                if t > first:
                    convolve(ring, 1, 0, t - 1, rows, width, weights, result, 0)
                    store(result, 0, out, b, 0, t - 1, h0, valid)


@parallel
def depthwise_backward(x: Any, grad: Any, out: Any, taps: Any, rows: int, chunks: int, scratch: Any, tap_sums: Any) -> None:
    """Write the gradient of x (B * C, 1, T, H, W) and add up that of the weights. ``taps`` (C, 27) are reversed."""
    threads = scratch.shape[0]
    width = x.shape[4]
    sizes = depthwise_sizes(rows, width)
    size = TILE_ROWS * strides(rows, width)[0]
    for thread in numba.prange(threads):
        ring, grads, result = part(scratch[thread], sizes, 0), part(scratch[thread], sizes, 1), part(scratch[thread], sizes, 2)
        for task in range(thread, count_tasks(x.shape, rows, chunks), threads):
            clear_unused(ring, 1, rows, width)
            b, h0, valid, first, last = bounds(task, x.shape, rows, chunks)
            c = b % taps.shape[0]
            for t in range(first - 1, last + 1):
                push(x, b, t, h0, rows, ring)
                push(grad, b, t, h0, rows, grads)
                if t > first:
                    convolve(grads, 1, 0, t - 1, rows, width, taps[c], result, 0)
                    store(result, 0, out, b, 0, t - 1, h0, valid)
                    inside = (t - 1) % 3 * size + width + 1
                    correlate(ring, 1, 0, t - 1, rows, width, grads, inside, tap_sums[thread], c * 27 * LANES)
