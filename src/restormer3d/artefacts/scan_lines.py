"""Lines of a bidirectional scan: every other one is read the other way round, and lies displaced if the mirror is late.

Neighbors along y then show other tissue. Whole pixels are taken back, which mixes no noise, and put back afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter1d

from restormer3d.views import ChangedStack

_LEAST_SIDE = 32  # pixels of a field whose lines can be compared
_REACH = 8  # lines are displaced by this part of the field at most,
_FARTHEST = 32  # or by so many pixels
_SAMPLE = 512  # frames that the image is made of, at most
_BAND = (0.7, 5.0)  # pixels of Gaussian filters along x, between which lines tell of their displacement
_PARTS = 6  # of the field along y and along x, each of which tells of it by itself
_SURE = 4.0  # standard errors, by which neighbors are more alike than as recorded
_ALIKE = 0.2  # correlation of neighbors' detail, that is no chance


@dataclass(frozen=True)
class AlignedLines(ChangedStack):
    """A stack (T, H, W) whose odd lines are moved to the left, around the field's border.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        As recorded.
    shift : int
        Pixels by which odd lines are displaced to the right, as :func:`line_shift` finds it.
    """

    shift: int

    @property
    def dtype(self) -> np.dtype:
        """Of what slicing gives: as recorded, for no value changes."""
        return self.stack.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        """Slice as the stack does, along x too: whole lines are read."""
        times, *crop = index if isinstance(index, tuple) else (index,)
        rows, columns = [*crop, slice(None), slice(None)][:2]
        lines = np.array(self.stack[times, rows] if crop else self.stack[times])
        odd = np.arange(self.shape[1])[rows] % 2 == 1
        lines[..., odd, :] = np.roll(lines[..., odd, :], -self.shift, -1)
        return lines[..., columns]


def line_shift(stack: Any) -> int:
    """Pixels by which odd lines of a stack (T, H, W) are displaced to the right against even ones, in all frames.

    Lines are compared with those below, in the mean of the frames. Displaced ones are more alike if they are moved
    back, in all parts of the field; what they are displaced by in other ways than every other one tells nothing.

    Returns
    -------
    int
        0 if neighbors are not surely more alike displaced; also of fields of fewer than 32 pixels.
    """
    frames, height, width = stack.shape
    if min(height, width) < _LEAST_SIDE:
        return 0
    image = np.zeros((height, width))
    for t in np.unique(np.linspace(0, frames - 1, min(frames, _SAMPLE)).astype(int)):
        image += stack[int(t)]
    detail = gaussian_filter1d(image, _BAND[0], axis=1) - gaussian_filter1d(image, _BAND[1], axis=1)
    for parity in (0, 1):  # lines that are displaced alike tell of one another
        detail[parity::2] = gaussian_filter1d(detail[parity::2], _BAND[0], axis=0)
    reach = min(width // _REACH, _FARTHEST)
    lags = range(-reach, reach + 1)
    inside = slice(reach, width - reach)
    power = np.maximum(_in_parts(np.square(detail)[:, inside]), 1e-30)
    alike = np.array([_in_parts(_products(_moved(detail, -lag)[:, inside])) for lag in lags]) / power  # (lags, parts)
    best = int(alike.sum(1).argmax())
    gain = alike[best] - alike[reach]
    error = gain.std(ddof=1) / np.sqrt(gain.size)
    return lags[best] if gain.mean() > _SURE * error and alike[best].mean() > _ALIKE else 0


def put_back(frames: Iterator[np.ndarray], shift: int) -> Iterator[np.ndarray]:
    """Move odd lines of denoised frames (H, W) to where they were, as they come."""
    for frame in frames:
        yield _moved(frame, shift)


def _moved(image: np.ndarray, by: int) -> np.ndarray:
    moved = image.copy()
    moved[1::2] = np.roll(image[1::2], by, 1)
    return moved


def _products(lines: np.ndarray) -> np.ndarray:
    return lines[:-1] * lines[1:]


def _in_parts(values: np.ndarray) -> np.ndarray:
    """Means of values (h, w) in parts of the field (parts,)."""
    rows = np.array_split(values, _PARTS, axis=0)
    return np.array([part.mean() for row in rows for part in np.array_split(row, _PARTS, axis=1)])
