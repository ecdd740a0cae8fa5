"""Frames that are moved to where the field is on average, and denoised ones that are moved back to where they were."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

from restormer3d.artefacts import warp
from restormer3d.normalization import sample_frames
from restormer3d.threads import thread_count
from restormer3d.views import ChangedStack

_SAMPLE = 512  # frames that the image is made of, at most
_AROUND = 2.0  # pixels of a Gaussian filter, over which an image that few frames show is drawn to what is around,
_AS_AROUND = 8.0  # as if so many frames showed that
_FEW = 1e-6  # frames, that the mean of all stands in for where none shows anything


@dataclass(frozen=True)
class MovedBack(ChangedStack):
    """A stack (T, H, W) whose frames are moved to where the field is on average, to be read whole frames at a time.

    Frames are larger than recorded ones: they hold all tissue that any of them shows. Where one shows nothing, it has
    the static image of its plane, and what the recorded frame differs by from it as in a mirror.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        As recorded.
    weights : numpy.ndarray
        Of the patterns by which each frame is displaced (see `artefacts.warp`), pixels, (T, 2, K).
    images : numpy.ndarray
        Of planes that are shown in turns, as :func:`static_images` finds them, (planes, H + 2 m, W + 2 n).
    """

    weights: np.ndarray
    images: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, rows and columns."""
        return self.stack.shape[0], *self.images.shape[1:]

    def __getitem__(self, frames: slice) -> np.ndarray:
        """Read `moved[a:b]`."""
        recorded = np.asarray(self.stack[frames], self.dtype)
        turns = np.arange(self.shape[0])[frames] % len(self.images)
        with ThreadPoolExecutor(thread_count()) as pool:
            return np.stack(list(pool.map(self._moved_back, recorded, self.weights[frames], turns)))

    def _moved_back(self, frame: np.ndarray, by: np.ndarray, plane: int) -> np.ndarray:
        image = self.images[plane]
        inside = _inside(image.shape, frame.shape)
        apart = frame - warp.moved(image, by, frame.shape)[inside]
        wider = np.pad(apart, [(place.start, place.start) for place in inside], "reflect")
        return (warp.moved(wider, by, frame.shape, back=True) + image).astype(frame.dtype, copy=False)


def static_images(stack: Any, weights: np.ndarray, planes: int = 1) -> np.ndarray:
    """Mean of the frames of each plane, moved back by weights (T, 2, K), of all tissue that any of them shows.

    Returns
    -------
    numpy.ndarray
        The field and as many rows and columns around it as it is displaced by at most, (planes, H + 2 m, W + 2 n),
        float32. Where few frames show anything, it is drawn to what is around.
    """
    numbers = [np.arange(plane, stack.shape[0], planes) for plane in range(planes)]
    return np.stack([_static_image(stack, weights, some[sample_frames(len(some), _SAMPLE)]) for some in numbers])


def _static_image(stack: Any, weights: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    field = stack.shape[1:]
    margins = np.ceil(warp.farthest(weights).max(0)).astype(int)
    shape = tuple(side + 2 * margin for side, margin in zip(field, margins, strict=True))
    total, count = np.zeros(shape), np.zeros(shape)
    for t in numbers:
        frame = np.pad(np.asarray(stack[int(t)], np.float64), [(margin, margin) for margin in margins], "reflect")
        rows, columns = warp.displaced_from(weights[t], shape, field, back=True)
        seen = _between(rows, margins[0], field[0]) & _between(columns, margins[1], field[1])
        total += np.where(seen, warp.moved(frame, weights[t], field, back=True), 0)
        count += seen
    around = gaussian_filter(total, _AROUND) + _FEW * total.sum() / count.sum()
    around /= gaussian_filter(count, _AROUND) + _FEW
    return ((total + _AS_AROUND * around) / (count + _AS_AROUND)).astype(np.float32)


def put_back(frames: Iterator[np.ndarray], weights: np.ndarray, field: tuple[int, int]) -> Iterator[np.ndarray]:
    """Move denoised frames of :class:`MovedBack` to where they were, (H, W) of them, as they come.

    Parameters
    ----------
    frames : iterator of numpy.ndarray
        Denoised, (H + 2 m, W + 2 n).
    weights : numpy.ndarray
        Of the patterns by which each frame is displaced, pixels, (T, 2, K).
    field : tuple of int
        Rows and columns of recorded frames.
    """
    for frame, by in zip(frames, weights, strict=True):
        yield warp.moved(frame, by, field)[_inside(frame.shape, field)]


def _between(places: np.ndarray, margin: int, side: int) -> np.ndarray:
    return (places >= margin) & (places <= margin + side - 1)


def _inside(larger: tuple[int, ...], field: tuple[int, ...]) -> tuple[slice, slice]:
    """Where a field lies in an image with margins around it."""
    y, x = (slice((outer - side) // 2, (outer - side) // 2 + side) for outer, side in zip(larger, field, strict=True))
    return y, x
