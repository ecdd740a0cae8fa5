"""The filters a network has to beat: temporal mean, spatio-temporal Gaussian, block-wise truncated SVD.

Each is a generator of finished frames in order. They need no training, only numpy, and seconds to minutes on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from restormer3d.normalization import temporal_mean
from restormer3d.photon_transfer import usual_variance
from restormer3d.progress import Progress, silent
from restormer3d.tiling import hann_weights, window_starts

SIGMAS_T = (0.5, 1.0, 2.0, 3.0, 4.5, 7.0, 10.0, 14.0, 20.0, 30.0)
SIGMAS_XY = (0.0, 0.5, 0.8, 1.0, 1.4, 2.0, 3.0)
_FRAMES_AT_ONCE = 16
_TRUNCATED = 4  # deviations, where a kernel ends
_CHOICE_FRAMES, _CHOICE_SIDE = 400, 64  # of the pieces by which widths are chosen
_SVD_SIDE = 16  # pixels
_SVD_BYTES = 3 * 2**29  # most bytes of one temporal block of `svd_frames` in float32: 1.5 GiB
_SVD_FRAMES = 1500  # most frames of a temporal block


def temporal_mean_frames(stack: Any) -> Iterator[np.ndarray]:
    """Yield the mean over time once for every frame, (H, W) float32: no noise left, and no activity."""
    image = temporal_mean(stack)
    for _ in range(stack.shape[0]):
        yield image.copy()


def gaussian_frames(stack: Any, sigma_t: float, sigma_xy: float, *, around_mean: bool = False) -> Iterator[np.ndarray]:
    """Filter a stack with a spatio-temporal Gaussian and yield its frames in order.

    Borders are reflected with the edge repeated (d c b a | a b c d | d c b a), along time too, and the kernel ends
    at four widths: the result is that of `scipy.ndimage.gaussian_filter`. Memory holds the
    8 * sigma_t frames that a frame depends on, whatever the length of the stack.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        Noisy intensities.
    sigma_t, sigma_xy : float
        Standard deviations in frames and pixels; 0 leaves an axis alone.
    around_mean : bool
        Filter only what differs from the temporal mean, whose detail is almost free of noise and stays sharp.

    Yields
    ------
    numpy.ndarray
        Filtered frame, (H, W) float32.

    """
    length, height, width = stack.shape
    kernel, kernel_xy = _kernel(sigma_t), _kernel(sigma_xy)
    reach = len(kernel) // 2
    detail = np.float32(0)
    if around_mean:
        mean = temporal_mean(stack)
        detail = mean - _blurred(mean, kernel_xy)
    size = min(length, 2 * reach + _FRAMES_AT_ONCE)
    ring, read = np.zeros((size, height, width), dtype=np.float32), 0  # blurred frame t lies at t % size
    for start in range(0, length, _FRAMES_AT_ONCE):
        stop = min(length, start + _FRAMES_AT_ONCE)
        low, high = max(0, start - reach), min(length, stop + reach)
        for t in range(read, high):
            ring[t % size] = _blurred(stack[t], kernel_xy)
        read = high
        weights = np.zeros((stop - start, size), dtype=np.float32)
        weights[:, np.arange(low, high) % size] = _reflected(kernel, np.arange(start, stop), length)[:, low:high]
        yield from np.tensordot(weights, ring, axes=1) + detail


def choose_gaussian(stack: Any, *, around_mean: bool = False) -> tuple[float, float]:
    """Choose the widths of `gaussian_frames` that predict frames best from their neighbors alone.

    Every frame of a sample is predicted by the filter with the frame's own weight removed and the rest scaled up to
    one. The noise is independent between frames, so the mean squared error is the noise plus the filter's error. Up to
    four pieces of 400 x 64 x 64 in the middle of the stack along time are looked at.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        Noisy intensities, T at least 2.
    around_mean : bool
        As in :func:`gaussian_frames`.

    Returns
    -------
    tuple of float
        (sigma_t, sigma_xy), of :data:`SIGMAS_T` and :data:`SIGMAS_XY`.
    """
    length = stack.shape[0]
    if length < 2:
        raise ValueError("the widths are chosen by predicting frames from others: the stack has 1 frame, need 2")
    count = min(length, _CHOICE_FRAMES)
    times = np.unique(np.linspace(0, count - 1, min(count, 80)).round().astype(int))
    predictors = [_reflected(_kernel(sigma), times, count) for sigma in SIGMAS_T]
    for weights in predictors:
        weights[np.arange(len(times)), times] = 0
        weights /= weights.sum(axis=1, keepdims=True)
    errors = np.zeros((len(SIGMAS_T), len(SIGMAS_XY)))
    for piece in _pieces(stack, count, _CHOICE_SIDE):
        for j, sigma_xy in enumerate(SIGMAS_XY):
            blurred = _blurred(piece, _kernel(sigma_xy))
            target = piece[times]
            if around_mean:  # the mean, too, of the other frames alone
                sharp = piece - blurred
                target = target - (sharp.sum(axis=0) - sharp[times]) / (count - 1)
            for i, predictor in enumerate(predictors):
                errors[i, j] += np.square(np.tensordot(predictor, blurred, axes=1) - target).sum(dtype=np.float64)
    best_t, best_xy = np.unravel_index(errors.argmin(), errors.shape)
    return SIGMAS_T[best_t], SIGMAS_XY[best_xy]


def svd_frames(
    stack: Any,
    sigma_t: float = 2.0,
    sigma_xy: float = 0.5,
    *,
    progress: Progress | None = None,
) -> Iterator[np.ndarray]:
    """Denoise by singular value decomposition of overlapping blocks and yield the frames in order.

    What differs from the temporal mean is divided by the noise of each pixel, cut into blocks of 16 x
    16 pixels with half overlap; of every block only the components above the largest that noise alone
    would give are kept. The bound is that of random matrices (Marchenko and Pastur), raised by what differences of
    frames show beyond it, since neighboring pixels may share noise. The kept components are smoothed; if they
    are not (both widths 0), their singular values are shrunk instead. The temporal mean is never blurred.

    Stacks of more than 1500 frames, or more than 1.5 GiB as float32, are done in temporal blocks that overlap by an
    eighth and fade into each other; memory is about one such block and the frames it was read from.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        Noisy intensities.
    sigma_t, sigma_xy : float
        Small Gaussian on the kept components, in frames and pixels.
    progress : function, optional
        Called with ("svd", blocks done, blocks in all).

    Yields
    ------
    numpy.ndarray
        Denoised frame, (H, W) float32.

    References
    ----------
    M. Gavish and D. L. Donoho, "Optimal shrinkage of singular values", IEEE Trans. Inf. Theory 63 (2017).
    """
    length, height, width = stack.shape
    count = min(length, int(np.clip(_SVD_BYTES // (4 * height * width), 64, _SVD_FRAMES)))
    starts = window_starts(length, count, 1 / 8)
    tail = np.empty((0, height, width), dtype=np.float32)  # the last temporal block's opinion on the next one's start
    for number, start in enumerate(starts):

        def report(done: int, total: int, number: int = number) -> None:
            if progress is not None:
                progress("svd", number * total + done, len(starts) * total)

        noisy = stack[start : start + count]
        if len(noisy) < 2:
            denoised = np.asarray(noisy, np.float32)
        else:
            parts = decomposed(noisy, shrink=not (sigma_t or sigma_xy), report=report)
            denoised = put_together(parts, sigma_t, sigma_xy)
        fade = ((np.arange(len(tail), dtype=np.float32) + 0.5) / max(1, len(tail)))[:, None, None]
        denoised[: len(tail)] = fade * denoised[: len(tail)] + (1 - fade) * tail
        stop = starts[number + 1] - start if number + 1 < len(starts) else count
        tail = denoised[stop:].copy()
        yield from (frame.copy() for frame in denoised[:stop])


class Decomposed(NamedTuple):
    """A stack (T, H, W) as components of overlapping blocks, not smoothed yet.

    Attributes
    ----------
    mean, deviation : numpy.ndarray
        Temporal mean, and deviation of each pixel's noise, (H, W).
    crops : list of tuple of slice
        Rows and columns of each block.
    components : list of tuple of numpy.ndarray
        Of each block, time courses (T, k) and images (k, pixels), in deviations of the noise.
    """

    mean: np.ndarray
    deviation: np.ndarray
    crops: list[Any]
    components: list[tuple[np.ndarray, np.ndarray]]


def decomposed(noisy: np.ndarray, *, shrink: bool, report: Callable[[int, int], None] = silent) -> Decomposed:
    """Decompose frames (T, H, W), at least two, that fit into memory, as :func:`svd_frames` does.

    `shrink` says whether singular values are shrunk; `report` is called with (blocks done, blocks in all).
    """
    length, height, width = noisy.shape
    mean = temporal_mean(noisy)
    steps = (np.square(later.astype(np.float64) - earlier) for earlier, later in pairwise(noisy))
    deviation = np.sqrt(usual_variance(mean, sum(steps) / (2 * length - 2), length - 1)).astype(np.float32)
    rows, columns = min(_SVD_SIDE, height), min(_SVD_SIDE, width)
    corners = [(y, x) for y in window_starts(height, rows, 0.5) for x in window_starts(width, columns, 0.5)]
    crops = [np.s_[y : y + rows, x : x + columns] for y, x in corners]
    excess = _noise_excess(noisy, deviation, crops)
    components = []
    for done, crop in enumerate(crops, start=1):
        white = (noisy[:, *crop] - mean[crop]) / deviation[crop]
        components.append(_components(white.reshape(length, -1), excess, shrink))
        report(done, len(crops))
    return Decomposed(mean, deviation, crops, components)


def put_together(parts: Decomposed, sigma_t: float, sigma_xy: float) -> np.ndarray:
    """Smooth the components of a stack, and blend what they make of it, (T, H, W) float32."""
    denoised = np.zeros((len(parts.components[0][0]), *parts.mean.shape), dtype=np.float32)
    weight = np.zeros(parts.mean.shape, dtype=np.float32)
    for crop, (time, space) in zip(parts.crops, parts.components, strict=True):
        side = parts.deviation[crop].shape
        taper = np.outer(*map(hann_weights, side))
        time = _filtered(time, _kernel(sigma_t), axis=0)
        images = _blurred(space.reshape(-1, *side) * parts.deviation[crop], _kernel(sigma_xy))
        denoised[:, *crop] += np.tensordot(time, images * taper, axes=1)
        weight[crop] += taper
    denoised /= weight
    denoised += parts.mean
    return denoised


def _noise_excess(noisy: np.ndarray, deviation: np.ndarray, crops: list[Any], most: int = 25) -> float:
    """How far the singular values of the noise reach beyond those of white noise; at least 1.

    Differences of separate pairs of frames are noise without signal. Their third value is compared, since the first
    two may be flicker or motion, and the median over blocks is taken, since some blocks are active.
    """
    pairs, third = len(noisy) // 2, []
    for index in np.unique(np.linspace(0, len(crops) - 1, min(most, len(crops))).astype(int)):
        cut = noisy[: 2 * pairs, *crops[index]].astype(np.float32)
        noise = (cut[1::2] - cut[::2]) / (np.float32(np.sqrt(2)) * deviation[crops[index]])
        third.append(np.linalg.svd(noise.reshape(pairs, -1), compute_uv=False)[:3][-1])
    white = np.random.default_rng(0).standard_normal((pairs, deviation[crops[0]].size))
    return max(1.0, float(np.median(third) / np.linalg.svd(white, compute_uv=False)[:3][-1]))


def _components(white: np.ndarray, excess: float, shrink: bool) -> tuple[np.ndarray, np.ndarray]:
    """Split (T, N) with unit noise into time courses (T, k) and images (k, N), k components above the noise.

    The bound on the squared singular values is the one that noise exceeds in about 1 % of blocks (Johnstone, Ann.
    Statist. 29, 2001). With ``shrink`` each value y, in units of the noise, becomes sqrt((y^2 - b - 1)^2 - 4 b) / y,
    which undoes on average what the noise adds to it and to the directions of its vectors.
    """
    tall = white.shape[0] >= white.shape[1]
    squares, vectors = np.linalg.eigh(white.T @ white if tall else white @ white.T)
    squares /= excess**2
    short, long = sorted(np.sqrt(white.shape))
    kept = squares > (short + long) ** 2 + 2 * (short + long) * (1 / short + 1 / long) ** (1 / 3)
    basis = vectors[:, kept]
    gain = np.ones(kept.sum(), dtype=np.float32)
    if shrink:
        y2, b = squares[kept] / long**2, (short / long) ** 2
        gain = (np.sqrt(np.maximum((y2 - b - 1) ** 2 - 4 * b, 0)) / y2).astype(np.float32)
    if tall:
        return white @ basis * gain, basis.T
    return basis * gain, basis.T @ white


def _kernel(sigma: float) -> np.ndarray:
    """Gaussian weights that add up to one, float32, of odd length."""
    if not sigma >= 0:
        raise ValueError(f"the width of a Gaussian must be 0 or more, got {sigma}")
    reach = int(_TRUNCATED * sigma + 0.5)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(sigma, 1e-6)) ** 2)
    return (weights / weights.sum()).astype(np.float32)


def _filtered(x: np.ndarray, kernel: np.ndarray, axis: int) -> np.ndarray:
    """Convolve one axis with an odd symmetric kernel, borders reflected with the edge repeated."""
    reach = len(kernel) // 2
    size = x.shape[axis]
    padded = np.pad(x, [(reach, reach) if a == axis % x.ndim else (0, 0) for a in range(x.ndim)], mode="symmetric")
    moved = np.moveaxis(padded, axis, 0)
    total = kernel[0] * moved[:size]
    for offset in range(1, len(kernel)):
        total += kernel[offset] * moved[offset : offset + size]
    return np.moveaxis(total, 0, axis)


def _blurred(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Filter the last two axes; float32."""
    image = np.asarray(image).astype(np.float32, copy=False)
    return image if len(kernel) == 1 else _filtered(_filtered(image, kernel, -1), kernel, -2)


def _reflected(kernel: np.ndarray, times: np.ndarray, length: int) -> np.ndarray:
    """Weights (len(times), length) of every frame in the filtered frames at `times`, borders reflected."""
    reach = len(kernel) // 2
    weights = np.zeros((len(times), length), dtype=np.float32)
    for offset, share in enumerate(kernel, start=-reach):
        position = (times + offset) % (2 * length)
        weights[np.arange(len(times)), np.minimum(position, 2 * length - 1 - position)] += share
    return weights


def _pieces(stack: Any, count: int, side: int) -> Iterator[np.ndarray]:
    """Yield up to 2 x 2 pieces (count, side, side) spread over the field, from the middle of the stack."""
    first = (stack.shape[0] - count) // 2
    tops, lefts = (sorted({max(0, size - side) * k // 3 for k in (1, 2)}) for size in stack.shape[1:])
    for top in tops:
        for left in lefts:
            bottom, right = min(stack.shape[1], top + side), min(stack.shape[2], left + side)
            yield stack[first : first + count, top:bottom, left:right].astype(np.float32)
