"""Frames that show nothing of their own: blank ones, dark ones, and repeats of the frame before.

Shutters, lost frames, aborted acquisitions and resampling leave them behind. Whatever smooths along time would spread
a dark frame over those around, and how frames differ tells of noise and activity; so these are set aside before, and
put back afterwards as they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy.ndimage import median_filter

from restormer3d.views import SomeFrames, each_frame

_APART = 16  # rows, or pixels of a row, of which one is compared first
_SAMPLE = 100  # frames whose mean is what frames show
_AROUND = 101  # frames that tell what is usual around one
_PHOTONS = 20  # pixels of a frame that differ from its lowest: fewer may all do so by chance
_DARK = 0.5  # of the usual contrast of the image, that dark frames have at most
_USUAL = 0.5  # of all frames
_SURE = 6.0  # deviations, by which dark frames are darker and of less contrast than chance makes them
_NORMAL_MEDIAN = 0.6744898  # of the magnitude of a normal number of deviation 1


def frames_shown(stack: Any) -> np.ndarray:
    """Which frame each one shows: its own number, an earlier one's that it repeats, or -1 where it is blank or dark.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        As recorded.

    Returns
    -------
    numpy.ndarray
        (T,) int.
    """
    frames = stack.shape[0]
    shown = np.arange(frames)
    image = _image(stack)
    level, contrast, broken = np.zeros(frames), np.zeros(frames), np.zeros(frames, bool)
    before = None
    for t, frame in each_frame(stack):
        level[t], contrast[t] = frame.mean(dtype=np.float64), (frame * image).sum(dtype=np.float64)
        rows = rows_of_one_value(frame)
        broken[t] = np.count_nonzero(np.diff(np.pad(rows, 1).astype(np.int8)) > 0) == 1
        if _equal(frame, np.broadcast_to(frame.flat[0], frame.shape)):
            shown[t] = -1
        elif before is not None and _equal(frame, before):
            shown[t] = shown[t - 1]
        before = frame
    own = shown == np.arange(frames)
    if not own.all() and _is_sparse(stack, np.flatnonzero(own)):
        return np.arange(frames)
    # What frames show beside one band of lost rows is not dark, unless most have such a band.
    broken &= broken.mean() < _USUAL
    shown[np.flatnonzero(own & ~broken)[_is_dark(level[own], contrast[own])[~broken[own]]]] = -1
    return np.where(np.isin(shown, np.flatnonzero(shown == np.arange(frames))), shown, -1)


def without_idle(stack: Any, shown: np.ndarray) -> Any:
    """Give a stack of the frames that show something of their own; the same one where all do."""
    own = np.flatnonzero(shown == np.arange(len(shown)))
    return stack if len(own) == len(shown) else SomeFrames(stack, own)


def put_back(frames: Iterator[np.ndarray], stack: Any, shown: np.ndarray) -> Iterator[np.ndarray]:
    """Put blank and dark frames of a stack among denoised ones (H, W), and repeat what was made of repeated ones."""
    last = np.empty(0)
    for t, number in enumerate(shown):
        if number == t:
            last = next(frames)
        yield stack[t] if number < 0 else last


def rows_of_one_value(frame: np.ndarray) -> np.ndarray:
    """Which rows of a frame (H, W) hold one value, bool (H,)."""
    rows = (frame[:, ::_APART] == frame[:, :1]).all(1)
    rows[rows] = (frame[rows] == frame[rows, :1]).all(1)
    return rows


def _equal(frame: np.ndarray, other: np.ndarray) -> bool:
    return bool((frame[::_APART] == other[::_APART]).all() and (frame == other).all())


def _is_sparse(stack: Any, own: np.ndarray) -> bool:
    """Whether so few photons are in a frame that some hold none, or the same ones, by chance."""
    some = [np.asarray(stack[t]) for t in own[:: -(-len(own) // _SAMPLE)]] if len(own) else []
    return bool(some) and float(np.median([np.count_nonzero(frame != frame.min()) for frame in some])) < _PHOTONS


def _image(stack: Any) -> np.ndarray:
    """What frames show, as weights (H, W) whose sum is 0 and whose product with the image is 1."""
    sample = range(0, stack.shape[0], -(-stack.shape[0] // _SAMPLE))
    image = np.mean([stack[t] for t in sample], axis=0, dtype=np.float64)
    image -= image.mean()
    return image / max(float(np.square(image).sum()), 1e-30)


def _is_dark(level: np.ndarray, contrast: np.ndarray) -> np.ndarray:
    """Which frames are much darker than those around, and show little of the image, (T,) bool."""
    if not len(level):
        return np.zeros(0, bool)
    usual, less = [], []
    for values in (level, contrast):
        usual.append(median_filter(values, _AROUND, mode="reflect"))
        deviation = np.median(np.abs(values - usual[-1])) / _NORMAL_MEDIAN
        less.append(values < usual[-1] - _SURE * deviation)
    return less[0] & less[1] & (contrast < _DARK * usual[1])
