"""How the field moves from frame to frame, as all of its parts show it, and frames that follow it.

An animal breathes and runs, and what the microscope sees of it is displaced. Whatever averages along time then averages
over neighbors that are other tissue. Where the movement is known, frames are moved back before they are denoised, and
denoised ones to where they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
from scipy.ndimage import convolve1d, gaussian_filter, gaussian_filter1d, shift

from restormer3d.threads import thread_count
from restormer3d.views import ChangedStack, SomeFrames

_LEAST_FRAMES = 16
_LEAST_SIDE = 32  # pixels of a field whose movement can be told
_SIDE = 256  # pixels of a field that movement is measured on; larger ones are binned
_COARSE_SIDE = 96  # to find whole pixels
_REACH = 10  # the field is looked for within a tenth of it
_SAMPLE = 512  # frames that the image is made of, at most
_AT_ONCE = 32  # frames that are read at once
_ROUNDS = 3  # of finding whole pixels, each time by a sharper image
_PASSES = 4  # of measuring what is left of the movement
_PARTS = 4  # of the field along y and along x, each of which tells of the movement by itself
_TAIL = 1.5  # large movements are rare: as this power of a Cauchy distribution one (binned) pixel wide
_BAND = (0.7, 5.0)  # pixels of Gaussian filters, between which the image tells of movement
_STEEP = 0.995  # quantile of slopes, above which they count less: single pixels of a detector do not move
_WIDTHS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # frames of Gaussian filters along time
_SURE = 4.0  # standard errors of the variance that parts of the field share
_LEAST = 0.1  # pixels of movement worth following, as a standard deviation
_GOES_ON = 0.3  # share of its variance that frames around foretell, from which on movement is followed as a whole,
_FORESEEN = 0.1  # and from which on as far as they do
_SPECTRAL_WIDTH = 4.0  # frequencies of Gaussian filters over spectra
_AT_REST = 0.02  # pixels, below which a frame stays as it is


@dataclass(frozen=True)
class Movement:
    """Where frames show the field.

    Attributes
    ----------
    shifts : numpy.ndarray
        Rows and columns by which each frame is displaced, as far as that is to be followed, (T, 2).
    deviation : tuple of float
        Standard deviations of all movement that parts of the field share, along y and x, in pixels.
    """

    shifts: np.ndarray
    deviation: tuple[float, float]

    def record(self) -> dict[str, Any]:
        """What to say of it in a sidecar."""
        largest = np.abs(self.shifts).max(axis=0)
        return {"deviation": self.deviation, "followed_up_to": largest.tolist()}


@dataclass(frozen=True)
class MovedBack(ChangedStack):
    """A stack (T, H, W) whose frames are moved to where the field is on average, to be read whole frames at a time.

    Beyond the border frames go on as in a mirror.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        As recorded.
    shifts : numpy.ndarray
        Rows and columns by which each frame is displaced, (T, 2).
    """

    shifts: np.ndarray

    def __getitem__(self, frames: slice) -> np.ndarray:
        """Read `moved[a:b]`."""
        return _moved(np.asarray(self.stack[frames], self.dtype), -self.shifts[frames])


def field_movement(stack: Any, *, jitter: bool) -> Movement | None:
    """Measure by how much each frame shows the field displaced, if it moves.

    Whole pixels are found by correlation with the mean of the frames, fractions by regression on the slopes of that
    image, in 16 parts of the field. Movement is what the parts share: noise and activity differ from part to part, and
    cancel in the products of displacements by one half of them with those by the other.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        Recorded intensities.
    jitter : bool
        Whether to follow movement of which only the frame itself tells, too. Else it is followed as far as it goes on:
        if the frames around foretell less than a third of it, with the filter along time that foretells most.

    Returns
    -------
    Movement or None
        None if the parts share less than a tenth of a pixel; also of fewer than 16 frames or 32 pixels.
    """
    frames, *sides = stack.shape
    if frames < _LEAST_FRAMES or min(sides) < _LEAST_SIDE:
        return None
    bins = -(-max(sides) // _SIDE)
    some = np.unique(np.linspace(0, frames - 1, min(frames, _SAMPLE)).astype(int))
    places = _field_finder(stack, some)
    shifts = np.zeros((frames, 2))
    shifts[some] = np.rint(places(some) / bins)
    level = np.rint(np.median(shifts[some], axis=0))
    shifts[some] -= level
    image, variance = _image(_seen(stack, bins, some, shifts))
    for number in range(_PASSES):
        looked_at = some
        if number == _PASSES // 2 and len(some) < frames:
            others = np.setdiff1d(np.arange(frames), some)
            shifts[others] = np.rint(places(others) / bins) - level
        if number >= _PASSES // 2:
            looked_at = np.arange(frames)
        parts, image, variance = _regression(stack, bins, looked_at, shifts, image, variance)
        shifts[looked_at] = np.stack([_course(parts, axis, jitter=True) for axis in (0, 1)], axis=1)
        if not shifts.any():
            return None
    if not jitter:
        shifts = np.stack([_course(parts, axis, jitter=False) for axis in (0, 1)], axis=1)
    y, x = (bins * float(np.sqrt(max(0.0, _product(*parts.halves(axis))))) for axis in (0, 1))
    return Movement(bins * shifts, (y, x))


def put_back(frames: Iterator[np.ndarray], shifts: np.ndarray) -> Iterator[np.ndarray]:
    """Move denoised frames (H, W) to where they were, by rows and columns (T, 2), as they come."""
    for frame, by in zip(frames, shifts, strict=True):
        yield _moved_frame(frame, by)


def _moved_frame(frame: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Move a frame (H, W) by rows and columns, by cubic splines."""
    if np.abs(by).max() < _AT_REST:
        return frame
    return shift(frame, by, output=np.result_type(frame, np.float32), order=3, mode="mirror")


def _moved(frames: np.ndarray, by: np.ndarray) -> np.ndarray:
    with ThreadPoolExecutor(thread_count()) as pool:
        return np.stack(list(pool.map(_moved_frame, frames, by)))


def _small_frame(frame: np.ndarray, bins: int, by: np.ndarray) -> np.ndarray:
    """Mean of squares of `bins` pixels of a frame (H, W), moved by rows and columns of them, float32."""
    height, width = (side // bins * bins for side in frame.shape)
    pixels = [frame[y:height:bins, x:width:bins].astype(np.float32) for y, x in product(range(bins), repeat=2)]
    return _moved_frame(np.sum(pixels, axis=0) / bins**2, by)


def _seen(stack: Any, bins: int, numbers: np.ndarray, shifts: np.ndarray) -> Iterator[np.ndarray]:
    """Some frames of a stack, binned and moved back by shifts of binned pixels (T, 2), a few at a time."""
    with ThreadPoolExecutor(thread_count()) as pool:
        for start in range(0, len(numbers), _AT_ONCE):
            some = numbers[start : start + _AT_ONCE]
            frames = SomeFrames(stack, some)[:] if some[-1] - some[0] < 2 * _AT_ONCE else (stack[int(t)] for t in some)
            yield np.stack(list(pool.map(lambda frame, by: _small_frame(frame, bins, -by), frames, shifts[some])))


def _image(blocks: Iterator[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance along time of frames that come in blocks (n, h, w), each (h, w)."""
    total, squares, level, count = 0.0, 0.0, None, 0
    for block in blocks:
        level = block[0].astype(np.float64) if level is None else level
        apart = block - level
        total, squares, count = total + apart.sum(0), squares + np.square(apart).sum(0), count + len(block)
    return level + total / count, squares / count - (total / count) ** 2


def _field_finder(stack: Any, some: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Function from numbers of frames to where they show the field, to about a pixel: (n, 2) in pixels of the stack.

    It is found by the image of some frames.
    """
    bins = -(-max(stack.shape[1:]) // _COARSE_SIDE)
    still = np.zeros((stack.shape[0], 2))
    frames = np.concatenate(list(_seen(stack, bins, some, still)))
    height, width = frames.shape[1:]
    reach = max(3, min(height, width) // _REACH)
    lags = np.array(list(product(range(-reach, reach + 1), repeat=2)))
    inside = slice(reach, height - reach), slice(reach, width - reach)
    rare = _TAIL * np.log1p(np.square(lags).sum(1))
    noise = max(float(np.median(frames.var(0))), 1e-30)
    level = frames.mean()

    def places(frames: np.ndarray, image: np.ndarray) -> np.ndarray:
        """Where in frames the image is most likely, given the noise."""
        detail = gaussian_filter(image, _BAND[0]) - gaussian_filter(image, _BAND[1])
        moved = np.stack([np.roll(detail, lag, (0, 1))[inside].ravel() for lag in lags]).astype(np.float32)
        fit = (frames - level)[:, *inside].reshape(len(frames), -1) @ moved.T - np.square(moved).sum(1) / 2
        found = lags[(fit / noise - rare).argmax(1)]
        found[np.abs(found).max(1) == reach] = 0  # it may be anywhere
        return found

    shifts = np.zeros((len(frames), 2), int)
    image = frames.mean(0)
    for _ in range(_ROUNDS - 1):
        shifts = places(frames, image)
        image = np.mean([np.roll(frame, -by, (0, 1)) for frame, by in zip(frames, shifts, strict=True)], axis=0)
    return lambda numbers: bins * np.concatenate([places(block, image) for block in _seen(stack, bins, numbers, still)])


@dataclass(frozen=True)
class _Parts:
    """What parts of the field tell of its displacement in each frame.

    `information` (parts, 2, 2) is the inverse of the displacements' covariance, `weighted` (parts, frames, 2) it times
    displacements from `base` (frames, 2), from which the frames had been moved back.
    """

    information: np.ndarray
    weighted: np.ndarray
    base: np.ndarray

    def displacement(self, chosen: np.ndarray, axis: int) -> np.ndarray:
        """Along an axis, less its mean over frames, as some parts (a mask) have it together, (frames,)."""
        covariance = np.linalg.pinv(self.information[chosen].sum(0))
        course = self.base[:, axis] + self.weighted[chosen].sum(0) @ covariance[axis]
        return course - course.mean()

    def halves(self, axis: int, without: int = -1) -> tuple[np.ndarray, np.ndarray]:
        """Displacements by one half of the parts and by the other, (ways of halving, frames) each; by all but one."""
        y, x = np.divmod(np.arange(_PARTS**2), _PARTS)
        others = np.arange(_PARTS**2) != without
        ways = [(a + b) % 2 == 0 for a, b in product((0 * y, y, y // 2), (0 * x, x, x // 2))][1:]
        by_half = [[self.displacement(half & others, axis) for half in halves] for halves in (ways, [~w for w in ways])]
        return np.array(by_half[0]), np.array(by_half[1])


def _regression(
    stack: Any, bins: int, numbers: np.ndarray, shifts: np.ndarray, image: np.ndarray, variance: np.ndarray
) -> tuple[_Parts, np.ndarray, np.ndarray]:
    """What parts of some frames, moved back by shifts (T, 2), tell of what is left; and a new image and variance."""
    height, width = image.shape
    margin = min(int(np.ceil(np.abs(shifts[numbers]).max())) + 1, min(height, width) // 5)
    smooth = gaussian_filter(image, 1.0)
    steepness = np.square(np.gradient(smooth)).sum(0)
    spread = gaussian_filter(variance, 1.0)
    weights = np.minimum(1, np.quantile(steepness, _STEEP) / np.maximum(steepness, 1e-30))
    weights /= np.maximum(spread, max(0.1 * float(np.median(spread)), 1e-30))
    edges = [np.linspace(margin, side - margin, _PARTS + 1).astype(int) for side in (height, width)]
    rows, columns = ([slice(*pair) for pair in zip(edge, edge[1:], strict=False)] for edge in edges)
    places = list(product(rows, columns))
    # Displacement, brightness and level: by the image as it is, and smoothed, where noise has little part in slopes.
    patterns = _patterns(image, places)
    weighted = [pattern * weights[p].ravel() for pattern, p in zip(_patterns(smooth, places), places, strict=True)]
    products: list[list[np.ndarray]] = [[] for _ in places]

    def looked_at() -> Iterator[np.ndarray]:
        for block in _seen(stack, bins, numbers, shifts):
            apart = block - image
            for place, pattern, each in zip(places, weighted, products, strict=True):
                each.append(apart[:, *place].reshape(len(block), -1) @ pattern.T)
            yield block

    new_image, new_variance = _image(looked_at())
    information, pulls = [], []
    for pattern, with_weights, each in zip(patterns, weighted, products, strict=True):
        square = with_weights @ pattern.T
        # What brightness and level explain tells nothing of displacement.
        explained = square[:2, 2:] @ np.linalg.pinv(square[2:, 2:])
        information.append(square[:2, :2] - explained @ square[2:, :2])
        product_of_all = np.concatenate(each)
        pulls.append(product_of_all[:, :2] - product_of_all[:, 2:] @ explained.T)
    return _Parts(np.array(information), np.array(pulls), shifts[numbers].copy()), new_image, new_variance


def _patterns(image: np.ndarray, places: list[tuple[slice, slice]]) -> list[np.ndarray]:
    """What an image (h, w) changes by in parts of it: displaced along y and x, brighter, lifted; each (4, pixels)."""
    slopes = -np.stack(np.gradient(image))
    return [
        np.stack([*slopes[:, *p].reshape(2, -1), (image[p] - image[p].mean()).ravel(), np.ones(image[p].size)])
        for p in places
    ]


def _course(parts: _Parts, axis: int, *, jitter: bool) -> np.ndarray:
    """Displacements along an axis that are worth following (frames,): zero if none are."""
    halves = parts.halves(axis)
    whole = parts.displacement(np.ones(_PARTS**2, bool), axis)
    told = {width: _told(*halves, width) for width in _WIDTHS}
    width = max(told, key=lambda each: told[each])
    smooth = partial(_estimated, gain=_signal_share(whole, *halves))
    if not jitter and told[width] < _GOES_ON * _product(*halves):
        smooth = partial(_smoothed, width=width)
        if told[width] < _FORESEEN * _product(*halves):
            return np.zeros_like(whole)
    return smooth(whole) if _is_sure(parts, axis, smooth) else np.zeros_like(whole)


def _product(first: np.ndarray, second: np.ndarray) -> float:
    """Variance that displacements by one half of the parts share with those by the other."""
    return float((first * second).mean())


def _power(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cross spectrum of displacements (..., frames), by frequency, smoothed over frequencies."""
    spectra = np.real(np.conj(_spectrum(first)) * _spectrum(second))
    power = spectra.reshape(-1, spectra.shape[-1]).mean(0)
    return gaussian_filter1d(power, _SPECTRAL_WIDTH, mode="mirror")


def _spectrum(courses: np.ndarray) -> np.ndarray:
    """Of courses (..., frames) that are mirrored at their end, so that they go on as they began."""
    return np.fft.rfft(np.concatenate([courses, courses[..., ::-1]], axis=-1))


def _signal_share(whole: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """How much of the displacements' power parts share, by frequency: the gain of Wiener's filter."""
    return np.clip(_power(first, second) / np.maximum(_power(whole, whole), 1e-30), 0, 1)


def _estimated(courses: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """Displacements (..., frames) less what is noise, by a gain for each frequency."""
    frames = courses.shape[-1]
    return np.fft.irfft(_spectrum(courses) * gain, 2 * frames)[..., :frames]


def _smoothed(courses: np.ndarray, width: float, *, itself: bool = True) -> np.ndarray:
    """Gaussian mean of displacements (..., frames), of frames around alone or with the frame itself."""
    reach = min(int(np.ceil(4 * width)), courses.shape[-1] - 1)
    kernel = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * width**2))
    if not itself:
        kernel[reach] = 0
    total = convolve1d(courses, kernel, mode="constant")
    return total / convolve1d(np.ones(courses.shape[-1]), kernel, mode="constant")


def _told(first: np.ndarray, second: np.ndarray, width: float) -> float:
    """Variance of the displacements by a half that those by the other in the frames around tell of."""
    gains = []
    for known, seen in ((first, second), (second, first)):
        apart = seen - _smoothed(known, width, itself=False)
        gains.append(np.square(seen).mean() - np.square(apart).mean())
    return float(np.mean(gains))


def _is_sure(parts: _Parts, axis: int, smooth: Callable[[np.ndarray], np.ndarray]) -> bool:
    """Whether parts share a movement that is worth following, whichever of them is left out."""
    variance = _product(*map(smooth, parts.halves(axis)))
    count = _PARTS**2
    without = np.array([_product(*map(smooth, parts.halves(axis, each))) for each in range(count)])
    error = np.sqrt((count - 1) / count * np.square(without - without.mean()).sum())
    return variance > max(_LEAST**2, _SURE * error)
