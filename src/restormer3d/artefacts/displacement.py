"""By how much frames show the field displaced, as its parts tell: whole pixels by correlation, fractions by regression.

A frame is compared with the mean of others that were moved back already, so that its own noise does not hold it where
it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any

import numpy as np
from scipy.ndimage import binary_erosion, gaussian_filter, maximum_filter, median_filter

from restormer3d.artefacts import warp
from restormer3d.progress import silent
from restormer3d.threads import thread_count
from restormer3d.views import SomeFrames

REACH = 8
"""The field is looked for within this part of it."""

_COARSE_SIDE = 96  # pixels of a binned field, in which whole pixels are found
_LEAST_COARSE = 24  # of its shorter side
_AT_ONCE = 32  # frames that are read at once
_ROUNDS = 5  # of finding whole pixels, each time by a sharper image
_LEAST_ALIKE, _ALIKE = 8, 16  # frames of a group, and share of all, that a first image is the mean of
_PARTS = 4, 6  # of the field along y and along x, each of which tells of rigid movement by itself, or of how it bends
_BENT = 1.0  # pixels that patterns beside rigid movement may have: what parts do not tell is drawn to 0
_TAIL = 1.5  # large movements are rare: as this power of a Cauchy distribution one (binned) pixel wide
_BAND = (0.7, 5.0)  # pixels of Gaussian filters, between which the image tells of movement
_NEAR_EDGES = 3  # pixels around those that never change, which do not count, and as many as the field moves by
_DIMMEST = 0.2  # of the image's brightness, that a frame may have
_STEEP = 0.995  # quantile of slopes, above which they count less
_ALONE = 12.0  # median deviations by which a pixel of a detector, which does not move, differs from those around,
_ALONE_BESIDE = 3.0  # and how many times as much as the four beside it
_BESIDE = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]], bool)


def _small_frame(frame: np.ndarray, bins: int, weights: np.ndarray) -> np.ndarray:
    """Mean of squares of `bins` pixels of a frame (H, W), moved back by weights (2, K) in such squares, float32."""
    height, width = (side // bins * bins for side in frame.shape)
    pixels = [frame[y:height:bins, x:width:bins].astype(np.float32) for y, x in product(range(bins), repeat=2)]
    small = np.sum(pixels, axis=0) / bins**2
    return warp.moved(small, weights, small.shape, back=True)


def small_frames(
    stack: Any, bins: int, numbers: np.ndarray, weights: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Some frames of a stack and their numbers, binned and moved back, a few at a time.

    `weights` (T, 2, K) of the displacement's patterns (see `artefacts.warp`) are in binned pixels.
    """
    with ThreadPoolExecutor(thread_count()) as pool:
        for start in range(0, len(numbers), _AT_ONCE):
            some = numbers[start : start + _AT_ONCE]
            frames = SomeFrames(stack, some)[:] if some[-1] - some[0] < 2 * _AT_ONCE else (stack[int(t)] for t in some)
            small = pool.map(lambda frame, by: _small_frame(frame, bins, by), frames, weights[some])
            yield np.stack(list(small)), some


class Images:
    """Mean along time of two groups of frames each, and the variance of all, from frames that come in blocks.

    A frame is compared with the image of the other group: in that of its own its noise would hold it where it is.
    """

    def __init__(self, groups: np.ndarray):
        self.groups = groups  # of each frame of the stack, 0 or 1
        self.counts = np.zeros(2, int)
        self.level: Any = None
        self.totals: Any = 0.0  # (2, h, w)
        self.squares: Any = 0.0

    def add(self, block: np.ndarray, numbers: np.ndarray) -> None:
        """Add frames (n, h, w)."""
        if self.level is None:
            self.level = block[0].astype(np.float64)
        apart = block - self.level
        mine = np.eye(2)[self.groups[numbers]]  # (n, 2)
        self.totals = self.totals + np.tensordot(mine, apart, axes=(0, 0))
        self.squares = self.squares + np.square(apart).sum(0)
        self.counts += mine.sum(0).astype(int)

    def means(self) -> np.ndarray:
        """Of the groups, (2, h, w)."""
        return self.level + self.totals / self.counts[:, None, None]

    def variance(self) -> np.ndarray:
        """Of all frames, (h, w)."""
        return self.squares / self.counts.sum() - np.square(self.totals.sum(0) / self.counts.sum())


def field_finder(stack: Any, some: np.ndarray, groups: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Function from numbers of frames to where they show the field, to about a pixel: (n, 2) in pixels of the stack.

    It is found by the image of some frames, of those in the other group (T,).
    """
    bins = max(1, min(-(-max(stack.shape[1:]) // _COARSE_SIDE), min(stack.shape[1:]) // _LEAST_COARSE))
    still = np.zeros((stack.shape[0], 2, 1))
    frames = np.concatenate([block for block, _ in small_frames(stack, bins, some, still)])
    height, width = frames.shape[1:]
    reach = max(3, min(height, width) // REACH)
    lags = np.array(list(product(range(-reach, reach + 1), repeat=2)))
    inside = slice(reach, height - reach), slice(reach, width - reach)
    rare = _TAIL * np.log1p(np.square(lags).sum(1))
    steps = np.square(np.diff(frames, axis=0)).mean(0) / 2
    noise = float(np.sqrt(min(np.median(frames.var(0)), np.median(steps)))) or 1.0
    level = frames.mean()
    frames = (frames - level) / noise

    def everywhere(image: np.ndarray) -> np.ndarray:
        """The detail of an image, moved by all lags, (lags, pixels) float32."""
        detail = _detail(image).astype(np.float32)
        return np.stack([np.roll(detail, lag, (0, 1))[inside].ravel() for lag in lags])

    def places(frames: np.ndarray, moved: np.ndarray) -> np.ndarray:
        """Where in frames the image is most likely, both in units of the noise."""
        alike = frames[:, *inside].reshape(len(frames), -1) @ moved.T
        fit = np.square(np.maximum(alike, 0)) / np.maximum(2 * np.square(moved).sum(1), 1e-30)  # as bright as fits best
        found = lags[(fit - rare).argmax(1)].astype(float)
        found[np.abs(found).max(1) == reach] = np.nan  # it may be anywhere
        return found

    def by_other_group(frames: np.ndarray, numbers: np.ndarray, moved: list[np.ndarray]) -> np.ndarray:
        found = np.zeros((len(frames), 2))
        for group in np.unique(groups[numbers]):
            mine = groups[numbers] == group
            found[mine] = places(frames[mine], moved[1 - group])
        return found

    def images_of(frames: np.ndarray, which: np.ndarray) -> np.ndarray:
        return np.stack([_without_alone(frames[which & (groups[some] == group)].mean(0)) for group in (0, 1)])

    # The mean of all is blurred where the field moves far, that of few alike noisy: what ends up sharper is taken.
    everything = np.ones(len(some), bool)
    candidates = [images_of(frames, everything)]
    for start in (everything, _alike(frames[:, *inside], groups[some])):
        images = images_of(frames, start)
        for _ in range(_ROUNDS):
            shifts = _found_again(by_other_group(frames, some, list(map(everywhere, images))))
            shifts = np.rint(shifts - np.median(shifts, axis=0)).astype(int)
            back = np.stack([np.roll(frame, -by, (0, 1)) for frame, by in zip(frames, shifts, strict=True)])
            images = images_of(back, everything)
        candidates.append(images)
    best = list(map(everywhere, max(candidates, key=lambda images: sharpness(images[:, *inside]))))
    del frames

    def found(numbers: np.ndarray) -> np.ndarray:
        blocks = small_frames(stack, bins, numbers, still)
        return bins * _found_again(np.concatenate([by_other_group((x - level) / noise, t, best) for x, t in blocks]))

    return found


def _found_again(shifts: np.ndarray) -> np.ndarray:
    """Where the field was not found (NaN), where it is between the frames around that show it (n, 2)."""
    lost = np.isnan(shifts).any(1)
    if lost.all():
        return np.zeros_like(shifts)
    there, numbers = np.flatnonzero(~lost), np.arange(len(shifts))
    return np.stack([np.interp(numbers, there, shifts[there, axis]) for axis in (0, 1)], axis=1)


def _detail(image: np.ndarray) -> np.ndarray:
    """What tells of movement in images (..., h, w)."""
    return gaussian_filter(image, _BAND[0], axes=(-2, -1)) - gaussian_filter(image, _BAND[1], axes=(-2, -1))


def sharpness(images: np.ndarray) -> float:
    """Variance of the detail that images of two groups (2, h, w) share: noise, which they do not, has no part in it."""
    first, second = _detail(images)
    return float((first * second).mean())


def _alike(frames: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """A share of frames (n, h, w) that are like one another, of both groups: a mask (n,)."""
    detail = _detail(frames).reshape(len(frames), -1)
    detail /= np.maximum(np.linalg.norm(detail, axis=1, keepdims=True), 1e-30)
    alike = detail @ detail.T
    count = min(max(_LEAST_ALIKE, len(frames) // _ALIKE), len(frames) // 4)
    # As many of each group, by how like the frame they are that has the most frames like itself.
    nearest = [np.sort(alike[:, groups == group], axis=1)[:, -count:].mean(1) for group in (0, 1)]
    center = alike[np.argmin(-np.minimum(*nearest))]
    chosen = np.zeros(len(frames), bool)
    for group in (0, 1):
        mine = np.flatnonzero(groups == group)
        chosen[mine[np.argsort(center[mine])[-count:]]] = True
    return chosen


@dataclass(frozen=True)
class Parts:
    """What parts of the field tell of its displacement in each frame.

    `information` (parts, 2, 2) is the inverse of the displacements' covariance, `weighted` (parts, frames, 2) it times
    displacements from `base`, weights (frames, 2, K) by which the frames had been moved back; `places` (2, parts) are
    rows and columns of the parts among one another, `patterns` (K, parts) those of displacement there.
    """

    information: np.ndarray
    weighted: np.ndarray
    base: np.ndarray
    places: np.ndarray
    patterns: np.ndarray

    @property
    def count(self) -> int:
        """Of the parts."""
        return len(self.information)

    def weights(self, chosen: np.ndarray) -> np.ndarray:
        """Of the patterns, less their means over frames, as some parts (a mask) have them together, (frames, 2, K)."""
        patterns = self.patterns[:, chosen]
        pulls = np.einsum("pti,kp->tik", self.weighted[chosen], patterns).reshape(len(self.base), -1)
        pulls -= self.base.reshape(pulls.shape) * self._usual()
        found = self.base + (pulls @ self._covariance(chosen)).reshape(self.base.shape)
        return found - found.mean(0)

    def rigid(self) -> Parts:
        """The same, of rigid movement alone."""
        return replace(self, base=self.base[..., :1], patterns=self.patterns[:1])

    def variance(self) -> np.ndarray:
        """Of the weights' error, (2, K)."""
        return self._covariance(np.ones(self.count, bool)).diagonal().reshape(self.base.shape[1:])

    def halves(self, without: int = -1) -> np.ndarray:
        """Weights by one half of the parts and by the other, (2, ways of halving, frames, 2, K); by all but one."""
        y, x = self.places
        others = np.arange(self.count) != without
        rows, columns = (y, y // 2), (x, x // 2)
        if len(self.patterns) == 1:
            rows, columns = (0 * y, *rows), (0 * x, *columns)
        # To tell how the field bends, each half has to have parts in all rows and columns.
        ways = [half for a, b in product(rows, columns) if (half := (a + b) % 2 == 0).min() == 0]
        return np.stack([[self.weights(half & others) for half in halves] for halves in (ways, [~w for w in ways])])

    def _covariance(self, chosen: np.ndarray) -> np.ndarray:
        patterns = self.patterns[:, chosen]
        count = len(patterns)
        information = np.einsum("pij,kp,lp->ikjl", self.information[chosen], patterns, patterns)
        information = information.reshape(2 * count, 2 * count) + np.diag(self._usual())
        return np.linalg.pinv(information, hermitian=True)

    def _usual(self) -> np.ndarray:
        """Information that weights are about 0, (2 K,): none on rigid movement."""
        return np.tile([0.0, *[1 / _BENT**2] * (len(self.patterns) - 1)], 2)


def measured_by_parts(
    stack: Any,
    bins: int,
    numbers: np.ndarray,
    weights: np.ndarray,
    images: Images,
    moves: np.ndarray,
    advance: Callable[[int], None] = silent,
) -> tuple[Parts, Images]:
    """What parts of some frames, moved back by weights (T, 2, K), tell of what is left; and new images of these frames.

    Only pixels that may move (h, w) count, and only if all around may: the edge of a mask does not. `advance` is called
    with how many more frames were looked at.
    """
    means = images.means()  # (2, h, w)
    height, width = means.shape[1:]
    margin = min(int(np.ceil(warp.farthest(weights[numbers]).max())) + 1, min(height, width) // 5)
    kinds = weights.shape[-1]
    edges = [np.linspace(margin, side - margin, _PARTS[kinds > 1] + 1).astype(int) for side in (height, width)]
    rows, columns = ([slice(*pair) for pair in pairwise(edge)] for edge in edges)
    places = list(product(rows, columns))
    middles = [(edge[1:] + edge[:-1]) / side - 1 for edge, side in zip(edges, (height, width), strict=True)]
    smooth = [gaussian_filter(mean, 1.0) for mean in means]
    counted = binary_erosion(moves, iterations=margin + _NEAR_EDGES, border_value=1)
    counts = counted * _counts(np.mean(smooth, axis=0), images.variance())
    changes = [_changes(mean, places) for mean in means]
    # Slopes of the other group's image, whose noise is another: what noise they have in common would count as image.
    looked_for = [
        [change * counts[place].ravel() for change, place in zip(_changes(image, places), places, strict=True)]
        for image in smooth
    ]
    products = np.empty((len(places), len(numbers), 4))
    between = np.empty((len(places), 4))  # of the image of group 1 and that of group 0
    square = np.empty((len(places), 4, 4))
    new, done = Images(images.groups), 0
    for block, some in small_frames(stack, bins, numbers, weights):
        new.add(block, some)
        other = 1 - images.groups[some]
        apart = block - means[other]
        for number, place in enumerate(places):
            by_both = apart[:, *place].reshape(len(block), -1) @ np.concatenate([each[number] for each in looked_for]).T
            products[number, done : done + len(block)] = by_both.reshape(-1, 2, 4)[np.arange(len(block)), other]
        done += len(block)
        advance(len(block))
    for number, place in enumerate(places):
        square[number] = sum(looked_for[group][number] @ changes[1 - group][number].T for group in (0, 1)) / 2
        between[number] = sum(each[number] for each in looked_for) / 2 @ (means[1] - means[0])[place].ravel()
    # What brightness and level explain tells nothing of displacement.
    explained = square[:, :2, 2:] @ np.linalg.pinv(square[:, 2:, 2:])
    information = square[:, :2, :2] - explained @ square[:, 2:, :2]
    pulls = products[..., :2] - np.einsum("pij,pnj->pni", explained, products[..., 2:])
    apart_by = between[:, :2] - np.einsum("pij,pj->pi", explained, between[:, 2:])
    # Frames of group 1 were compared with the image of group 0 and the other way round: half of what these are apart.
    sign = np.where(images.groups[numbers] == 1, -0.5, 0.5)
    pulls += sign[None, :, None] * apart_by[:, None, :]
    pulls /= _brightness(square, products)[None, :, None]
    bent = warp.patterns(middles[0][:, None], middles[1], kinds).reshape(kinds, -1)
    among = np.stack(np.divmod(np.arange(len(places)), len(columns)))
    return Parts(information, pulls, weights[numbers].copy(), among, bent), new


def _brightness(square: np.ndarray, products: np.ndarray) -> np.ndarray:
    """How many times as bright as the image frames are, (frames,): slopes are as many times as steep."""
    alike = square[:, 2, 2] - square[:, 2, 3] ** 2 / np.maximum(square[:, 3, 3], 1e-30)
    lifted = products[..., 3] * (square[:, 2, 3] / np.maximum(square[:, 3, 3], 1e-30))[:, None]
    brighter = (products[..., 2] - lifted).sum(0) / max(float(alike.sum()), 1e-30)
    return np.clip(1 + brighter, _DIMMEST, 1 / _DIMMEST)


def stands_alone(image: np.ndarray) -> np.ndarray:
    """Pixels of an image (h, w) that differ from those around far more than these do, as no tissue does: bool."""
    apart = np.abs(image - median_filter(image, 5))
    beside = maximum_filter(apart, footprint=_BESIDE)
    return apart > np.maximum(_ALONE * np.median(apart), _ALONE_BESIDE * beside)


def _without_alone(image: np.ndarray) -> np.ndarray:
    return np.where(stands_alone(image), median_filter(image, 5), image)


def _counts(image: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """How much pixels (h, w) count: by the noise and activity that they have, and less where slopes are very steep."""
    steepness = np.square(np.gradient(image)).sum(0)
    spread = gaussian_filter(variance, 1.0)
    few = np.quantile(steepness, _STEEP) / np.maximum(steepness, 1e-30)
    return np.minimum(1, few) / np.maximum(spread, max(0.1 * float(np.median(spread)), 1e-30))


def _changes(image: np.ndarray, places: list[tuple[slice, slice]]) -> list[np.ndarray]:
    """What an image (h, w) changes by in parts of it: displaced along y and x, brighter, lifted; each (4, pixels)."""
    down, along = np.gradient(image)
    level = np.full_like(image, float(image.std()) or 1.0)  # of the size of the others
    return [np.stack([x[p].ravel() for x in (-down, -along, image - image[p].mean(), level)]) for p in places]
