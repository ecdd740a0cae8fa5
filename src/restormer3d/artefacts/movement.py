"""How the field moves from frame to frame, as all of its parts show it, and frames that follow it.

An animal breathes and runs, and what the microscope sees of it is displaced. Whatever averages along time then averages
over neighbors that are other tissue. Where the movement is known, frames are moved back before they are denoised, and
denoised ones to where they were.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from scipy.ndimage import convolve1d, gaussian_filter, gaussian_filter1d

from restormer3d.artefacts.displacement import (
    REACH,
    Images,
    Parts,
    field_finder,
    measured_by_parts,
    moved_frame,
    sharpness,
    small_frames,
    stands_alone,
)
from restormer3d.normalization import sample_frames
from restormer3d.progress import Progress, Say, silent
from restormer3d.spool import held
from restormer3d.threads import thread_count
from restormer3d.views import ChangedStack

_LEAST_FRAMES = 16
_LEAST_SIDE = 32  # pixels of a field whose movement can be told
_SIDE = 256  # pixels of a field that movement is measured on; larger ones are binned
_SAMPLE = 512  # frames that the image is made of, at most
_PASSES = 6  # of measuring what is left of the movement
_MOST_AT_ONCE = 0.7  # pixels that a pass adds
_WIDTHS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # frames of Gaussian filters along time
_SURE = 3.0  # standard errors of the variance that parts of the field share
_KNOWN = 0.7  # pixels, that a frame's displacement has to be known to: the few photons of a frame may lie anywhere
_LEAST = 0.1  # pixels of movement worth following, as a standard deviation
_GOES_ON = 0.3  # share of its variance that frames around foretell, from which on movement is followed as a whole,
_FORESEEN = 0.1  # and from which on as far as they do
_AS_SHARP = 0.9  # as the image of frames that stay, that of moved ones has to be; splines between pixels blur a little
_MOVES = 8  # of a frame, that following it takes as long as
_SHARE_OF_TIME = 0.25  # of a time limit that it may take
_AROUND = 2.0  # pixels of a Gaussian filter, over which an image that few frames show is drawn to what is around,
_AS_AROUND = 8.0  # as if so many frames showed that
_FEW = 1e-6  # frames, that the mean of all stands in for where none shows anything
_SPECTRAL_WIDTH = 4.0  # frequencies of Gaussian filters over spectra


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

    Frames are larger than recorded ones: they hold all tissue that any of them shows. Where one shows nothing, it has
    the static image, and what the recorded frame differs by from it as in a mirror.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        As recorded.
    shifts : numpy.ndarray
        Rows and columns by which each frame is displaced, (T, 2).
    image : numpy.ndarray
        As :func:`static_image` finds it, (H + 2 m, W + 2 n).
    """

    shifts: np.ndarray
    image: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, rows and columns."""
        return self.stack.shape[0], *self.image.shape

    def __getitem__(self, frames: slice) -> np.ndarray:
        """Read `moved[a:b]`."""
        recorded = np.asarray(self.stack[frames], self.dtype)
        with ThreadPoolExecutor(thread_count()) as pool:
            return np.stack(list(pool.map(self._moved_back, recorded, self.shifts[frames])))

    def _moved_back(self, frame: np.ndarray, by: np.ndarray) -> np.ndarray:
        inside = _inside(self.image.shape, frame.shape)
        apart = frame - moved_frame(self.image, by)[inside]
        margins = [(place.start, place.start) for place in inside]
        return (moved_frame(np.pad(apart, margins, "reflect"), -by) + self.image).astype(frame.dtype, copy=False)


@dataclass(frozen=True)
class Followed:
    """A stack as far as its movement was taken back.

    Attributes
    ----------
    stack : stack of shape (T, H, W)
        Moved frames, or those that were recorded.
    movement : Movement or None
        How the field moves, if it does.
    field : tuple of int or None
        Rows and columns of recorded frames, if they were moved.
    seconds : float
        That it will take to put all frames back.
    """

    stack: Any
    movement: Movement | None
    field: tuple[int, int] | None = None
    seconds: float = 0.0

    def put_back(self, frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Move denoised frames (H, W) to where they were, as they come."""
        if self.movement is None or self.field is None:
            return frames
        return put_back(frames, self.movement.shifts, self.field)


def follow_movement(
    stack: Any, *, jitter: bool, seconds: float | None = None, progress: Progress = silent, say: Say = silent
) -> Followed:
    """Move frames back to where the field is on average, if it moves, and say what was found.

    Arguments as for :func:`field_movement`. Moved frames wait in memory, or in a temporary file if they are many; where
    that has no room, or where it would take most of the seconds that are left, all stays as it is.
    """
    if seconds is not None and _MOVES * _seconds_of_a_move(stack) * stack.shape[0] > _SHARE_OF_TIME * seconds:
        say("whether the field moves is not looked for, for want of time: frames stay where they are")
        return Followed(stack, None)
    movement = field_movement(stack, jitter=jitter, progress=progress)
    if movement is None:
        return Followed(stack, None)
    down, along = movement.deviation
    moves = f"the field moves by {down:.2g} pixels along y and {along:.2g} along x (standard deviations)"
    if not movement.shifts.any():
        say(
            f"{moves}, which no frame around foretells: it stays as it is. Denoising gains if such a recording is "
            "registered before, or by --movement all"
        )
        return Followed(stack, movement)
    image = static_image(stack, movement.shifts)
    values = held(MovedBack(stack, movement.shifts, image), lambda done: progress("move", done, stack.shape[0]))
    if values is None:
        say(f"{moves}, which is left as it is: the folder for temporary files has no room for moved frames")
        return Followed(stack, replace(movement, shifts=np.zeros_like(movement.shifts)))
    say(
        f"{moves}: frames are moved back before denoising, and denoised ones to where they were. Between pixels the "
        "noise of neighbors is mixed: it will be found to be correlated"
    )
    field, started = stack.shape[1:], time.monotonic()
    next(put_back(iter(values[:1]), movement.shifts.max(0, keepdims=True), field))
    return Followed(values, movement, field, seconds=len(values) * (time.monotonic() - started))


def _seconds_of_a_move(stack: Any) -> float:
    frame, started = np.asarray(stack[0], np.float32), time.monotonic()
    moved_frame(frame, np.array([0.5, 0.5]))
    return time.monotonic() - started


def field_movement(stack: Any, *, jitter: bool, progress: Progress = silent) -> Movement | None:
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
    progress : function, optional
        Called with (stage, done, total).

    Returns
    -------
    Movement or None
        None if the parts share less than a tenth of a pixel; also of fewer than 16 frames or 32 pixels. Frames that
        show the field displaced by more than an eighth of it are not found.
    """
    frames, *sides = stack.shape
    if frames < _LEAST_FRAMES or min(sides) < _LEAST_SIDE:
        return None
    bins = max(1, min(-(-max(sides) // _SIDE), min(sides) // _LEAST_SIDE))
    some = sample_frames(frames, _SAMPLE)
    groups = np.random.default_rng(0).permutation(frames) % 2
    places = field_finder(stack, some, groups)
    shifts = np.zeros((frames, 2))
    shifts[some] = np.rint(places(some) / bins)
    level = np.rint(np.median(shifts[some], axis=0))
    shifts[some] -= level
    images, unmoved, moves = _first_images(stack, bins, some, shifts, groups)
    everything, looked_at = np.arange(frames), some
    first, seen = _PASSES // 2, 0
    to_see = first * len(some) + (_PASSES - first) * frames
    parts: Parts | None = None
    for number in range(_PASSES):
        if number == first and len(some) < frames:
            others, looked_at = np.setdiff1d(everything, some), everything
            shifts[others] = np.rint(places(others) / bins) - level
        advance = partial(_advance, progress, seen, to_see)
        parts, images = measured_by_parts(stack, bins, looked_at, shifts, images, moves, advance)
        seen += len(looked_at)
        measured = _courses(parts, jitter=True)
        if not measured.any():
            return None
        # Where frames are still displaced, their mean is blurred, and slopes tell of too much.
        shifts[looked_at] += np.clip(measured - shifts[looked_at], -_MOST_AT_ONCE, _MOST_AT_ONCE)
        if not jitter and number and len(looked_at) == frames and not _courses(parts, jitter=False).any():
            break
    assert parts is not None
    if sharpness(images.means()) < _AS_SHARP * sharpness(unmoved.means()):
        return None
    if not jitter:
        shifts = _courses(parts, jitter=False)
    farthest = bins + np.array(sides) / REACH  # an outlier among frames may seem to lie anywhere
    shifts = np.clip(shifts, -farthest / bins, farthest / bins)
    y, x = (bins * float(np.sqrt(max(0.0, _product(*parts.halves(axis))))) for axis in (0, 1))
    return Movement(bins * shifts, (y, x))


def _advance(progress: Progress, seen: int, to_see: int, more: int) -> None:
    progress("movement", seen + more, to_see)


def static_image(stack: Any, shifts: np.ndarray) -> np.ndarray:
    """Mean of the frames of a stack, moved back by shifts (T, 2), of all tissue that any of them shows.

    Returns
    -------
    numpy.ndarray
        The field and as many rows and columns around it as it is displaced by at most, (H + 2 m, W + 2 n), float32.
        Where few frames show anything, it is drawn to what is around.
    """
    frames, height, width = stack.shape
    down, along = np.ceil(np.abs(shifts).max(axis=0)).astype(int)
    total = np.zeros((height + 2 * down, width + 2 * along))
    count = np.zeros_like(total)
    places = np.arange(total.shape[0]) - down, np.arange(total.shape[1]) - along
    for t in sample_frames(frames, _SAMPLE):
        frame = np.pad(np.asarray(stack[int(t)], np.float64), ((down, down), (along, along)), "reflect")
        rows, columns = (
            (place + by >= 0) & (place + by <= side - 1)
            for place, by, side in zip(places, shifts[t], (height, width), strict=True)
        )
        seen = rows[:, None] & columns
        total += np.where(seen, moved_frame(frame, -shifts[t]), 0)
        count += seen
    around = gaussian_filter(total, _AROUND) + _FEW * total.sum() / count.sum()
    around /= gaussian_filter(count, _AROUND) + _FEW
    return ((total + _AS_AROUND * around) / (count + _AS_AROUND)).astype(np.float32)


def put_back(frames: Iterator[np.ndarray], shifts: np.ndarray, shape: tuple[int, int]) -> Iterator[np.ndarray]:
    """Move denoised frames of :class:`MovedBack` to where they were, (H, W) of them, as they come.

    Parameters
    ----------
    frames : iterator of numpy.ndarray
        Denoised, (H + 2 m, W + 2 n).
    shifts : numpy.ndarray
        Rows and columns by which each frame is displaced, (T, 2).
    shape : tuple of int
        Rows and columns of recorded frames.
    """
    for frame, by in zip(frames, shifts, strict=True):
        yield moved_frame(frame, by)[_inside(frame.shape, shape)]


def _inside(larger: tuple[int, ...], field: tuple[int, ...]) -> tuple[slice, slice]:
    """Where a field lies in an image with margins around it."""
    y, x = (slice((outer - side) // 2, (outer - side) // 2 + side) for outer, side in zip(larger, field, strict=True))
    return y, x


def _first_images(
    stack: Any, bins: int, some: np.ndarray, shifts: np.ndarray, groups: np.ndarray
) -> tuple[Images, Images, np.ndarray]:
    """Images of some frames, moved back by shifts (T, 2) and as they are; and which pixels may move (h, w)."""
    images, unmoved = Images(groups), Images(groups)
    shape = [side // bins for side in stack.shape[1:]]
    changes = np.zeros(shape, bool)
    for block, numbers in small_frames(stack, bins, some, np.zeros_like(shifts)):
        changes |= (block != block[0]).any(0)
        unmoved.add(block, numbers)
        images.add(np.stack([moved_frame(x, -by) for x, by in zip(block, shifts[numbers], strict=True)]), numbers)
    return images, unmoved, changes & ~stands_alone(unmoved.means().mean(0))


def _courses(parts: Parts, *, jitter: bool) -> np.ndarray:
    return np.stack([_course(parts, axis, jitter=jitter) for axis in (0, 1)], axis=1)


def _course(parts: Parts, axis: int, *, jitter: bool) -> np.ndarray:
    """Displacements along an axis that are worth following (frames,): zero if none are."""
    halves = parts.halves(axis)
    whole = parts.displacement(np.ones(len(parts.information), bool), axis)
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


def _is_sure(parts: Parts, axis: int, smooth: Callable[[np.ndarray], np.ndarray]) -> bool:
    """Whether parts share a movement that is worth following, whichever of them is left out."""
    variance = _product(*map(smooth, parts.halves(axis)))
    count = len(parts.information)
    without = np.array([_product(*map(smooth, parts.halves(axis, each))) for each in range(count)])
    error = np.sqrt((count - 1) / count * np.square(without - without.mean()).sum())
    known = float(np.linalg.pinv(parts.information.sum(0))[axis, axis])
    return known < _KNOWN**2 and variance > max(_LEAST**2, _SURE * error)
