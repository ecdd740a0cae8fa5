"""Chunks of a stack: all of its frames where memory holds them, else overlapping runs of frames, blended again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, pairwise

import numpy as np

from restormer3d.tiling import hann_weights, window_starts

LEAST_FRAMES = 16
"""Frames of a chunk at least: fewer say nothing of what pixels do together."""

_CHUNK_OVERLAP = 0.25  # share of the frames looked at together that the next ones are again, in a long stack
_MOST_FRAMES = 2**14  # of a chunk: the network for courses needs memory for each, however small the field


def chunk_frames(shape: tuple[int, int, int], most_voxels: int) -> int:
    """Frames of a stack of this shape that are looked at together: no more than `most_voxels`, but for the least."""
    return min(shape[0], _MOST_FRAMES, max(LEAST_FRAMES, most_voxels // (shape[1] * shape[2])))


def count_chunks(frames: int, depth: int) -> int:
    """Chunks of `depth` frames that :func:`in_chunks` takes a stack of so many in."""
    return len(window_starts(frames, depth, _CHUNK_OVERLAP))


def in_chunks(
    frames: Iterator[tuple[np.ndarray, ...]],
    shape: tuple[int, int, int],
    depth: int,
    change: Callable[..., np.ndarray],
) -> Iterator[np.ndarray]:
    """Change frames chunk by chunk.

    Parameters
    ----------
    frames : iterator of tuple of numpy.ndarray
        One or more frames (H, W) for every frame of the stack, in order.
    shape : tuple of int
        Of the stack, (T, H, W).
    depth : int
        Frames of a chunk, T at most; see :func:`chunk_frames`.
    change : function
        From the first frame's number of a chunk, and the frames (T, H, W) float32 of each kind, to changed ones, which
        are its own.

    Yields
    ------
    numpy.ndarray
        Frames (H, W) float32, in order. Memory does not grow with the length of the stack.
    """
    starts = window_starts(shape[0], depth, _CHUNK_OVERLAP)
    first = next(frames)
    frames = chain([first], frames)
    fields = [np.empty((depth, *shape[1:]), np.float32) for _ in first]
    if len(starts) == 1:
        _fill(fields, frames, 0)
        yield from change(0, *fields)
        return
    blended, hann, weight = np.zeros((depth, *shape[1:]), np.float32), hann_weights(depth), np.zeros(depth, np.float32)
    held = 0  # frames of this chunk that are there from the one before
    for start, following in pairwise([*starts, starts[-1] + depth]):
        _fill(fields, frames, held)
        changed = change(start, *fields)
        changed *= hann[:, None, None]
        blended += changed
        weight += hann
        done = following - start
        yield from blended[:done] / weight[:done, None, None]
        held = depth - done
        for values in (*fields, blended, weight):
            values[:held] = values[done:].copy()
        blended[held:], weight[held:] = 0, 0


def _fill(fields: list[np.ndarray], frames: Iterator[tuple[np.ndarray, ...]], first: int) -> None:
    """Fill fields (T, H, W) with frames from `first` on."""
    for t in range(first, len(fields[0])):
        for field, frame in zip(fields, next(frames), strict=True):
            field[t] = frame
