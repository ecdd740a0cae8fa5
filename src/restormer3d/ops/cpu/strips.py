"""Strips of rows on their way through time: how a tensor is split into tasks, and the ring of three tiles."""

from __future__ import annotations

from typing import Any

from restormer3d.ops.cpu.loops import TILE_ROWS, clear, depthwise, depthwise_weight_gradient, normalize
from restormer3d.ops.cpu.simd import LANES
from restormer3d.ops.cpu.tiles import compiled, load, matrix_product, round_up


@compiled
def strides(rows: int, width: int) -> tuple[int, int, int]:
    """Return floats per channel in a ring tile (``rows + 2`` rows), in a tile, and its columns for products."""
    pitch = width + 1
    return round_up((rows + 2) * pitch + 1, LANES), round_up(rows * pitch + 1 + LANES, LANES), round_up(rows * pitch, LANES)


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
def clear_unused(ring: Any, channels: int, rows: int, width: int) -> None:
    """Set to zero what no frame fills but a vector may touch: a stale NaN there would spread."""
    stride = strides(rows, width)[0]
    size = round_up(channels, TILE_ROWS) * stride
    for slot in range(3):
        clear(ring, slot * size + channels * stride, size - channels * stride)
    clear(ring, 3 * size, ring.size - 3 * size)


@compiled
def push(src: Any, b: int, t: int, h0: int, rows: int, ring: Any) -> None:
    """Put frame t of ``src``, with one row above and below, into the ring."""
    stride = strides(rows, src.shape[4])[0]
    load(src, b, t, h0 - 1, rows + 2, ring, (t + 3) % 3 * round_up(src.shape[1], TILE_ROWS) * stride, stride)


@compiled
def push_projected(x: Any, b: int, t: int, h0: int, rows: int, weight: Any, ring: Any, tile: Any, statistics: Any) -> None:
    """Put ``weight @ (x / std(x))`` of frame t, with one row above and below, into the ring."""
    channels = x.shape[1]
    stride = strides(rows, x.shape[4])[0]
    slot = (t + 3) % 3 * weight.shape[0] * stride
    if 0 <= t < x.shape[2]:
        load(x, b, t, h0 - 1, rows + 2, tile, 0, stride)
        normalize(tile, stride, channels, stride, statistics)
        matrix_product(weight, tile, 0, stride, ring, slot, stride, stride)
    else:
        clear(ring, slot, weight.shape[0] * stride)


@compiled
def convolve(ring: Any, channels: int, c: int, t: int, rows: int, width: int, taps: Any, out: Any, io: int) -> None:
    """Convolve channel c of the ring around frame t into a tile."""
    stride = strides(rows, width)[0]
    size = round_up(channels, TILE_ROWS) * stride
    i0, i1, i2 = (t + 2) % 3 * size, t % 3 * size, (t + 1) % 3 * size
    i = c * stride
    depthwise(ring, i + i0, i + i1, i + i2, width + 1, taps, 27 * c, out, io + 1, rows, width)


@compiled
def correlate(ring: Any, channels: int, c: int, t: int, rows: int, width: int, grad: Any, ig: int, sums: Any, isum: int) -> None:
    """Add to channel c's 27 weight gradients, given frame t's gradient of the convolution."""
    stride = strides(rows, width)[0]
    size = round_up(channels, TILE_ROWS) * stride
    i0, i1, i2 = (t + 2) % 3 * size, t % 3 * size, (t + 1) % 3 * size
    i = c * stride
    depthwise_weight_gradient(ring, i + i0, i + i1, i + i2, width + 1, grad, ig + 1, sums, isum, rows, width)
