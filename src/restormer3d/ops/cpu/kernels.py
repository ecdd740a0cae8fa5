"""The fused kernels of the CPU engine: each walks strips of rows through time and keeps what it needs in cache.

When a frame arrives it is normalized, multiplied by the 1x1x1 weights and put into a ring of the three latest frames;
then the depth-wise convolution of the frame before it can be finished, and what follows (gate, Gram matrix,
projection) happens on that one tile.

Every thread has its own scratch and its own sums: results do not depend on timing. Arguments of all kernels:
``x`` and ``grad`` (B, C, T, H, W); ``taps``, 27 per channel, flat; weights with their rows filled up to TILE_ROWS;
``rows`` of a strip; ``chunks``, pieces of the time axis; ``scratch`` (threads, floats).
"""

from __future__ import annotations

from typing import Any

import numba

from restormer3d.ops.cpu.compiler import compiled, parallel
from restormer3d.ops.cpu.loops import (
    SUM_COLUMNS,
    SUM_ROWS,
    TILE_ROWS,
    add_multiple,
    add_squares,
    gate,
    gate_backward,
    normalize,
    normalize_backward,
)
from restormer3d.ops.cpu.simd import LANES
from restormer3d.ops.cpu.strips import (
    bounds,
    clear_unused,
    convolve,
    convolve_add,
    convolve_to_image,
    correlate,
    correlate_with_image,
    count_tasks,
    fills_rows,
    push,
    push_projected,
    ring_size,
    strides,
)
from restormer3d.ops.cpu.tiles import (
    Floats,
    clear_borders,
    load,
    matrix_product,
    part,
    round_up,
    store,
    store_sum,
    sum_product,
    transpose_tile,
)

TAPS = 27 * LANES
"""Floats of one channel's weight gradient: every lane has its own sums."""


@compiled
def gdfn_sizes(channels: int, hidden: int, rows: int, width: int) -> tuple[int, ...]:
    """Return the sizes of a thread's scratch for the feed-forward network."""
    wide, narrow, columns = strides(rows, width)
    return (
        ring_size(2 * hidden, rows, width),
        round_up(channels, LANES) * wide,  # input
        2 * wide,  # its statistics
        round_up(channels, LANES) * narrow,  # gradient
        columns * round_up(channels, SUM_COLUMNS),  # its transpose
        (round_up(hidden, SUM_ROWS) + TILE_ROWS) * narrow,  # gated
        2 * narrow,  # the two factors of one gated channel
        round_up(channels, TILE_ROWS) * narrow,  # result
    )


@parallel
def gdfn_forward(
    x: Floats, out: Floats, w_in: Floats, taps: Floats, w_out: Floats, rows: int, chunks: int, scratch: Floats
) -> None:
    """Write ``x + w_out @ (gelu(a) * b)``, (a, b) the depth-wise convolved ``w_in @ normalize(x)``."""
    channels, width, hidden = x.shape[1], x.shape[4], w_out.shape[1]
    narrow, columns = strides(rows, width)[1:]
    sizes = gdfn_sizes(channels, hidden, rows, width)
    threads = scratch.shape[0]
    for thread in numba.prange(threads):
        own = scratch[thread]
        ring, tile, statistics = part(own, sizes, 0), part(own, sizes, 1), part(own, sizes, 2)
        gated, pair, result = part(own, sizes, 5), part(own, sizes, 6), part(own, sizes, 7)
        for task in range(thread, count_tasks(x.shape, rows, chunks), threads):
            b, h0, inside, first, last = bounds(task, x.shape, rows, chunks)
            clear_unused(ring, 2 * hidden, rows, width)
            for t in range(first - 1, last + 1):
                push_projected(x, b, t, h0, rows, w_in, ring, tile, statistics)
                if t <= first:
                    continue
                for c in range(hidden):
                    for half in range(2):
                        channel = half * hidden + c
                        convolve(ring, 2 * hidden, channel, t - 1, rows, width, taps, 27 * channel, pair, half * narrow)
                    gate(pair, 0, narrow, gated, c * narrow, columns)
                matrix_product(w_out, gated, 0, narrow, result, 0, narrow, columns)
                store_sum(result, narrow, x, out, b, t - 1, h0, inside)


@parallel
def gdfn_backward(
    x: Floats, grad: Floats, w_in: Floats, taps: Floats, w_out_t: Floats, rows: int, chunks: int, scratch: Floats,
    hidden_grad: Floats, tap_sums: Floats, out_sums: Floats,
) -> None:  # fmt: skip
    """Write the gradient of the convolution's output; add up the gradients of its weights and of ``w_out``."""
    channels, width, hidden = x.shape[1], x.shape[4], hidden_grad.shape[1] // 2
    narrow, columns = strides(rows, width)[1:]
    sizes = gdfn_sizes(channels, hidden, rows, width)
    threads = scratch.shape[0]
    for thread in numba.prange(threads):
        own = scratch[thread]
        ring, tile, statistics = part(own, sizes, 0), part(own, sizes, 1), part(own, sizes, 2)
        gradient, transposed = part(own, sizes, 3), part(own, sizes, 4)
        gated, pair = part(own, sizes, 5), part(own, sizes, 6)
        for task in range(thread, count_tasks(x.shape, rows, chunks), threads):
            b, h0, inside, first, last = bounds(task, x.shape, rows, chunks)
            clear_unused(ring, 2 * hidden, rows, width)
            for t in range(first - 1, last + 1):
                push_projected(x, b, t, h0, rows, w_in, ring, tile, statistics)
                if t <= first:
                    continue
                load(grad, b, t - 1, h0, rows, gradient, 0, narrow)
                matrix_product(w_out_t, gradient, 0, narrow, gated, 0, narrow, columns)
                for c in range(hidden):
                    for half in range(2):
                        channel = half * hidden + c
                        convolve(ring, 2 * hidden, channel, t - 1, rows, width, taps, 27 * channel, pair, half * narrow)
                    gate_backward(pair, 0, narrow, gated, c * narrow, columns)
                    for half in range(2):
                        channel = half * hidden + c
                        correlate(
                            ring, 2 * hidden, channel, t - 1, rows, width, pair, half * narrow, tap_sums[thread],
                            channel * TAPS,
                        )  # fmt: skip
                        store(pair, half * narrow, hidden_grad, b, channel, t - 1, h0, inside)
                clear_borders(gated, hidden, narrow, inside, width)
                transpose_tile(gradient, 0, narrow, channels, columns, transposed, round_up(channels, SUM_COLUMNS))
                sum_product(gated, 0, narrow, transposed, out_sums[thread], hidden, columns)


@compiled
def mdta_sizes(channels: int, heads: int, rows: int, width: int) -> tuple[int, ...]:
    """Return the sizes of a thread's scratch for the attention."""
    wide, narrow, columns = strides(rows, width)
    return (
        ring_size(3 * channels, rows, width),
        round_up(channels, LANES) * wide,  # input
        2 * wide,  # its statistics
        round_up(channels, LANES) * narrow,  # gradient
        columns * round_up(channels // heads, SUM_COLUMNS),  # transposed keys of one head
        (2 * channels + SUM_ROWS + LANES) * narrow,  # queries and keys
        (3 * channels + TILE_ROWS) * narrow,  # values, or the gradients of all three
    )


@parallel
def mdta_forward(
    x: Floats, value: Floats, w_qkv: Floats, taps: Floats, heads: int, rows: int, chunks: int, scratch: Floats,
    gram: Floats, squares: Floats,
) -> None:  # fmt: skip
    """Write the values; add up ``queries @ keys.T`` of each head and the squares of every query and key channel."""
    channels, width = x.shape[1], x.shape[4]
    size = channels // heads
    narrow, columns = strides(rows, width)[1:]
    sizes = mdta_sizes(channels, heads, rows, width)
    threads = scratch.shape[0]
    for thread in numba.prange(threads):
        own = scratch[thread]
        ring, tile, statistics = part(own, sizes, 0), part(own, sizes, 1), part(own, sizes, 2)
        keys_t, qk, v = part(own, sizes, 4), part(own, sizes, 5), part(own, sizes, 6)
        for task in range(thread, count_tasks(x.shape, rows, chunks), threads):
            b, h0, inside, first, last = bounds(task, x.shape, rows, chunks)
            clear_unused(ring, 3 * channels, rows, width)
            for t in range(first - 1, last + 1):
                push_projected(x, b, t, h0, rows, w_qkv, ring, tile, statistics)
                if t <= first:
                    continue
                for c in range(channels):
                    channel = 2 * channels + c
                    if fills_rows(inside, width):
                        convolve_to_image(
                            ring, 3 * channels, channel, t - 1, inside, rows, taps, 27 * channel, value, b, c, h0
                        )
                        continue
                    convolve(ring, 3 * channels, channel, t - 1, rows, width, taps, 27 * channel, v, 0)
                    store(v, 0, value, b, c, t - 1, h0, inside)
                for c in range(2 * channels):
                    convolve(ring, 3 * channels, c, t - 1, rows, width, taps, 27 * c, qk, c * narrow)
                clear_borders(qk, 2 * channels, narrow, inside, width)
                for c in range(2 * channels):
                    add_squares(qk, c * narrow, columns, squares[thread, b], c)
                for head in range(heads):
                    keys = (channels + head * size) * narrow
                    transpose_tile(qk, keys, narrow, size, columns, keys_t, round_up(size, SUM_COLUMNS))
                    sum_product(qk, head * size * narrow, narrow, keys_t, gram[thread, b, head], size, columns)


@parallel
def mdta_backward(
    x: Floats, grad: Floats, w_qkv: Floats, taps: Floats, from_keys: Floats, from_queries: Floats, own: Floats,
    from_grad: Floats, rows: int, chunks: int, scratch: Floats, hidden_grad: Floats, tap_sums: Floats,
) -> None:  # fmt: skip
    """Write the gradient of the convolution's output and add up the gradients of its weights.

    Per sample: queries get ``from_keys @ keys + own * queries``, keys likewise, values ``from_grad @ grad``.
    """
    channels, width, heads = x.shape[1], x.shape[4], from_keys.shape[1]
    size = channels // heads
    narrow, columns = strides(rows, width)[1:]
    sizes = mdta_sizes(channels, heads, rows, width)
    threads = scratch.shape[0]
    for thread in numba.prange(threads):
        mine = scratch[thread]
        ring, tile, statistics = part(mine, sizes, 0), part(mine, sizes, 1), part(mine, sizes, 2)
        gradient, qk, out = part(mine, sizes, 3), part(mine, sizes, 5), part(mine, sizes, 6)
        for task in range(thread, count_tasks(x.shape, rows, chunks), threads):
            b, h0, inside, first, last = bounds(task, x.shape, rows, chunks)
            clear_unused(ring, 3 * channels, rows, width)
            for t in range(first - 1, last + 1):
                push_projected(x, b, t, h0, rows, w_qkv, ring, tile, statistics)
                if t <= first:
                    continue
                for c in range(2 * channels):
                    convolve(ring, 3 * channels, c, t - 1, rows, width, taps, 27 * c, qk, c * narrow)
                clear_borders(qk, 2 * channels, narrow, inside, width)
                load(grad, b, t - 1, h0, rows, gradient, 0, narrow)
                # A head's product may run over into the rows after it, which are written later.
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
                    correlate(ring, 3 * channels, c, t - 1, rows, width, out, c * narrow, tap_sums[thread], c * TAPS)
                    store(out, c * narrow, hidden_grad, b, c, t - 1, h0, inside)


@compiled
def project_sizes(channels: int, hidden: int, rows: int, width: int) -> tuple[int, ...]:
    """Return the sizes of a thread's scratch for the way back through convolution, projection and LayerNorm."""
    narrow, columns = strides(rows, width)[1:]
    return (
        ring_size(hidden, rows, width),
        round_up(hidden, SUM_ROWS) * narrow,  # gradient of the projection's output
        round_up(channels, LANES) * narrow,  # input
        columns * round_up(channels, SUM_COLUMNS),  # its transpose
        2 * narrow,  # its statistics
        round_up(channels, TILE_ROWS) * narrow,  # result
    )


@parallel
def project_backward(
    x: Floats, grad: Floats, hidden_grad: Floats, weight_t: Floats, taps: Floats, rows: int, chunks: int,
    scratch: Floats, out: Floats, sums: Floats,
) -> None:  # fmt: skip
    """Write the gradient of x, the residual's included; add up that of the 1x1x1 weights. ``taps`` are reversed."""
    channels, width, hidden = x.shape[1], x.shape[4], hidden_grad.shape[1]
    narrow, columns = strides(rows, width)[1:]
    sizes = project_sizes(channels, hidden, rows, width)
    threads = scratch.shape[0]
    for thread in numba.prange(threads):
        own = scratch[thread]
        ring, inner, tile = part(own, sizes, 0), part(own, sizes, 1), part(own, sizes, 2)
        transposed, statistics, result = part(own, sizes, 3), part(own, sizes, 4), part(own, sizes, 5)
        for task in range(thread, count_tasks(x.shape, rows, chunks), threads):
            b, h0, inside, first, last = bounds(task, x.shape, rows, chunks)
            clear_unused(ring, hidden, rows, width)
            for t in range(first - 1, last + 1):
                push(hidden_grad, b, t, h0, rows, ring)
                if t <= first:
                    continue
                for c in range(hidden):
                    convolve(ring, hidden, c, t - 1, rows, width, taps, 27 * c, inner, c * narrow)
                clear_borders(inner, hidden, narrow, inside, width)
                load(x, b, t - 1, h0, rows, tile, 0, narrow)
                normalize(tile, narrow, channels, columns, statistics)
                transpose_tile(tile, 0, narrow, channels, columns, transposed, round_up(channels, SUM_COLUMNS))
                sum_product(inner, 0, narrow, transposed, sums[thread], hidden, columns)
                matrix_product(weight_t, inner, 0, narrow, result, 0, narrow, columns)
                normalize_backward(tile, result, narrow, channels, columns, statistics)
                store_sum(result, narrow, grad, out, b, t - 1, h0, inside)


@compiled
def convolution_sizes(inputs: int, outputs: int, rows: int, width: int) -> tuple[int, ...]:
    """Return the sizes of a thread's scratch for a 3x3x3 convolution: the ring, and outputs or their gradients."""
    return ring_size(inputs, rows, width), outputs * strides(rows, width)[1]


@parallel
def convolution_forward(x: Floats, out: Floats, taps: Any, rows: int, chunks: int, scratch: Floats) -> None:
    """Convolve with ``taps`` (sets, outputs, inputs * 27); sample b takes set b modulo their number."""
    width, inputs, outputs = x.shape[4], x.shape[1], out.shape[1]
    sizes = convolution_sizes(inputs, outputs, rows, width)
    threads = scratch.shape[0]
    for thread in numba.prange(threads):
        ring, result = part(scratch[thread], sizes, 0), part(scratch[thread], sizes, 1)
        for task in range(thread, count_tasks(x.shape, rows, chunks), threads):
            b, h0, inside, first, last = bounds(task, x.shape, rows, chunks)
            for t in range(first - 1, last + 1):
                push(x, b, t, h0, rows, ring)
                if t <= first:
                    continue
                for output in range(outputs):
                    weights = taps[b % taps.shape[0], output]
                    if inputs == 1 and fills_rows(inside, width):
                        convolve_to_image(ring, 1, 0, t - 1, inside, rows, weights, 0, out, b, output, h0)
                        continue
                    convolve(ring, inputs, 0, t - 1, rows, width, weights, 0, result, 0)
                    for c in range(1, inputs):
                        convolve_add(ring, inputs, c, t - 1, rows, width, weights, 27 * c, result, 0)
                    store(result, 0, out, b, output, t - 1, h0, inside)


@parallel
def convolution_weight_gradient(
    x: Floats, grad: Floats, sets: int, rows: int, chunks: int, scratch: Floats, sums: Floats
) -> None:
    """Add up the weight gradient of :func:`convolution_forward` in ``sums`` (threads, sets, outputs, inputs * TAPS)."""
    width, inputs, outputs = x.shape[4], x.shape[1], grad.shape[1]
    narrow = strides(rows, width)[1]
    sizes = convolution_sizes(inputs, outputs, rows, width)
    threads = scratch.shape[0]
    for thread in numba.prange(threads):
        ring, gradient = part(scratch[thread], sizes, 0), part(scratch[thread], sizes, 1)
        for task in range(thread, count_tasks(x.shape, rows, chunks), threads):
            b, h0, inside, first, last = bounds(task, x.shape, rows, chunks)
            clear_unused(ring, inputs, rows, width)
            for t in range(first - 1, last + 1):
                push(x, b, t, h0, rows, ring)
                if t <= first:
                    continue
                in_place = fills_rows(inside, width)
                if not in_place:
                    load(grad, b, t - 1, h0, rows, gradient, 0, narrow)
                for output in range(outputs):
                    mine = sums[thread, b % sets, output]
                    for c in range(inputs):
                        if in_place:
                            correlate_with_image(
                                ring, inputs, c, t - 1, inside, rows, grad, b, output, h0, mine, c * TAPS
                            )
                            continue
                        correlate(ring, inputs, c, t - 1, rows, width, gradient, output * narrow, mine, c * TAPS)
