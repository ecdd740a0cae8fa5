"""Tiles of the field: the part of a large one that is looked at together, so that memory holds all of its frames.

What pixels do together is known the better the more frames there are of it, but is seldom wider than a cell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product

import numpy as np

from restormer3d.activity.chunks import chunk_frames
from restormer3d.config import InferenceConfig
from restormer3d.spool import spooled
from restormer3d.tiling import window_starts

Place = tuple[slice, slice]
"""Rows and columns of a tile."""

_LEAST_SIDE = 64  # pixels: less than a field of footprints and courses
# Frames for which tiles are made smaller; beyond, smaller ones cost more than more frames bring. All, if few more.
_ENOUGH_FRAMES, _FEW_MORE = 2**13, 1.5
_OVERLAP = 16  # pixels of neighboring tiles, over which they are blended
_IN_MEMORY = 2**28  # bytes of denoised tiles that wait there


def together(shape: tuple[int, int, int], config: InferenceConfig) -> tuple[int, tuple[int, int]]:
    """Frames, and rows and columns, of a stack of this shape that are looked at together."""
    size = tile_size(shape, config.chunk_voxels) if config.tiles and config.components else shape[1:]
    return chunk_frames((shape[0], *size), config.chunk_voxels), size


def tile_size(shape: tuple[int, int, int], most_voxels: int) -> tuple[int, int]:
    """Rows and columns of the tiles of a stack of this shape that have `most_voxels` at most, as long as it can be.

    The whole field, if that is so few; else all tiles are of the same size, and not smaller than they have to be.
    """
    frames = shape[0] if shape[0] <= _FEW_MORE * _ENOUGH_FRAMES else _ENOUGH_FRAMES
    pixels = most_voxels // frames
    height, width = shape[1:]
    if height * width <= pixels:
        return height, width
    columns = min(width, max(_LEAST_SIDE, math.isqrt(pixels), pixels // height))
    rows = min(height, max(_LEAST_SIDE, pixels // columns))
    return _evened(height, rows), _evened(width, columns)


def _evened(length: int, side: int) -> int:
    """Pixels of as many tiles along an axis as those of `side` would be, if all overlap alike."""
    if side >= length:
        return length
    count = math.ceil((length - _OVERLAP) / (side - _OVERLAP))
    return max(_LEAST_SIDE, math.ceil((length + (count - 1) * _OVERLAP) / count))


def tile_places(shape: tuple[int, int, int], size: tuple[int, int]) -> list[Place]:
    """Where the tiles of a stack of this shape are."""
    rows, columns = (_starts(full, side) for full, side in zip(shape[1:], size, strict=True))
    return [(slice(y, y + size[0]), slice(x, x + size[1])) for y, x in product(rows, columns)]


def waiting_bytes(shape: tuple[int, int, int], size: tuple[int, int]) -> int:
    """Bytes of the denoised frames of all tiles."""
    return 4 * shape[0] * size[0] * size[1] * len(tile_places(shape, size))


def in_tiles(
    shape: tuple[int, int, int], size: tuple[int, int], denoise: Callable[[Place, int, int], Iterator[np.ndarray]]
) -> Iterator[np.ndarray]:
    """Denoise a stack tile by tile.

    Parameters
    ----------
    shape : tuple of int
        Of the stack, (T, H, W).
    size : tuple of int
        Rows and columns of a tile, see :func:`tile_size`.
    denoise : function
        From a tile's place, its number and how many there are to its frames (rows, columns), in order.

    Yields
    ------
    numpy.ndarray
        Frames (H, W) float32, in order; the first one once all tiles are done.
    """
    places = tile_places(shape, size)
    if len(places) == 1:
        yield from denoise(places[0], 0, 1)
        return
    weights = [_weights(*along) for along in zip(shape[1:], size, strict=True)]
    count = len(places)
    waiting = [spooled(denoise(place, number, count), _IN_MEMORY // count) for number, place in enumerate(places)]
    for tiles in zip(*waiting, strict=True):
        frame = np.zeros(shape[1:], np.float32)
        for (y, x), tile in zip(places, tiles, strict=True):
            frame[y, x] += weights[0][y.start][:, None] * tile * weights[1][x.start]
        yield frame


def _starts(length: int, side: int) -> list[int]:
    return window_starts(length, side, min(_OVERLAP, side - 1) / side)


def _weights(length: int, side: int) -> dict[int, np.ndarray]:
    """How much tiles along an axis count, by where they start: less and less towards a neighbor, one in all."""
    starts = _starts(length, side)
    edge = np.minimum(np.arange(side) + 0.5, side - 0.5 - np.arange(side))
    ramp = np.minimum(edge / _OVERLAP, 1).astype(np.float32)
    total = np.zeros(length, np.float32)
    for start in starts:
        total[start : start + side] += ramp
    return {start: ramp / total[start : start + side] for start in starts}
