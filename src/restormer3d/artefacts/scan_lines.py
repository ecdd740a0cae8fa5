"""Lines of a bidirectional scan: every other one is read the other way round, and lies displaced if the mirror is late.

Neighbors along y then show other tissue. Lines are aligned, and denoised ones displaced again: by whole pixels around
the border of the field, by fractions as a Fourier series, which leaves white noise white.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.fft
from scipy.ndimage import gaussian_filter1d

from restormer3d.normalization import sample_frames
from restormer3d.threads import thread_count
from restormer3d.views import ChangedStack

_LEAST_SIDE = 32  # pixels of a field whose lines can be compared
_REACH = 8  # lines are displaced by this part of the field at most,
_FARTHEST = 32  # or by so many pixels
_SAMPLE = 512  # frames that the image is made of, at most
_BAND = (0.7, 5.0)  # pixels of Gaussian filters along x, between which lines tell of their displacement
_PARTS = 6  # of the field along y and along x, each of which tells of it by itself
_SURE = 4.0  # standard errors, by which lines are displaced
_ALIKE = 0.2  # correlation of neighbors' detail, that is no chance
_PASSES = 4  # of measuring what is left of a fraction
_LEAST = 0.1  # pixels, a fraction worth aligning


@dataclass(frozen=True)
class AlignedLines(ChangedStack):
    """A stack (T, H, W) whose odd lines are moved to the left.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        As recorded.
    shift : float
        Pixels by which odd lines are displaced to the right, as :func:`line_shift` finds it.
    """

    shift: float

    def __getitem__(self, index: Any) -> np.ndarray:
        """Slice as the stack does, along x too: whole lines are read."""
        times, *crop = index if isinstance(index, tuple) else (index,)
        rows, columns = [*crop, slice(None), slice(None)][:2]
        lines = np.array(self.stack[times, rows] if crop else self.stack[times], self.dtype)
        odd = np.arange(self.shape[1])[rows] % 2 == 1
        lines[..., odd, :] = _aligned(lines[..., odd, :], self.shift)
        return lines[..., columns]


def line_shift(stack: Any) -> float:
    """Pixels by which odd lines of a stack (T, H, W) are displaced to the right against even ones, in all frames.

    Lines of the mean of the frames are compared with those below: whole pixels are found by correlation, fractions by
    regression on slopes, in parts of the field. What lines are displaced by in other ways than every other one cancels.

    Returns
    -------
    float
        Whole pixels, unless a tenth of one is surely left; 0 if neighbors are not surely more alike displaced, and of
        fields of fewer than 32 pixels.
    """
    frames, height, width = stack.shape
    if min(height, width) < _LEAST_SIDE:
        return 0.0
    image = np.zeros((height, width))
    for t in sample_frames(frames, _SAMPLE):
        image += stack[int(t)]
    detail = gaussian_filter1d(image, _BAND[0], axis=1) - gaussian_filter1d(image, _BAND[1], axis=1)
    for parity in (0, 1):  # lines that are displaced alike tell of one another
        detail[parity::2] = gaussian_filter1d(detail[parity::2], _BAND[0], axis=0)
    reach = min(width // _REACH, _FARTHEST)
    inside = slice(reach, width - reach)
    power = np.maximum(_in_parts(np.square(detail)[:, inside]), 1e-30)
    whole = _whole_pixels(detail, inside, reach, power)
    return whole + _fraction(_with_odd_aligned(detail, whole), inside, power)


def put_back(frames: Iterator[np.ndarray], shift: float) -> Iterator[np.ndarray]:
    """Move odd lines of denoised frames (H, W) to where they were, as they come."""
    for frame in frames:
        displaced = frame.copy()
        whole = round(shift)
        displaced[1::2] = _by_a_fraction(np.roll(frame[1::2], whole, -1), shift - whole)
        yield displaced


def _aligned(lines: np.ndarray, shift: float) -> np.ndarray:
    """Move lines (..., W) to the left: by a fraction as if mirrored at the border, then by whole pixels around it."""
    whole = round(shift)
    return np.roll(_by_a_fraction(lines, whole - shift), -whole, -1)


def _by_a_fraction(lines: np.ndarray, by: float) -> np.ndarray:
    if not by or not lines.size:
        return lines
    width = lines.shape[-1]
    mirrored = np.concatenate([lines, lines[..., ::-1]], -1)
    spectrum = np.asarray(scipy.fft.rfft(mirrored, workers=thread_count()))
    turn = np.exp(-1j * np.pi * np.arange(width + 1) / width * by).astype(spectrum.dtype)
    moved = np.asarray(scipy.fft.irfft(spectrum * turn, 2 * width, workers=thread_count()))
    return moved[..., :width].astype(lines.dtype, copy=False)


def _with_odd_aligned(image: np.ndarray, shift: float) -> np.ndarray:
    aligned = image.copy()
    aligned[1::2] = _aligned(image[1::2], shift)
    return aligned


def _whole_pixels(detail: np.ndarray, inside: slice, reach: int, power: np.ndarray) -> int:
    lags = range(-reach, reach + 1)
    moved = (_with_odd_aligned(detail, lag)[:, inside] for lag in lags)
    alike = np.array([_in_parts(lines[:-1] * lines[1:]) for lines in moved]) / power  # (lags, parts)
    best = int(alike.sum(1).argmax())
    gain = alike[best] - alike[reach]
    error = gain.std(ddof=1) / np.sqrt(gain.size)
    return lags[best] if gain.mean() > _SURE * error and alike[best].mean() > _ALIKE else 0


def _fraction(detail: np.ndarray, inside: slice, power: np.ndarray) -> float:
    """What odd lines (H, W) are displaced by, if it is less than a pixel; 0 if it is not surely worth aligning."""
    found, error = 0.0, np.inf
    sign = np.where(np.arange(1, len(detail) - 1) % 2 == 1, 1, -1)[:, None]
    for _ in range(_PASSES):
        lines = _with_odd_aligned(detail, found)
        around, slopes = (lines[:-2] + lines[2:]) / 2, np.gradient(lines, axis=1)
        slopes_around = (slopes[:-2] + slopes[2:]) / 2
        pulls = _in_parts((sign * slopes_around * (around - lines[1:-1]))[:, inside]) / power
        # Of both, for what noise they have is not the same: it would be taken for steep.
        steepness = _in_parts((slopes[1:-1] * slopes_around)[:, inside]) / power
        if steepness.mean() <= _SURE * steepness.std(ddof=1) / np.sqrt(len(steepness)):
            return 0.0
        without = (pulls.sum() - pulls) / (steepness.sum() - steepness)
        error = np.sqrt((len(pulls) - 1) * np.square(without - without.mean()).mean())
        found += float(pulls.sum() / steepness.sum())
    return found if _LEAST < abs(found) < 1 and abs(found) > _SURE * error else 0.0


def _in_parts(values: np.ndarray) -> np.ndarray:
    """Means of values (h, w) in parts of the field (parts,)."""
    rows = np.array_split(values, _PARTS, axis=0)
    return np.array([part.mean() for row in rows for part in np.array_split(row, _PARTS, axis=1)])
