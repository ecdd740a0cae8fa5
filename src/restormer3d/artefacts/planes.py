"""Planes recorded in turns: a lens or piezo moves from frame to frame, and every n-th frame shows the same image.

So do channels that were saved frame by frame. Whatever smooths along time would blend them into one image that none of
them has. Planes that show different activity are therefore denoised apart; of planes so close that they show the same
activity, what their images differ by is taken away before, and put back afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from restormer3d.artefacts.ripple import WithoutRipple, electrical_ripple
from restormer3d.views import ChangedStack, SomeFrames

_MOST_PLANES = 16  # that are looked for
_RUN = 64  # consecutive frames that are looked at together
_MOST_RUNS = 16
_SIDE = 192  # pixels of the middle of the field that are looked at
_LEAST_CYCLES = 3  # of planes within a run
_READ = 16  # frames that are read at once
_CLEAR = 0.4  # variance between planes, in those of what noise adds to their means: less is not worth telling apart
_NO_CHANCE = 10.0  # standard errors of that variance for noise that neighbors do not share; where they do, fewer
_MORE = 1.1  # times the variance of fewer planes
_BLOCK = 4  # pixels whose activity is looked at together
_SAME_ACTIVITY = 0.5  # of a plane's covariance with itself, that planes of the same activity have with others
_SURE = 5.0  # standard errors, from which on that covariance tells anything
_SAME_IMAGE = 0.1  # of an image's variance, that images of neighboring planes differ by at most


@dataclass(frozen=True)
class Planes:
    """How many planes a stack shows in turns.

    Attributes
    ----------
    count : int
        Frame t shows plane t modulo `count`.
    shared : bool
        Whether they are so close that they show the same activity.
    """

    count: int
    shared: bool


def one_plane(stack: Any, number: int, count: int) -> SomeFrames:
    """Every `count`-th frame of a stack from frame `number` on."""
    return SomeFrames(stack, np.arange(number, stack.shape[0], count))


@dataclass(frozen=True)
class WithoutPlanes(ChangedStack):
    """A stack (T, H, W) less what its planes' images differ by, in floating point: integers might wrap.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        As recorded.
    differences : numpy.ndarray
        What to take away from the frames of each plane, (planes, H, W).
    """

    differences: np.ndarray

    def __getitem__(self, index: Any) -> np.ndarray:
        """Slice as the stack does."""
        times, *crop = index if isinstance(index, tuple) else (index,)
        plane = np.arange(self.shape[0])[times] % len(self.differences)
        away = self.differences[(slice(None), *crop)][plane]
        return np.subtract(self.stack[index], away, dtype=self.dtype)


def find_planes(stack: Any, count: int | Literal["auto"] = "auto") -> Planes | None:
    """Find out whether a stack shows several planes in turns, and whether their activity is the same.

    The mean of every n-th frame, less the mean of the n frames around each, is compared between two halves of the
    frames: noise and activity, which differ between the halves, have no part in what they share. Electrical ripple,
    whose phase may come back after some frames, is taken away before.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        Recorded intensities.
    count : int or "auto"
        How many planes there are, if that is known.

    Returns
    -------
    Planes or None
        None if there is one plane, or too few frames to tell: less than twelve for each.

    Raises
    ------
    ValueError
        If the stack has less than two frames for each of `count` planes.
    """
    frames = stack.shape[0]
    if count != "auto" and frames < 2 * count:
        raise ValueError(f"planes: expected at least two frames of each of {count} planes, got {frames} frames")
    run = min(_RUN, frames // 4)
    most = run // _LEAST_CYCLES
    if count == 1 or most < 2 or (count != "auto" and count > most):
        return None if count in (1, "auto") else Planes(count, shared=False)
    planes = _planes(stack, count, run, most)
    if planes is None or count != "auto" or (ripple := electrical_ripple(stack)) is None:
        return planes
    return _planes(WithoutRipple(stack, ripple), count, run, most)


def plane_images(stack: Any, count: int) -> np.ndarray:
    """Temporal mean of each plane, (planes, H, W) float64."""
    total = np.zeros((count, *stack.shape[1:]))
    for start in range(0, stack.shape[0], _READ):
        for t, frame in enumerate(stack[start : start + _READ], start):
            total[t % count] += frame
    return total / np.bincount(np.arange(stack.shape[0]) % count)[:, None, None]


def of_one_image(stack: Any, planes: Planes | None) -> Any:
    """A stack that shows one image, to measure its noise: planes of the same activity together, else the first."""
    if planes is None:
        return stack
    if planes.shared:
        return with_one_image(stack, plane_images(stack, planes.count))
    return one_plane(stack, 0, planes.count)


def with_one_image(stack: Any, images: np.ndarray | None) -> Any:
    """A stack without what the images (planes, H, W) of its planes differ by, if there are several."""
    return stack if images is None else WithoutPlanes(stack, differences_of(images))


def differences_of(images: np.ndarray) -> np.ndarray:
    """What images (planes, H, W) differ by from their mean."""
    return images - images.mean(0)


def put_back(frames: Iterator[np.ndarray], differences: np.ndarray) -> Iterator[np.ndarray]:
    """Add what planes differ by (planes, H, W) to denoised frames (H, W), as they come."""
    for t, frame in enumerate(frames):
        yield frame + differences[t % len(differences)]


def in_turns(planes: Sequence[Iterator[np.ndarray]]) -> Iterator[np.ndarray]:
    """Put the frames of planes together, one of each at a time, as they were recorded."""
    while True:
        for plane in planes:
            frame = next(plane, None)
            if frame is None:  # the first plane has as many frames as any other
                return
            yield frame


def _planes(stack: Any, count: int | Literal["auto"], run: int, most: int) -> Planes | None:
    """What runs of some frames tell of up to `most` planes, ripple or not."""
    frames = stack.shape[0]
    starts = np.linspace(0, frames - run, max(4, min(_MOST_RUNS, frames // run))).astype(int)
    seen = _read_runs(stack, starts, run)
    found = _images_apart(seen, starts, min(most, _MOST_PLANES) if count == "auto" else count)
    planes = _planes_told_apart(seen, found, frames) if count == "auto" else count
    return None if planes == 1 else Planes(planes, _same_activity(seen, starts, found[planes].mean(0)))


def _read_runs(stack: Any, starts: np.ndarray, run: int) -> np.ndarray:
    """Read the middle of the field, (runs, frames of a run, h, w) float32, less its first value."""
    height, width = stack.shape[1:]
    y, x = (slice(max(0, side - _SIDE) // 2, max(0, side - _SIDE) // 2 + _SIDE) for side in (height, width))
    kept = np.empty((len(starts), run, min(height, _SIDE), min(width, _SIDE)), np.float32)
    level = np.asarray(stack[0:1, y, x])[0, 0, 0]  # integers of 32 bits may have more digits than float32
    exact = np.result_type(stack.dtype, np.float32)
    for block, start in zip(kept, starts, strict=True):
        for t in range(0, run, _READ):
            some = stack[start + t : start + min(t + _READ, run), y, x]
            block[t : t + len(some)] = np.subtract(some, level, dtype=exact)
    return kept


def _images_apart(seen: np.ndarray, starts: np.ndarray, most: int) -> dict[int, np.ndarray]:
    """What the images of 1 to `most` planes differ by from their mean, in two halves of the runs (2, planes, h, w)."""
    runs, run = seen.shape[:2]
    counts = range(2, most + 1)
    total = np.zeros((2, sum(counts), seen[0, 0].size))
    for number, (start, frames) in enumerate(zip(starts, seen, strict=True)):
        weights = np.concatenate([_phase_weights(count, int(start), run) for count in counts])
        total[2 * number // runs] += weights.astype(np.float32) @ frames.reshape(run, -1)
    total /= np.array([-(-runs // 2), runs // 2])[:, None, None]
    images = np.split(total.reshape(2, -1, *seen.shape[2:]), np.cumsum(list(counts))[:-1], axis=1)
    return {count: each - each.mean(1, keepdims=True) for count, each in zip(counts, images, strict=True)}


def _phase_weights(count: int, start: int, run: int) -> np.ndarray:
    """Weights (planes, frames of a run) that give the mean of each plane's frames less that of the planes around."""
    around = np.ones(count + 1 - count % 2) / count  # of an even number of planes the outermost one at both ends
    if count % 2 == 0:
        around[[0, -1]] /= 2
    reach = len(around) // 2
    weights = np.zeros((count, run))
    for t in range(reach, run - reach):
        row = weights[(start + t) % count]
        row[t - reach : t + reach + 1] -= around
        row[t] += 1
    inner = (start + np.arange(reach, run - reach)) % count
    return weights / np.bincount(inner, minlength=count)[:, None]


def _planes_told_apart(seen: np.ndarray, found: dict[int, np.ndarray], frames: int) -> int:
    """The smallest number of planes that explains what differs; 1 if nothing does beyond noise."""
    best, explained = 1, 0.0
    for count, (first, second) in found.items():
        between = float((first * second).mean())
        noise = float(np.square(seen[:, count:, ::2, ::2] - seen[:, :-count, ::2, ::2]).mean()) / 2 / frames
        # By chance, as far as few frames of a long recording and a small field tell.
        chance = 2 * noise * frames / seen[:, :, 0, 0].size * np.sqrt((count - 1) / first[0].size)
        if between > _MORE * explained + max(_CLEAR * noise * (count - best), _NO_CHANCE * chance):
            best, explained = count, between
    return best


def _same_activity(seen: np.ndarray, starts: np.ndarray, differences: np.ndarray) -> bool:
    """Whether what changes in one plane changes in the others, too; where little does, whether images are alike."""
    count, run = len(differences), seen.shape[1]
    down, along = (min(_BLOCK, side) for side in seen.shape[2:])
    height, width = seen.shape[2] // down * down, seen.shape[3] // along * along
    blocks = np.empty((*seen.shape[:2], height // down, width // along))
    image = np.zeros((height, width))
    for number, start in enumerate(starts):
        frames = (seen[number] - differences[(start + np.arange(run)) % count])[:, :height, :width]
        image += frames.mean(0) / len(starts)
        blocks[number] = frames.reshape(run, height // down, down, width // along, along).mean((2, 4))
    blocks -= blocks.mean(1, keepdims=True)
    products = [(blocks[:, lag:] * blocks[:, :-lag]).mean() for lag in range(1, count + 1)]
    error = float(blocks.var()) / np.sqrt(blocks.size)
    if products[-1] > _SURE * error:
        return bool(np.mean(products[:-1]) > _SAME_ACTIVITY * products[-1])
    return bool(np.square(differences).mean() < _SAME_IMAGE * image.var())
