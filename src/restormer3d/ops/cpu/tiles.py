"""Tiles of a tensor in cache: loading them with their zero borders, storing them, and products of them.

See :mod:`restormer3d.ops.cpu.loops` for the layout of a tile. These functions are called by Numba code only.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from restormer3d.ops.cpu.compiler import compiled
from restormer3d.ops.cpu.loops import (
    SUM_COLUMNS,
    SUM_ROWS,
    TILE_ROWS,
    clear,
    load_rows,
    store_row_sums,
    store_rows,
    sum_tile,
    tile1,
    tile2,
    tile3,
    transpose,
)
from restormer3d.ops.cpu.simd import LANES

Floats = np.ndarray[Any, np.dtype[np.float32]]
"""A C-contiguous float32 array, in Numba code."""


@compiled
def round_up(n: int, step: int) -> int:
    """Round up to a multiple of ``step``."""
    return (n + step - 1) // step * step


@compiled
def room(size: int) -> int:
    """Return the floats set aside for a part of the scratch: vectors may run over its end."""
    return round_up(size + 2 * LANES, LANES)


@compiled
def part(scratch: Floats, sizes: Any, index: int) -> Any:
    """Return one part of a thread's scratch, laid out by the sizes of its parts."""
    start = 0
    for i in range(index):
        start += room(sizes[i])
    return scratch[start : start + room(sizes[index])]


@compiled
def load(src: Floats, b: int, t: int, h0: int, rows: int, dst: Floats, i: int, stride: int) -> None:
    """Copy rows ``h0…h0+rows`` of frame t of every channel into a tile; what lies outside of the tensor is zero."""
    channels, frames, height, width = src.shape[1:]
    pitch = width + 1
    above = max(0, -h0)
    inside = min(rows, height - h0) - above if 0 <= t < frames else 0
    # Three channels on: they lie too far apart for the processor to guess. The frames of a single channel do not.
    ahead = (3 * frames if channels > 1 else 1) * height * width
    for c in range(channels):
        base = i + c * stride
        clear(dst, base, above * pitch)
        first = base + above * pitch
        load_rows(
            src, (((b * channels + c) * frames + t) * height + h0 + above) * width, dst, first, inside, width, ahead
        )
        clear(dst, first + inside * pitch, base + stride - first - inside * pitch)


@compiled
def store(src: Floats, i: int, dst: Floats, b: int, c: int, t: int, h0: int, rows: int) -> None:
    """Copy ``rows`` rows of one channel of a tile into frame t of the tensor."""
    channels, frames, height, width = dst.shape[1:]
    store_rows(src, i, dst, (((b * channels + c) * frames + t) * height + h0) * width, rows, width)


@compiled
def store_sum(src: Floats, stride: int, add: Floats, dst: Floats, b: int, t: int, h0: int, rows: int) -> None:
    """Write ``add`` plus the tile into frame t of the tensor, every channel."""
    channels, frames, height, width = dst.shape[1:]
    for c in range(channels):
        store_row_sums(
            src, c * stride, add, dst, (((b * channels + c) * frames + t) * height + h0) * width, rows, width
        )


@compiled
def clear_borders(tile: Floats, channels: int, stride: int, rows: int, width: int) -> None:
    """Set everything but the first ``rows`` rows of each channel to zero, the column between rows included."""
    pitch = width + 1
    for c in range(channels):
        base = c * stride
        for r in range(rows):
            clear(tile, base + r * pitch, 1)
        clear(tile, base + rows * pitch, stride - rows * pitch)


@compiled
def matrix_product(a: Floats, b: Floats, ib: int, ldb: int, c: Floats, ic: int, ldc: int, columns: int) -> None:
    """Write ``c = a @ b[:, :columns]``; a has a multiple of TILE_ROWS rows, columns is a multiple of LANES."""
    rows, depth = a.shape
    flat = a.reshape(-1)
    for j in range(0, columns, 3 * LANES):
        left = columns - j
        for m in range(0, rows, TILE_ROWS):
            if left > 2 * LANES:
                tile3(flat, m * depth, depth, b, ib + j, ldb, c, ic + m * ldc + j, ldc, depth)
            elif left > LANES:
                tile2(flat, m * depth, depth, b, ib + j, ldb, c, ic + m * ldc + j, ldc, depth)
            else:
                tile1(flat, m * depth, depth, b, ib + j, ldb, c, ic + m * ldc + j, ldc, depth)


@compiled
def sum_product(a: Floats, ia: int, lda: int, b: Floats, c: Floats, rows: int, depth: int) -> None:
    """Add ``a @ b`` to c, whose rows are a multiple of SUM_ROWS, columns of SUM_COLUMNS; ``depth`` columns of a."""
    columns, flat = c.shape[1], c.reshape(-1)
    for j in range(0, columns, SUM_COLUMNS):
        for m in range(0, rows, SUM_ROWS):
            sum_tile(a, ia + m * lda, lda, b, j, columns, flat, m * columns + j, columns, depth)


@compiled
def transpose_tile(
    tile: Floats, i: int, stride: int, channels: int, columns: int, out: Floats, out_stride: int
) -> None:
    """Write ``out[column, channel]``; channels are rounded up to LANES, columns is a multiple of LANES."""
    for c in range(0, channels, LANES):
        for j in range(0, columns, LANES):
            transpose(tile, i + c * stride + j, stride, out, j * out_stride + c, out_stride)
