"""How the field moves from frame to frame, as all of its parts show it, and frames that follow it.

An animal breathes and runs, and what the microscope sees of it is displaced: the whole field (rigid movement), or some
of it more than the rest, as tissue gives way, or as rows are scanned one after the other meanwhile. Whatever averages
along time then averages over neighbors that are other tissue. Where the movement is known, frames are moved back before
they are denoised, and denoised ones to where they were.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from restormer3d.artefacts import warp
from restormer3d.artefacts.displacement import (
    REACH,
    Images,
    Parts,
    field_finder,
    measured_by_parts,
    sharpness,
    small_frames,
    stands_alone,
)
from restormer3d.artefacts.moved_frames import MovedBack, put_back, static_images
from restormer3d.artefacts.movement_courses import SURE, courses_to_follow, shared_variance
from restormer3d.artefacts.planes import plane_images, with_one_image
from restormer3d.normalization import sample_frames
from restormer3d.progress import Progress, Say, silent
from restormer3d.spool import held

_LEAST_FRAMES = 16
_LEAST_SIDE = 32  # pixels of a field whose movement can be told
_LEAST_SIDE_BENT = 96  # pixels of one in which activity is told from other than rigid movement
_SIDE = 256  # pixels of a field that movement is measured on; larger ones are binned
_SAMPLE = 512  # frames that the image is made of, at most
_PASSES = 6  # of measuring what is left of the rigid movement,
_PASSES_BENT = 4  # and then of all
_MOST_AT_ONCE = 0.7  # pixels that a pass adds
_SURE_BENT = 4.3  # standard errors, where other than rigid movement is first seen: cells may lie in two of the parts
_SHARPER = 1.015  # times as sharp an image has to be where other than rigid movement is followed, too
_AS_SHARP = 0.9  # as the image of frames that stay, that of moved ones has to be; splines between pixels blur a little
_MOVES = 12  # of a frame, that following it takes as long as
_SHARE_OF_TIME = 0.25  # of a time limit that it may take


@dataclass(frozen=True)
class Movement:
    """Where frames show the field.

    Attributes
    ----------
    weights : numpy.ndarray
        Of the patterns by which each frame is displaced (see `artefacts.warp`), as far as that is to be followed,
        pixels, (T, 2, K): K is 1 where the field moves as a whole.
    deviation : tuple of float
        Standard deviations of all rigid movement that parts of the field share, along y and x, in pixels.
    bent : tuple of float
        Of the other movement, the mean over the field.
    """

    weights: np.ndarray
    deviation: tuple[float, float]
    bent: tuple[float, float] = (0.0, 0.0)

    def record(self) -> dict[str, Any]:
        """What to say of it in a sidecar."""
        largest = warp.farthest(self.weights).max(0).tolist()
        return {"deviation": self.deviation, "non_rigid": self.bent, "followed_up_to": largest}


@dataclass(frozen=True)
class Followed:
    """A stack as far as its movement was taken back.

    Attributes
    ----------
    stack : stack of shape (T, H, W)
        Moved frames, or those that were recorded.
    movement : Movement or None
        How the field moves, if it does.
    images : numpy.ndarray or None
        Of planes that are shown in turns, as they now are, (planes, H, W).
    field : tuple of int or None
        Rows and columns of recorded frames, if they were moved.
    seconds : float
        That it will take to put all frames back.
    """

    stack: Any
    movement: Movement | None
    images: np.ndarray | None
    field: tuple[int, int] | None = None
    seconds: float = 0.0

    def put_back(self, frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Move denoised frames (H, W) to where they were, as they come."""
        if self.movement is None or self.field is None:
            return frames
        return put_back(frames, self.movement.weights, self.field)


def follow_movement(
    stack: Any,
    images: np.ndarray | None = None,
    *,
    jitter: bool,
    seconds: float | None = None,
    progress: Progress = silent,
    say: Say = silent,
) -> Followed:
    """Move frames back to where the field is on average, if it moves, and say what was found.

    Arguments as for :func:`field_movement`; `images` (planes, H, W) are those of planes of the same activity that are
    shown in turns. Moved frames wait in memory, or in a temporary file if they are many; where that has no room, or
    where it would take most of the seconds that are left, all stays as it is.
    """
    if seconds is not None and _MOVES * _seconds_of_a_move(stack) * stack.shape[0] > _SHARE_OF_TIME * seconds:
        say("whether the field moves is not looked for, for want of time: frames stay where they are")
        return Followed(stack, None, images)
    movement = field_movement(with_one_image(stack, images), jitter=jitter, progress=progress)
    if movement is None:
        return Followed(stack, None, images)
    down, along = movement.deviation
    moves = f"the field moves by {down:.2g} pixels along y and {along:.2g} along x (standard deviations)"
    if any(movement.bent):
        down, along = movement.bent
        moves += f", and parts of it by {down:.2g} and {along:.2g} against one another"
    if not movement.weights.any():
        say(
            f"{moves}, which no frame around foretells: it stays as it is. Denoising gains if such a recording is "
            "registered before, or by --movement all"
        )
        return Followed(stack, movement, images)
    planes = 1 if images is None else len(images)
    moved_back = MovedBack(stack, movement.weights, static_images(stack, movement.weights, planes))
    values = held(moved_back, lambda done: progress("move", done, stack.shape[0]))
    if values is None:
        say(f"{moves}, which is left as it is: the folder for temporary files has no room for moved frames")
        return Followed(stack, replace(movement, weights=np.zeros_like(movement.weights)), images)
    say(
        f"{moves}: frames are moved back before denoising, and denoised ones to where they were. Between pixels the "
        "noise of neighbors is mixed: it will be found to be correlated"
    )
    field, started = stack.shape[1:], time.monotonic()
    next(put_back(iter(values[:1]), movement.weights.max(0, keepdims=True), field))
    images = None if images is None else plane_images(values, planes)
    return Followed(values, movement, images, field, seconds=len(values) * (time.monotonic() - started))


def _seconds_of_a_move(stack: Any) -> float:
    frame, started = np.asarray(stack[0], np.float32), time.monotonic()
    warp.moved(frame, np.array([[0.5], [0.5]]), frame.shape)
    return time.monotonic() - started


def field_movement(stack: Any, *, jitter: bool, progress: Progress = silent) -> Movement | None:
    """Measure by how much each frame shows the field displaced, if it moves.

    Whole pixels are found by correlation with the mean of the frames, fractions by regression on the slopes of that
    image, in 16 parts of the field, and what they share (see `artefacts.movement_courses`): rigid movement. Then the
    same in 36 parts: what the scan makes of rigid movement, and in fields of at least 96 (binned) pixels how the field
    bends, as far as that makes the mean sharper by 1.5 %.

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
    some, everything = sample_frames(frames, _SAMPLE), np.arange(frames)
    groups = np.random.default_rng(0).permutation(frames) % 2
    places = field_finder(stack, some, groups)
    weights = np.zeros((frames, 2, 1))
    weights[some, :, 0] = np.rint(places(some) / bins)
    level = np.rint(np.median(weights[some], axis=0))
    weights[some] -= level
    images, unmoved, moves = _first_images(stack, bins, some, weights, groups)
    passes = [some] * (_PASSES // 2) + [everything] * (_PASSES - _PASSES // 2)
    passes_bent = [some] + [everything] * (_PASSES_BENT - 1)
    seen, to_see = 0, sum(map(len, passes)) + 2 * _PASSES_BENT * frames

    def advance(more: int) -> None:
        nonlocal seen
        seen += more
        progress("movement", seen, to_see)

    look = partial(measured_by_parts, stack, bins, moves=moves, advance=advance)

    def add_others(weights: np.ndarray) -> None:
        others = np.setdiff1d(everything, some)
        weights[others, :, 0] = np.rint(places(others) / bins) - level[:, 0]

    rigid = _pursued(look, passes, weights, images, jitter, add_others)
    if rigid is not None:
        if sharpness(rigid.images.means()) < _AS_SHARP * sharpness(unmoved.means()):
            return None
        passes_bent[0] = everything  # what the scan makes of it shows in frames that follow one another
    start = np.zeros((frames, 2, warp.PATTERNS))
    start[..., :1] = 0 if rigid is None else rigid.weights
    before = unmoved if rigid is None else rigid.images
    bent, sure = _bent(look, passes_bent, start, before, jitter)
    found = bent or rigid
    if found is None:
        return None

    def to_follow(found: _Found) -> np.ndarray:
        return found.weights if jitter else _followed(found.parts, found.weights, jitter=False, sure=sure)

    weights = to_follow(found)
    if rigid is not None and bent is not None:
        as_rigid = to_follow(rigid)
        if (as_rigid[..., 0].any(0) & ~weights[..., 0].any(0)).any():  # smaller parts may be less sure of it
            found, weights = rigid, as_rigid
    weights = warp.within(weights, 1 + np.array(sides) / REACH / bins)  # outliers among frames may seem to lie anywhere
    if seen < to_see:  # some passes had nothing to look for
        advance(to_see - seen)
    y, x = bins * np.sqrt(shared_variance(found.parts.rigid()))
    down, along = bins * np.sqrt(np.square(found.weights[..., 1:]).mean(0).sum(1))
    return Movement(bins * weights, (float(y), float(x)), (float(down), float(along)))


class _Found(NamedTuple):
    """Weights (T, 2, K) of movement, what parts of the field said last, and the images of frames moved back."""

    weights: np.ndarray
    parts: Parts
    images: Images


def _pursued(
    look: Callable[..., tuple[Parts, Images]],
    passes: list[np.ndarray],
    weights: np.ndarray,
    images: Images,
    jitter: bool,
    add_others: Callable[[np.ndarray], None] = silent,
    sure: float = SURE,
) -> _Found | None:
    """Measure what is left of the movement by weights (T, 2, K), pass by pass over some frames; None if none is.

    `add_others` fills in weights of frames that the first passes do not see, before the first one of all frames; `sure`
    is as for :func:`courses_to_follow`.
    """
    new = slice(1, None) if weights.shape[-1] > 1 else slice(None)  # patterns without which there is nothing to do
    parts: Parts | None = None
    for number, looked_at in enumerate(passes):
        if number and len(looked_at) > len(passes[number - 1]):
            add_others(weights)
        parts, images = look(looked_at, weights, images)
        measured = _followed(parts, weights, jitter=True, sure=sure)
        if not measured[..., new].any():
            return None
        # Where frames are still displaced, their mean is blurred, and slopes tell of too much.
        weights[looked_at] += np.clip(measured - weights[looked_at], -_MOST_AT_ONCE, _MOST_AT_ONCE)
        everything = len(looked_at) == len(weights)
        if not jitter and number and everything and not _followed(parts, weights, jitter=False, sure=sure).any():
            break
    assert parts is not None
    return _Found(weights, parts, images)


def _bent(
    look: Callable[..., tuple[Parts, Images]],
    passes: list[np.ndarray],
    start: np.ndarray,
    before: Images,
    jitter: bool,
) -> tuple[_Found | None, float]:
    """Measure movement that is not rigid, from weights (T, 2, K) on; and how sure of other than the scan's to be."""
    if min(before.level.shape) >= _LEAST_SIDE_BENT:
        found = _pursued(look, passes, start.copy(), before, jitter, sure=_SURE_BENT)
        # What activity seems to bend is no sharper when it is bent back.
        if found is None or not _is_bent(found.weights):
            return found, _SURE_BENT
        if sharpness(found.images.means()) > _SHARPER * sharpness(before.means()):
            return found, _SURE_BENT
    return _pursued(look, passes, start, before, jitter, sure=np.inf), np.inf


def _is_bent(weights: np.ndarray) -> bool:
    """Whether other movement is among weights (frames, 2, K) than rigid one and what the scan makes of it."""
    return bool(weights[..., 2:].any())


def _followed(parts: Parts, weights: np.ndarray, *, jitter: bool, sure: float) -> np.ndarray:
    """As :func:`courses_to_follow`, less strict where weights (T, 2, K) hold other than rigid movement already."""
    return courses_to_follow(parts, jitter=jitter, sure=SURE if _is_bent(weights) else sure)


def _first_images(
    stack: Any, bins: int, some: np.ndarray, weights: np.ndarray, groups: np.ndarray
) -> tuple[Images, Images, np.ndarray]:
    """Images of some frames, moved back by weights (T, 2, 1) and as they are; and which pixels may move (h, w)."""
    images, unmoved = Images(groups), Images(groups)
    shape = [side // bins for side in stack.shape[1:]]
    changes = np.zeros(shape, bool)
    for block, numbers in small_frames(stack, bins, some, np.zeros_like(weights)):
        changes |= (block != block[0]).any(0)
        unmoved.add(block, numbers)
        back = [warp.moved(x, by, x.shape, back=True) for x, by in zip(block, weights[numbers], strict=True)]
        images.add(np.stack(back), numbers)
    return images, unmoved, changes & ~stands_alone(unmoved.means().mean(0))
