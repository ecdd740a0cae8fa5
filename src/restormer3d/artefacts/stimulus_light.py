"""Light of a stimulus: bands of rows of some frames that are brighter, or afterwards darker, as a whole.

A lamp that flashes for the animal also reaches the detector: every pixel of the rows that are read meanwhile has the
same of it; after it, detectors that follow changes alone show less than there is. That is far stronger than activity,
and whatever smooths along time would smear it over frames it was not in. It is taken away before denoising, and put
back afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.ndimage import median_filter

from restormer3d.artefacts.frames_around import NORMAL_MEDIAN, Steadied, mean_around, middle_and_spread, sure_offset
from restormer3d.threads import thread_count
from restormer3d.views import ChangedStack

_COLUMNS = 64  # of a row that are looked at, at most
_ROWS = 9  # of which the middle one counts: edges of a lit band stay, single rows do not
_WINDOW = 101  # frames around one, of which less than half are lit
_LEAST_FRAMES = 16  # that tell what is usual
_STRIDE = 10  # frames that share a window
_BLOCK = 500  # frames that are looked at together, with those around; fewer of more rows
_BLOCK_VALUES = 2**24
_READ = 16  # frames that are read at once
_SAMPLE = 100  # of them that the static image and the noise are measured on
_LEAST_SPREADS = 12.0  # median absolute deviations of rows' brightness that light has somewhere,
_LEAST_NOISE = 0.4  # and in deviations of a voxel's noise;
_SHARP = 5.0  # times as much as that noise, from which on single rows tell where it begins and ends;
_SHARE_BESIDE = 0.4  # as much in the other rows of its band, or of the frame's, where all rows are lit
_ALIKE = 0.2  # correlation of what lit rows differ by with the static image, from which on it is activity
_STRONG = 0.7  # share of a lit row's deviation that an unlit one has, below which frames are steadied
_COMPARED = 24  # unlit frames that say what is usual


@dataclass(frozen=True)
class WithoutLight(ChangedStack):
    """A stack (T, H, W) without the light that its rows share, in floating point: integers might wrap.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        As recorded.
    light : numpy.ndarray
        What to take away from every pixel of a row, (T, H).
    """

    light: np.ndarray

    def __getitem__(self, index: Any) -> np.ndarray:
        """Slice as the stack does."""
        light = np.broadcast_to(self.light[:, :, None], self.shape)
        return np.subtract(self.stack[index], light[index], dtype=self.dtype)


def stimulus_light(stack: Any) -> np.ndarray | None:
    """Find light that all pixels of a row share, in frames that are fewer than half of the hundred around them.

    Light moves the median of what a row differs by from the static image, and the lower quartile with it. Activity that
    does so would have to cover more than three quarters of the row. What a row is darker by counts as negative light.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        Recorded intensities.

    Returns
    -------
    numpy.ndarray or None
        Light in the stack's units, (T, H), float32, zero where there is none; None if there is none at all, or if
        there are fewer than 16 frames.
    """
    frames, height, width = stack.shape
    if frames < _LEAST_FRAMES:
        return None
    columns = slice(None, None, -(-width // _COLUMNS))
    together = max(_WINDOW, min(_BLOCK, _BLOCK_VALUES // (_COLUMNS * height)))
    light = np.zeros((frames, height), np.float32)
    margin = _WINDOW // 2
    for start in range(0, frames, together):
        first = max(0, min(start - margin, frames - _WINDOW))
        stop = min(frames, start + together)
        last = min(frames, stop + margin)
        reads = range(first, last, _READ)
        block = np.concatenate([stack[t : min(t + _READ, last)][:, :, columns] for t in reads])
        found = _shared_light(block.astype(np.result_type(block, np.float32), copy=False))[start - first : stop - first]
        if found.any():  # what is never written takes no memory
            light[start:stop] = found
    return light if light.any() else None


def take_light_away(stack: Any) -> tuple[Any, np.ndarray | None]:
    """Take the light of a stimulus away from a stack, if there is any.

    Returns
    -------
    stack : stack of shape (T, H, W)
        Without the light; the same one where there is none.
    light : numpy.ndarray or None
        As :func:`stimulus_light` finds it.
    """
    light = stimulus_light(stack)
    return (stack, None) if light is None else (WithoutLight(stack, light), light)


def unlit_frames(light: np.ndarray | None) -> np.ndarray | None:
    """Numbers of the frames without light (T, H), whose noise is as usual; None for all, or if fewer than 16."""
    if light is None:
        return None
    unlit = np.flatnonzero(~light.any(1))
    return unlit if len(unlit) >= _LEAST_FRAMES else None


def steadied(stack: Any, light: np.ndarray) -> Any:
    """Draw rows whose noise is raised by the photons of light towards unlit frames around, as far as it takes.

    Whatever denoises afterwards takes the noise of all frames for the same, and would let that of lit ones pass.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        Without the light.
    light : numpy.ndarray
        What was taken away, (T, H).

    Returns
    -------
    stack of shape (T, H, W)
        The same one where light is weak, or too few frames are without it.
    """
    unlit = unlit_frames(light)
    lit = np.flatnonzero((light > 0).any(1))
    if unlit is None:
        return stack

    def rows(t: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Median and median absolute deviation (H,) of rows' differences from the frames around, and how alike."""
        around = mean_around(stack, unlit, t)
        apart = stack[t] - around
        return *middle_and_spread(apart), _correlation(apart, around, light[t] > 0)

    usual = np.median([rows(int(t))[1] for t in unlit[:: -(-len(unlit) // _COMPARED)]], axis=0)
    kept = {}
    for t in lit:
        middle, spread, alike = rows(int(t))
        share = median_filter(usual / np.maximum(spread, 1e-30), _ROWS, mode="nearest")
        rows_lit = light[t] > 0
        # What is brighter where tissue is bright, is activity of all of it: light's noise is not alike the image.
        if np.median(share[rows_lit]) < _STRONG and alike < _ALIKE:
            share = np.where(rows_lit, np.minimum(share, 1), 1)
            # Light need not be the same in all of its band.
            kept[int(t)] = np.stack([sure_offset(middle, spread, stack.shape[2]), share])
    return Steadied(stack, kept, unlit) if kept else stack


def _correlation(apart: np.ndarray, around: np.ndarray, rows: np.ndarray) -> float:
    """Correlation of two images (H, W) within some of their rows."""
    a, b = (image[rows] - image[rows].mean(1, keepdims=True) for image in (apart, around))
    return float((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum() + 1e-30)) if rows.any() else 0.0


def put_back(frames: Iterator[np.ndarray], light: np.ndarray) -> Iterator[np.ndarray]:
    """Add light (T, H) to denoised frames (H, W), as they come."""
    for frame, rows in zip(frames, light, strict=True):
        yield frame + rows[:, None]


def _shared_light(frames: np.ndarray) -> np.ndarray:
    """By how much bands of rows of frames (T, H, W) differ from the frames around, (T, H). Changes the frames."""
    some = frames[:: -(-len(frames) // _SAMPLE)]
    least = _least_light(np.abs(np.diff(some, axis=0)))
    frames -= np.median(some, axis=0)
    width = frames.shape[2]
    ranks = width // 4, width // 2, width - 1 - width // 4
    with ThreadPoolExecutor(thread_count()) as pool:
        ordered = pool.map(lambda frame: np.partition(frame, ranks, axis=1)[:, ranks], frames)
        lower, middle, upper = np.stack(list(ordered)).transpose(2, 0, 1)  # each (T, H)
    lower, middle, upper = (x - _usual(x) for x in (lower, middle, upper))
    light = np.zeros_like(middle)
    for t, y in _lit_bands(lower, middle, least) + _lit_bands(-upper, -middle, least):
        y = _to_the_row(middle[t], y, _SHARP * least)
        light[t, y] = np.median(middle[t, y])
    return light


def _least_light(steps: np.ndarray) -> float:
    """What can be told from noise and from rounding, by the magnitude of frames' differences."""
    if not steps.any():
        return 0.0
    deviation = float(np.median(steps)) / (NORMAL_MEDIAN * np.sqrt(2))
    return max(_LEAST_NOISE * deviation, 1.5 * float(steps[steps > 0].min()))


def _lit_bands(lower: np.ndarray, middle: np.ndarray, least: float) -> list[tuple[int, slice]]:
    """Frames and bands of rows whose quartile and median (T, H) are higher than usual, by `least` somewhere."""
    height = middle.shape[1]
    lower, middle = _middle_of_rows(lower), _middle_of_rows(middle)
    shared = lower > middle / 2
    of_frames = np.median(middle, axis=1, keepdims=True)
    everywhere = (middle > _SHARE_BESIDE * of_frames).all(1, keepdims=True)
    everywhere &= np.median(lower, axis=1, keepdims=True) > of_frames / 2
    whole = everywhere & (of_frames > _least(of_frames, least))
    enough = _least(middle, least)
    bright = whole | (middle > enough)
    lit = np.pad(whole | shared & (middle > _SHARE_BESIDE * enough), ((0, 0), (1, 1)))
    starts, ends = (np.argwhere(edge) for edge in (lit[:, 1:] & ~lit[:, :-1], lit[:, :-1] & ~lit[:, 1:]))
    bands = [(t, slice(top, end)) for (t, top), (_, end) in zip(starts, ends, strict=True)]
    return [(t, y) for t, y in bands if y.stop - y.start >= min(_ROWS, height) and bright[t, y].any()]


def _to_the_row(middle: np.ndarray, band: slice, least: float) -> slice:
    """Band of rows, found by medians of some, as its single rows (H,) tell, where their light is strong enough for it.

    Light begins from one row to the next: one that is taken for lit, or for unlit, would be far from all others.
    """
    start = _first_lit(middle, band.start, least)
    stop = len(middle) - _first_lit(middle[::-1], len(middle) - band.stop, least)
    return slice(start, stop)


def _first_lit(middle: np.ndarray, start: int, least: float) -> int:
    light = np.median(middle[start : start + _ROWS])
    first = max(0, start - _ROWS // 2)
    lit = middle[first : start + _ROWS // 2] * np.sign(light) > abs(light) / 2
    return first + int(lit.argmax()) if start and abs(light) > least and lit.any() else start


def _least(rows: np.ndarray, least: float) -> np.ndarray:
    """From where on rows (T, H) are brighter than the like of them are by chance, (H,)."""
    spread = np.median(np.abs(rows), axis=0)
    return np.maximum(least, _LEAST_SPREADS * np.maximum(spread, np.median(spread)))


def _usual(values: np.ndarray) -> np.ndarray:
    """Median over the frames around each of (T, H)."""
    frames = len(values)
    around = np.lib.stride_tricks.sliding_window_view(values, min(_WINDOW, frames), axis=0)[::_STRIDE]
    start = np.clip(np.arange(frames) - _WINDOW // 2, 0, None) // _STRIDE
    return np.median(around, axis=2)[np.minimum(start, len(around) - 1)]


def _middle_of_rows(values: np.ndarray) -> np.ndarray:
    """Median over some rows around each of (T, H)."""
    height = values.shape[1]
    around = np.lib.stride_tricks.sliding_window_view(values, min(_ROWS, height), axis=1)
    start = np.clip(np.arange(height) - _ROWS // 2, 0, around.shape[1] - 1)
    return np.median(around, axis=2)[:, start]
