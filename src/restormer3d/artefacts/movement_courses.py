"""Of what parts of the field say of its displacement, what is movement, and worth following.

Movement is what the parts share: noise and activity differ from part to part, and cancel in the products of
displacements by one half of them with those by the other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from scipy.ndimage import convolve1d, gaussian_filter1d

from restormer3d.artefacts.displacement import Parts

SURE = 3.0
"""Standard errors of the variance that parts share."""

_WIDTHS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # frames of Gaussian filters along time
_KNOWN = 0.7  # pixels, that a frame's displacement has to be known to: the few photons of a frame may lie anywhere
_LEAST = 0.1  # pixels of movement worth following, as a standard deviation
_LEAST_SCAN = 0.3  # of the time between frames, that a scan may take
_GOES_ON = 0.3  # share of its variance that frames around foretell, from which on movement is followed as a whole,
_FORESEEN = 0.1  # and from which on as far as they do
_SPECTRAL_WIDTH = 4.0  # frequencies of Gaussian filters over spectra


def courses_to_follow(parts: Parts, *, jitter: bool, sure: float = SURE) -> np.ndarray:
    """Weights of patterns that are worth following (frames, 2, K): zero where none are.

    Of rigid movement it is decided along y and along x, of all other patterns together, once what the scan makes of
    rigid movement is taken away. `sure` is how many standard errors the variance of these has to be.
    """
    whole, halves = parts.weights(np.ones(parts.count, bool)), parts.halves()
    found = np.zeros_like(whole)
    axis, kind = np.mgrid[:2, : whole.shape[2]]
    together = [axis == 0, axis == 1]
    if whole.shape[2] > 1:
        found[..., :1] = courses_to_follow(parts.rigid(), jitter=jitter)
        found[..., 1] = _stretched_by_scan(parts, found[..., 0])
        together = [kind > 0]
    else:
        sure = SURE
    apart, halves_apart = whole - found, halves - found
    candidates = []
    for weights in together:
        chosen = weights & (parts.variance() < _KNOWN**2)
        if chosen.any():
            smooth = _foretold(_of(apart, chosen), _of(halves_apart, chosen), jitter=jitter)
            if smooth is not None and _product(*map(smooth, _of(halves_apart, chosen))) > _LEAST**2:
                candidates.append((chosen, smooth))
    # Whether parts share it, whichever of them is left out.
    without: list[list[float]] = [[] for _ in candidates]
    for number in range(parts.count if candidates else 0):
        others = parts.halves(number) - found
        for products, (chosen, smooth) in zip(without, candidates, strict=True):
            products.append(_product(*map(smooth, _of(others, chosen))))
    for products, (chosen, smooth) in zip(without, candidates, strict=True):
        error = np.sqrt((parts.count - 1) * np.var(products))
        if _product(*map(smooth, _of(halves_apart, chosen))) > sure * error:
            found[:, chosen] += smooth(_of(apart, chosen)).T
    return found


def _of(weights: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Courses (..., n, frames) of chosen weights (..., frames, 2, K)."""
    return np.moveaxis(weights[..., chosen], -1, -2)


def _stretched_by_scan(parts: Parts, shifts: np.ndarray) -> np.ndarray:
    """Weights of the slope along y that rigid movement (frames, 2) leaves, as rows are scanned one after the other.

    That of a row is as much later than that of the middle one as it is scanned later: what part of the time between
    frames the scan takes is what slopes by parts of the field tell, together. (frames, 2), zero if they are not sure.
    """
    speeds = np.gradient(shifts, axis=0)  # pixels a frame
    square = np.square(speeds).sum()
    slopes = speeds / (2 * 3**0.5)  # of a scan that takes all of the time
    if np.square(slopes).mean() < _LEAST**2 / 2:
        return np.zeros_like(shifts)

    def share(chosen: np.ndarray) -> float:
        return float((parts.weights(chosen)[..., 1] * speeds).sum() * 2 * 3**0.5 / square)

    everything = np.ones(parts.count, bool)
    without = [share(everything & (np.arange(parts.count) != number)) for number in range(parts.count)]
    found = share(everything)
    sure = abs(found) > max(_LEAST_SCAN, SURE * np.sqrt((parts.count - 1) * np.var(without)))
    return np.clip(found, -1, 1) * slopes if sure else np.zeros_like(shifts)


def _foretold(whole: np.ndarray, halves: np.ndarray, *, jitter: bool) -> Callable[[np.ndarray], np.ndarray] | None:
    """What makes courses (..., n, frames) those to follow; None if none of their movement is foretold.

    `whole` (n, frames) are those by all parts, `halves` (2, ways, n, frames) those by halves of them.
    """
    first, second = halves
    shared, told = _product(first, second), max(_told(first, second, width) for width in _WIDTHS)
    if jitter or told >= _GOES_ON * shared:
        return partial(_estimated, gain=_signal_share(whole, first, second))
    if told < _FORESEEN * shared:
        return None
    width = max(_WIDTHS, key=lambda width: _told(first, second, width, with_noise=True))
    return partial(_smoothed, width=width)


def shared_variance(rigid: Parts) -> np.ndarray:
    """Variance of rigid movement along y and x that the parts share, (2,)."""
    first, second = rigid.halves()[..., 0]
    return np.maximum((first * second).mean((0, 1)), 0)


def _product(first: np.ndarray, second: np.ndarray) -> float:
    """Variance that courses (..., n, frames) by one half of the parts share with those by the other, all together."""
    return float((first * second).mean(-1).sum(-1).mean())


def _signal_share(whole: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """How much of the power of courses (..., n, frames) parts share, by frequency: the gain of Wiener's filter."""
    return np.clip(_power(first, second) / np.maximum(_power(whole[None], whole[None]), 1e-30), 0, 1)


def _power(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cross spectra of courses (ways, n, frames), by frequency, smoothed over frequencies."""
    power = np.real(np.conj(_spectrum(first)) * _spectrum(second)).mean(0)
    return gaussian_filter1d(power, _SPECTRAL_WIDTH, mode="mirror")


def _spectrum(courses: np.ndarray) -> np.ndarray:
    """Of courses (..., frames) that are mirrored at their end, so that they go on as they began."""
    return np.fft.rfft(np.concatenate([courses, courses[..., ::-1]], axis=-1))


def _estimated(courses: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """Courses (..., frames) less what is noise, by a gain for each frequency."""
    frames = courses.shape[-1]
    return np.fft.irfft(_spectrum(courses) * gain, 2 * frames)[..., :frames]


def _smoothed(courses: np.ndarray, width: float, *, itself: bool = True) -> np.ndarray:
    """Gaussian mean of courses (..., frames), of frames around alone or with the frame itself."""
    reach = min(int(np.ceil(4 * width)), courses.shape[-1] - 1)
    kernel = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * width**2))
    if not itself:
        kernel[reach] = 0
    total = convolve1d(courses, kernel, mode="constant")
    return total / convolve1d(np.ones(courses.shape[-1]), kernel, mode="constant")


def _told(first: np.ndarray, second: np.ndarray, width: float, *, with_noise: bool = False) -> float:
    """Variance of courses (..., n, frames) that a Gaussian mean of the frames around tells of, with its noise or not.

    `first` and `second` are courses by halves of the parts, of which each has noise of its own.
    """
    around = [_smoothed(courses, width, itself=False) for courses in (first, second)]
    told = _product(first, around[1]) + _product(second, around[0])
    if with_noise:
        return told - (_product(around[0], around[0]) + _product(around[1], around[1])) / 2
    return told - _product(*around)
