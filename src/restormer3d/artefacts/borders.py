"""Borders without a recording: registration fills them in frames that were moved back, or nothing ever changes there.

Where a fill is not as wide in every frame, pixels alternate between it and what the microscope saw, which no average
along time survives. Where nothing changes, as at the turns of a mirror that are masked, the tissue ends, though when
the field moves the edge does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from restormer3d.noise import NoiseEstimate
from restormer3d.normalization import sample_frames
from restormer3d.views import FramesChanged, SomePixels, each_frame

_SURE = 6.0  # deviations, by which what is recorded at the border of other frames differs from the fill
_SAMPLE = 64  # frames whose corners say what the fill may be
_LEAST = 0.05  # of all corners, that are filled
_LEAST_SIDE = 32  # pixels of what changes


@dataclass(frozen=True)
class FilledBorders:
    """What registration has left at the borders of frames.

    Attributes
    ----------
    widths : numpy.ndarray
        Rows at the top and at the bottom, columns on the left and on the right of each frame, (T, 4).
    fill : float
        Intensity there.
    """

    widths: np.ndarray
    fill: float

    def mask(self, t: int, shape: tuple[int, int]) -> np.ndarray:
        """Return which pixels (H, W) of a frame are filled, bool."""
        top, bottom, left, right = self.widths[t]
        filled = np.ones(shape, bool)
        filled[top : shape[0] - bottom, left : shape[1] - right] = False
        return filled


@dataclass(frozen=True)
class WithoutBorders(FramesChanged):
    """A stack (T, H, W) whose filled borders hold the mean of what other frames show there.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        As registered.
    borders : FilledBorders
        Of each frame.
    image : numpy.ndarray
        What they hold instead, (H, W).
    """

    borders: FilledBorders
    image: np.ndarray

    def change(self, frame: np.ndarray, t: int, crop: tuple[Any, ...]) -> None:
        """Put the image where the frame is filled."""
        if self.borders.widths[t].any():
            np.copyto(frame, self.image[crop], "same_kind", where=self.borders.mask(t, self.shape[1:])[crop])


def without_borders(stack: Any, noise: NoiseEstimate) -> Any:
    """Put the mean of other frames where registration has left a fill whose width changes.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        As registered.
    noise : NoiseEstimate
        Of this stack: few photons leave whole rows at zero by chance.

    Returns
    -------
    stack of shape (T, H, W)
        The same one where borders are as wide in all frames.
    """
    frames, height, width = stack.shape
    some = np.linspace(0, frames - 1, min(frames, _SAMPLE)).astype(int)
    values, counts = np.unique(
        [np.asarray(stack[t])[:: height - 1 or 1, :: width - 1 or 1] for t in some], return_counts=True
    )
    fill = values[counts.argmax()]
    if counts.max() < _LEAST * counts.sum():
        return stack
    widths, total, count = np.zeros((frames, 4), int), np.zeros((height, width)), np.zeros((height, width), int)
    borders = FilledBorders(widths, float(fill))
    for t, frame in each_frame(stack):
        filled = frame == fill
        widths[t] = [n for axis in (1, 0) for n in _ends(filled.all(axis))]
        seen = ~borders.mask(t, (height, width))
        total += np.where(seen, frame, 0)
        count += seen
    if not np.ptp(widths, axis=0).any():
        return stack
    image = np.where(count > 0, total / np.maximum(count, 1), fill)
    changed = WithoutBorders(stack, borders, image)
    return changed if _is_no_chance(changed, noise) else stack


def put_back(frames: Iterator[np.ndarray], borders: FilledBorders) -> Iterator[np.ndarray]:
    """Fill the borders of denoised frames (H, W) as they were."""
    for t, frame in enumerate(frames):
        yield np.where(borders.mask(t, frame.shape), borders.fill, frame) if borders.widths[t].any() else frame


def without_constant_edges(stack: Any) -> Any:
    """Leave out rows and columns along the border whose pixels never change.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        As recorded.

    Returns
    -------
    stack of shape (T, h, w)
        `views.SomePixels` of it; the same one where there are none, or where less than 32 rows or columns are left.
    """
    first = np.asarray(stack[0])
    changes = np.zeros(first.shape, bool)
    # Some frames often tell already that all sides change.
    for numbers in (sample_frames(stack.shape[0], _SAMPLE), None):
        frames = each_frame(stack) if numbers is None else ((t, stack[int(t)]) for t in numbers)
        for _, frame in frames:
            changes |= frame != first
        (top, bottom), (left, right) = (_ends(np.logical_not(changes.any(axis))) for axis in (1, 0))
        rows, columns = slice(top, first.shape[0] - bottom), slice(left, first.shape[1] - right)
        inside = first[rows, columns].shape
        if inside == first.shape or min(inside) < min(_LEAST_SIDE, *first.shape):
            return stack
    return SomePixels(stack, rows, columns)


def put_edges_back(
    frames: Iterator[np.ndarray], first: np.ndarray, rows: slice, columns: slice
) -> Iterator[np.ndarray]:
    """Put what never changes, as in the first frame (H, W), around the rows and columns of denoised frames."""
    for frame in frames:
        whole = first.astype(frame.dtype)
        whole[rows, columns] = frame
        yield whole


def _ends(filled: np.ndarray) -> tuple[int, int]:
    """How many are true before the first, and after the last that is not; none if all are."""
    recorded = np.flatnonzero(~filled)
    return (int(recorded[0]), len(filled) - 1 - int(recorded[-1])) if len(recorded) else (0, 0)


def _is_no_chance(changed: WithoutBorders, noise: NoiseEstimate) -> bool:
    """Whether what is recorded in other frames differs from the fill by more than noise, in most frames."""
    apart, variance = changed.image - changed.borders.fill, noise.variance(changed.image)
    sure = []
    for t in np.flatnonzero(changed.borders.widths.any(1)):
        filled = changed.borders.mask(int(t), changed.shape[1:])
        sure.append(abs(apart[filled].sum()) > _SURE * np.sqrt(variance[filled].sum()))
    return bool(np.mean(sure) > 0.5)
