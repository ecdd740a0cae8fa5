"""Tiles of the field: the part of a large one that is looked at together, so that memory holds all of its frames.

What pixels do together is known the better the more frames there are of it, and little of that needs the whole field.
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

_LEAST_SIDE = 64  # pixels: of a field of footprints and courses (`fields.SIDE`)
# Tiles are made small enough for all frames, if there are few more than so many; else for so many: still smaller ones
# would cost more than more frames bring.
_ENOUGH_FRAMES, _FEW_MORE = 2**13, 1.5
_OVERLAP = 16  # pixels of neighboring tiles, over which they are blended


def part_shape(shape: tuple[int, int, int], config: InferenceConfig) -> tuple[int, int, int]:
    """Frames, rows and columns of the part of a stack of this shape that is looked at together."""
    frames, rows, columns = tile_shape(shape, config)
    return chunk_frames((frames, rows, columns), config.chunk_voxels), rows, columns


def tile_shape(shape: tuple[int, int, int], config: InferenceConfig) -> tuple[int, int, int]:
    """All frames, rows and columns of a tile of a stack of this shape, which may be all of it."""
    if not config.tiles or not config.components:
        return shape
    return shape[0], *_tile_size(shape, config.chunk_voxels)


def _tile_size(shape: tuple[int, int, int], most_voxels: int) -> tuple[int, int]:
    """The whole field, or rows and columns of equal tiles of which all frames, or enough, are `most_voxels` at most."""
    frames = shape[0] if shape[0] <= _FEW_MORE * _ENOUGH_FRAMES else _ENOUGH_FRAMES
    pixels = most_voxels // frames
    height, width = shape[1:]
    if height * width <= max(pixels, most_voxels // _ENOUGH_FRAMES):
        return height, width
    columns = _evened(width, max(_LEAST_SIDE, math.isqrt(pixels), pixels // height))
    rows = _evened(height, max(_LEAST_SIDE, pixels // columns))
    return rows, columns


def _evened(length: int, side: int) -> int:
    """Pixels of as many tiles along an axis as those of `side` would be, if all overlap alike."""
    if side >= length:
        return length
    count = math.ceil((length - _OVERLAP) / (side - _OVERLAP))
    return max(_LEAST_SIDE, math.ceil((length + (count - 1) * _OVERLAP) / count))


def tile_places(shape: tuple[int, int, int], tile: tuple[int, int, int]) -> list[Place]:
    """Where tiles (or parts) of this shape lie in a stack."""
    rows, columns = (_starts(full, side) for full, side in zip(shape[1:], tile[1:], strict=True))
    return [(slice(y, y + tile[1]), slice(x, x + tile[2])) for y, x in product(rows, columns)]


def waiting_bytes(shape: tuple[int, int, int], config: InferenceConfig) -> int:
    """Bytes of the denoised frames of all tiles; none of the field as a whole, which does not wait."""
    tile = tile_shape(shape, config)
    count = len(tile_places(shape, tile))
    return 4 * math.prod(tile) * count if count > 1 else 0


def in_tiles(
    shape: tuple[int, int, int],
    part: tuple[int, int, int],
    denoise: Callable[[Place, int, int], Iterator[np.ndarray]],
) -> Iterator[np.ndarray]:
    """Denoise a stack tile by tile.

    Parameters
    ----------
    shape, part : tuple of int
        Of the stack, (T, H, W), and of what is looked at together, see :func:`part_shape`.
    denoise : function
        Called with a tile's place, its number and the number of tiles; gives its frames (rows, columns) float32, in
        order.

    Yields
    ------
    numpy.ndarray
        Frames (H, W) float32, in order; the first one once all tiles are done.

    Raises
    ------
    OSError
        If denoised tiles have nowhere to wait.
    """
    places = tile_places(shape, part)
    count = len(places)
    if count == 1:
        yield from denoise(places[0], 0, 1)
        return
    weights = [_weights(*along) for along in zip(shape[1:], part[1:], strict=True)]
    for tiles in spooled(denoise(place, number, count) for number, place in enumerate(places)):
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
