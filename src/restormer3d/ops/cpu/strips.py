"""Strips of rows on their way through time: how a tensor is split into tasks, and the ring of three tiles.

A ring holds the three latest frames of a strip, with one row above and one below it; frame t lies in slot t modulo 3.
"""

from __future__ import annotations

from typing import Any

from restormer3d.ops.cpu.compiler import compiled
from restormer3d.ops.cpu.loops import (
    BLOCK,
    TILE_ROWS,
    clear,
    depthwise,
    depthwise_add,
    depthwise_weight_gradient,
    depthwise_weight_gradient_whole,
    normalize,
)
from restormer3d.ops.cpu.simd import LANES
from restormer3d.ops.cpu.tiles import Floats, load, matrix_product, round_up


@compiled
def strides(rows: int, width: int) -> tuple[int, int, int]:
    """Return floats per channel in a ring tile (``rows + 2`` rows), in a tile, and its columns for products."""
    inside = rows * (width + 1)
    wide = round_up(inside + 2 * (width + 1) + 1, LANES)
    return wide, round_up(inside + 1 + LANES, LANES), round_up(inside, LANES)


@compiled
def ring_size(channels: int, rows: int, width: int) -> int:
    """Return the floats of a ring of three tiles."""
    return 3 * round_up(channels, TILE_ROWS) * strides(rows, width)[0] + 2 * LANES


@compiled
def count_tasks(shape: Any, rows: int, chunks: int) -> int:
    """Return into how many tasks a tensor is split: samples x strips x pieces of time."""
    return shape[0] * ((shape[3] + rows - 1) // rows) * chunks


@compiled
def bounds(task: int, shape: Any, rows: int, chunks: int) -> tuple[int, int, int, int, int]:
    """Return sample, first row, number of rows inside the image, first frame and frame after the last."""
    strips = (shape[3] + rows - 1) // rows
    b, rest = task // (strips * chunks), task % (strips * chunks)
    h0, chunk = rest // chunks * rows, rest % chunks
    return b, h0, min(rows, shape[3] - h0), shape[2] * chunk // chunks, shape[2] * (chunk + 1) // chunks


@compiled
def clear_unused(ring: Floats, channels: int, rows: int, width: int) -> None:
    """Set to zero what no frame fills but a vector may touch: a stale NaN there would spread."""
    stride = strides(rows, width)[0]
    size = round_up(channels, TILE_ROWS) * stride
    for slot in range(3):
        clear(ring, slot * size + channels * stride, size - channels * stride)
    clear(ring, 3 * size, ring.size - 3 * size)


@compiled
def push(src: Floats, b: int, t: int, h0: int, rows: int, ring: Floats) -> None:
    """Put frame t of ``src``, with one row above and below, into the ring."""
    stride = strides(rows, src.shape[4])[0]
    slot = (t + 3) % 3 * round_up(src.shape[1], TILE_ROWS) * stride
    load(src, b, t, h0 - 1, rows + 2, ring, slot, stride)


@compiled
def push_projected(
    x: Floats, b: int, t: int, h0: int, rows: int, weight: Floats, ring: Floats, tile: Floats, statistics: Floats
) -> None:
    """Put ``weight @ (x / std(x))`` of frame t, with one row above and below, into the ring."""
    stride = strides(rows, x.shape[4])[0]
    slot = (t + 3) % 3 * weight.shape[0] * stride
    if 0 <= t < x.shape[2]:
        load(x, b, t, h0 - 1, rows + 2, tile, 0, stride)
        normalize(tile, stride, x.shape[1], stride, statistics)
        matrix_product(weight, tile, 0, stride, ring, slot, stride, stride)
    else:
        clear(ring, slot, weight.shape[0] * stride)


@compiled
def around(channels: int, c: int, t: int, rows: int, width: int) -> tuple[int, int, int]:
    """Return where channel c of the frames t - 1, t and t + 1 begins in a ring."""
    stride = strides(rows, width)[0]
    size = round_up(channels, TILE_ROWS) * stride
    return (t + 2) % 3 * size + c * stride, t % 3 * size + c * stride, (t + 1) % 3 * size + c * stride


@compiled
def convolve(
    ring: Floats, channels: int, c: int, t: int, rows: int, width: int, taps: Floats, it: int, out: Floats, io: int
) -> None:
    """Convolve channel c of the ring around frame t into a tile."""
    i0, i1, i2 = around(channels, c, t, rows, width)
    depthwise(ring, i0, i1, i2, width + 1, taps, it, out, io + 1, width + 1, rows, width)


@compiled
def convolve_add(
    ring: Floats, channels: int, c: int, t: int, rows: int, width: int, taps: Floats, it: int, out: Floats, io: int
) -> None:
    """As :func:`convolve`, added to the tile."""
    i0, i1, i2 = around(channels, c, t, rows, width)
    depthwise_add(ring, i0, i1, i2, width + 1, taps, it, out, io + 1, width + 1, rows, width)


@compiled
def fills_rows(rows: int, width: int) -> bool:
    """Say whether vectors and blocks of rows end where an image does: it can then be read and written in place."""
    return width % LANES == 0 and rows % BLOCK == 0


@compiled
def convolve_to_image(
    ring: Floats, channels: int, c: int, t: int, inside: int, rows: int, taps: Floats, it: int, out: Floats, b: int,
    o: int, h0: int,
) -> None:  # fmt: skip
    """Convolve channel c around frame t into channel o of a tensor whose ``inside`` rows it :func:`fills_rows`."""
    outputs, frames, height, width = out.shape[1:]
    i0, i1, i2 = around(channels, c, t, rows, width)
    first = (((b * outputs + o) * frames + t) * height + h0) * width
    depthwise(ring, i0, i1, i2, width + 1, taps, it, out, first, width, inside, width)


@compiled
def correlate(
    ring: Floats, channels: int, c: int, t: int, rows: int, width: int, grad: Floats, ig: int, sums: Floats, isum: int
) -> None:
    """Add to 27 weight gradients, given frame t's gradient of the convolution of channel c, in a tile."""
    i0, i1, i2 = around(channels, c, t, rows, width)
    depthwise_weight_gradient(ring, i0, i1, i2, width + 1, grad, ig + 1, width + 1, 0, sums, isum, rows, width)


@compiled
def correlate_with_image(
    ring: Floats, channels: int, c: int, t: int, inside: int, rows: int, grad: Floats, b: int, o: int, h0: int,
    sums: Floats, isum: int,
) -> None:  # fmt: skip
    """As :func:`correlate`, with channel o of a tensor whose ``inside`` rows it :func:`fills_rows`."""
    outputs, frames, height, width = grad.shape[1:]
    i0, i1, i2 = around(channels, c, t, rows, width)
    first = (((b * outputs + o) * frames + t) * height + h0) * width
    ahead = height * width
    depthwise_weight_gradient_whole(ring, i0, i1, i2, width + 1, grad, first, width, ahead, sums, isum, inside, width)
