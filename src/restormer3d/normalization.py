"""Per-stack normalization by two percentiles, and the temporal median and mean images.

Everything is estimated from frames read one or a few at a time, so memory does not grow with the stack.
A *stack* is anything with shape (T, H, W), a dtype and numpy slicing, such as an array or an open file.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from restormer3d.threads import thread_count

_COLLECT_VALUES = 2**24  # most values held for the percentiles of 32- and 64-bit stacks (float64: 128 MiB)
_MEDIAN_FRAMES, _FRAMES_PER_READ = 500, 16
_STRIP_BYTES = 2**27  # most bytes of one row strip in `temporal_median`; its working copies stay far smaller


@dataclass(frozen=True)
class Normalization:
    """An affine map that sends ``low`` to 0 and ``high`` to 1, without clipping.

    Parameters
    ----------
    low, high : float
        Intensities of the stack, in its own units; ``high`` must be the larger.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (np.isfinite(self.low) and np.isfinite(self.high) and self.high > self.low):
            raise ValueError(
                f"normalization needs finite low < high, got low={self.low} and high={self.high}; "
                "a stack whose pixels all have one value cannot be normalized"
            )

    @property
    def scale(self) -> float:
        """Intensity difference that becomes 1 after normalization."""
        return self.high - self.low

    def apply(self, x: np.ndarray) -> np.ndarray:
        """Return ``(x - low) / (high - low)`` as float32; wide integers are subtracted in float64."""
        wide = np.asarray(x).astype(np.result_type(x, np.float32))
        wide -= self.low
        wide /= self.scale
        return wide.astype(np.float32, copy=False)

    def invert(self, x: np.ndarray) -> np.ndarray:
        """Return ``x * (high - low) + low`` as float64, so that a large offset costs no precision."""
        wide = np.asarray(x).astype(np.float64)
        wide *= self.scale
        wide += self.low
        return wide


def sample_frames(length: int, count: int) -> np.ndarray:
    """Return up to ``count`` evenly spaced frame numbers out of ``length``, the first and last among them.

    Parameters
    ----------
    length : int
        Number of frames in the stack, at least 1.
    count : int
        Most frames wanted, at least 1 (a single one is the first frame).

    Returns
    -------
    numpy.ndarray of int64
        Increasing, without repeats.
    """
    if length < 1 or count < 1:
        raise ValueError(f"sample_frames needs length >= 1 and count >= 1, got {length} and {count}")
    return np.unique(np.linspace(0, length - 1, min(length, count)).round().astype(np.int64))


def estimate_normalization(
    stack: Any, max_frames: int = 300, percentiles: tuple[float, float] = (0.5, 99.5)
) -> Normalization:
    """Estimate the normalization of a stack from two percentiles of a sample of its frames.

    For integers of up to 16 bits the percentiles are exact over the sampled frames (a histogram). For other
    types every k-th pixel is collected, k chosen so that at most 2**24 values are held; the first pixel taken
    moves on from frame to frame, so that every place of the field is visited.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        Noisy intensities.
    max_frames : int
        Number of evenly spaced frames to read.
    percentiles : tuple of float
        The percentiles that become 0 and 1.

    Returns
    -------
    Normalization
        From the percentiles; from the minimum and maximum of the whole stack if the percentiles coincide
        although the stack is not constant (a few bright pixels on a flat ground).

    Raises
    ------
    ValueError
        If the stack is constant, or holds NaN or infinite values.
    """
    low, high = sampled_percentiles(stack, percentiles, max_frames)
    if not high > low:
        low, high = _extremes(stack)
    if not high > low:
        raise ValueError(
            f"the stack is constant: every pixel of its {stack.shape[0]} frames is {low:g}; "
            "there is nothing to denoise, check that the right file was given"
        )
    return Normalization(low, high)


def sampled_percentiles(stack: Any, percentiles: tuple[float, ...], max_frames: int = 300) -> tuple[float, ...]:
    """Return percentiles of a sample of a stack's frames, as :func:`estimate_normalization` takes them.

    Raises
    ------
    ValueError
        If the sample holds NaN or infinite values.
    """
    frames = sample_frames(stack.shape[0], max_frames)
    if stack.dtype.kind in "iub" and stack.dtype.itemsize <= 2:
        return _histogram_percentiles(stack, frames, percentiles)
    return _collected_percentiles(stack, frames, percentiles)


def _histogram_percentiles(stack: Any, frames: np.ndarray, percentiles: tuple[float, ...]) -> tuple[float, ...]:
    offset = int(np.iinfo(stack.dtype).min) if stack.dtype.kind in "iu" else 0
    values = 2 ** (8 * stack.dtype.itemsize)

    def count(some: np.ndarray) -> np.ndarray:
        counts = np.zeros(values, dtype=np.int64)
        for t in some:
            counts += np.bincount(stack[t].ravel().astype(np.int64) - offset, minlength=values)
        return counts

    with ThreadPoolExecutor(thread_count()) as pool:
        ends = np.cumsum(sum(pool.map(count, np.array_split(frames, 16))))
    positions = np.asarray(percentiles) / 100 * (ends[-1] - 1)
    below = np.searchsorted(ends, np.floor(positions), side="right") + offset
    above = np.searchsorted(ends, np.ceil(positions), side="right") + offset
    return tuple((below + (above - below) * (positions - np.floor(positions))).tolist())


def _collected_percentiles(stack: Any, frames: np.ndarray, percentiles: tuple[float, ...]) -> tuple[float, ...]:
    pixels = stack.shape[1] * stack.shape[2]
    step = -(-pixels * len(frames) // _COLLECT_VALUES)
    values = np.concatenate([stack[t].ravel()[k % step :: step] for k, t in enumerate(frames)])
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError("the stack holds NaN or infinite values: replace them before denoising")
    return tuple(np.percentile(values.astype(np.float64, copy=False), percentiles, overwrite_input=True).tolist())


def _extremes(stack: Any) -> tuple[float, float]:
    limits = [(stack[t].min(), stack[t].max()) for t in range(stack.shape[0])]
    return float(min(low for low, _ in limits)), float(max(high for _, high in limits))


def temporal_median(stack: Any) -> np.ndarray:
    """Return the median over time of every pixel, from up to 500 evenly spaced frames.

    Rows are read in strips small enough that no array exceeds 128 MiB; a stack that is small enough is read
    once only.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        Noisy intensities.

    Returns
    -------
    numpy.ndarray
        Median image, shape (H, W), float32.
    """
    length, height, width = stack.shape
    frames = sample_frames(length, _MEDIAN_FRAMES)
    rows = max(1, _STRIP_BYTES // (len(frames) * width * stack.dtype.itemsize))
    image = np.empty((height, width), dtype=np.float32)
    with ThreadPoolExecutor(thread_count()) as pool:
        for top in range(0, height, rows):
            strip = np.concatenate([stack[t : t + 1, top : top + rows, 0:width] for t in frames])
            for y, row in enumerate(pool.map(_median_of_row, strip.swapaxes(0, 1)), start=top):
                image[y] = row
    return image


def _median_of_row(row: np.ndarray) -> np.ndarray:
    """Median over time of one row, (T, W): time last, so that it runs over contiguous memory."""
    return np.median(np.ascontiguousarray(row.T), axis=1, overwrite_input=True)


def temporal_mean(stack: Any) -> np.ndarray:
    """Return the mean over time of every pixel, summed in float64 over all frames.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        Noisy intensities.

    Returns
    -------
    numpy.ndarray
        Mean image, shape (H, W), float32.
    """
    total = np.zeros(stack.shape[1:], dtype=np.float64)
    for start in range(0, stack.shape[0], _FRAMES_PER_READ):
        total += stack[start : start + _FRAMES_PER_READ].sum(axis=0, dtype=np.float64)
    return (total / stack.shape[0]).astype(np.float32)
