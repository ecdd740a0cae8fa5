"""Noise that goes on from frame to frame, as in running averages of frames: made white before denoising.

Such noise looks like activity that rises and decays, and no average along time takes it away. A filter that predicts
the noise of each frame from frames before, and keeps what is not foretold, makes it white; activity becomes as sharp
again as it was before the average. Its recursion averages denoised frames as the recorded ones are, exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.linalg import solve_toeplitz

from restormer3d.views import ChangedStack

_LEAST_FRAMES, _LEAST_SIDE = 48, 16  # that tell of it
_SEGMENT, _MOST_SEGMENTS = 128, 4  # frames whose spectrum is looked at, and how often
_SIDE = 128  # pixels of the middle of the field that are looked at
_ORDER = 32  # frames that foretell the next one, at most;
_OF_SEGMENT = 4  # of a segment, so many times as long
_CORRELATED = 0.1  # at any lag
_FLAT = 0.25  # of the pixels: those that differ least from their neighbors
_WHITE_SHARE = 1e-6  # of the variance, that is taken for white: no filter has to amplify anything by more
_AT_ONCE = 64  # frames that are computed together
_TINY = 1e-30


@dataclass(frozen=True)
class TemporalCorrelation:
    """Noise that frames share with those before.

    Attributes
    ----------
    largest : float
        Correlation of the noise of frames, at the lag where it is strongest.
    whitening : numpy.ndarray
        Weights of a frame and of those before it, whose sum is 1, float64: with them, the noise of the weighted sum
        differs from frame to frame.
    """

    largest: float
    whitening: np.ndarray


@dataclass(frozen=True)
class Whitened(ChangedStack):
    """A stack (T, H, W) whose noise is white along time; before it, its first frame is taken to have gone on forever.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        As recorded.
    whitening : numpy.ndarray
        Weights, as :func:`temporal_correlation` finds them.
    """

    whitening: np.ndarray

    def __getitem__(self, index: Any) -> np.ndarray:
        """Slice as the stack does."""
        times, *crop = index if isinstance(index, tuple) else (index,)
        numbers = np.arange(self.shape[0])[times]
        first = np.asarray(self.stack[(slice(0, 1), *crop)], self.dtype)
        frames = np.empty((numbers.size, *first.shape[1:]), self.dtype)
        for start in range(0, numbers.size, _AT_ONCE):
            some = np.atleast_1d(numbers)[start : start + _AT_ONCE]
            seen = np.arange(max(some.min() - len(self.whitening) + 1, 0), some.max() + 1)
            lags = some[:, None] - seen
            within = (lags >= 0) & (lags < len(self.whitening))
            weights = np.where(within, self.whitening[np.where(within, lags, 0)], 0.0).astype(self.dtype)
            apart = np.subtract(self.stack[(slice(seen[0], seen[-1] + 1), *crop)], first, dtype=self.dtype)
            frames[start : start + len(some)] = np.tensordot(weights, apart, 1) + first
        return frames if numbers.ndim else frames[0]


def put_back(frames: Iterator[np.ndarray], whitening: np.ndarray) -> Iterator[np.ndarray]:
    """Average denoised frames (H, W) of :class:`Whitened` as the recorded ones are, as they come."""
    first = next(frames)
    order = len(whitening) - 1
    # Deviations from the first frame, of the last frames, each at its number modulo the order.
    past = np.zeros((order, *first.shape), first.dtype)
    yield first
    for t, frame in enumerate(frames, 1):
        weights = whitening[1 + (t - 1 - np.arange(order)) % order].astype(first.dtype)
        foretold = np.tensordot(weights, past, 1)
        past[t % order] = (frame - first - foretold) / whitening[0].astype(first.dtype)
        yield first + past[t % order]


def temporal_correlation(stack: Any) -> TemporalCorrelation | None:
    """Measure how far the noise of frames goes on, and what makes it white.

    Its spectrum along time is that of pixels less their neighbors, in which the image, light and most activity are
    not: the median over those pixels that differ least from their neighbors, for in others movement would show. The
    weights are those of linear prediction.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        Recorded intensities, of one image.

    Returns
    -------
    TemporalCorrelation or None
        None if the noise of frames is correlated by less than a tenth at all lags, and of fewer than 48 frames or 16
        pixels.

    References
    ----------
    J. Makhoul, "Linear prediction: a tutorial review", Proceedings of the IEEE 1975.
    """
    frames, height, width = stack.shape
    if frames < _LEAST_FRAMES or min(height, width) < _LEAST_SIDE:
        return None
    spectrum = _noise_spectrum(stack)
    if spectrum is None:
        return None
    covariance = np.fft.irfft(spectrum)
    order = min(_ORDER, 2 * (len(spectrum) - 1) // _OF_SEGMENT)
    correlation = covariance[: order + 1] / covariance[0]
    strongest = 1 + int(np.abs(correlation[1:]).argmax())
    if not abs(correlation[strongest]) > _CORRELATED:
        return None
    foretelling = solve_toeplitz(correlation[:-1] + _WHITE_SHARE * np.eye(1, order)[0], correlation[1:])
    whitening = np.concatenate([[1.0], -foretelling])
    return TemporalCorrelation(float(correlation[strongest]), whitening / whitening.sum())


def _noise_spectrum(stack: Any) -> np.ndarray | None:
    """Power of the noise at frequencies along time, up to a factor; None if nothing changes."""
    frames, height, width = stack.shape
    length = min(_SEGMENT, frames // 2 * 2)
    starts = np.linspace(0, frames - length, min(_MOST_SEGMENTS, 2 * frames // length - 1)).astype(int)
    middle = tuple(slice(max(0, n - _SIDE) // 2, max(0, n - _SIDE) // 2 + _SIDE) for n in (height, width))
    window = np.hanning(length + 2)[1:-1, None].astype(np.float32)
    power, image = np.zeros(1, np.float32), np.zeros(1, np.float32)
    for start in starts:
        part = stack[start : start + length, *middle].astype(np.float32)
        fine = np.diff(np.diff(part, axis=1), axis=2).reshape(length, -1)
        mean = fine.mean(0)
        image = image + mean
        power = power + np.square(np.abs(np.fft.rfft(window * (fine - mean), axis=0)))
    detail = np.abs(image) / np.sqrt(np.maximum(power.mean(0), _TINY))
    changes = power.any(0)
    if not changes.any():
        return None
    flat = changes & (detail <= np.quantile(detail[changes], _FLAT))
    of_white = np.square(np.abs(np.fft.rfft(window * (np.eye(length) - 1 / length), axis=0))).sum(1)
    spectrum = np.median(power[:, flat], 1).astype(np.float64) / of_white
    spectrum[[0, -1]] = spectrum[[1, -2]]  # whose medians are others, and the mean was taken away
    return spectrum
