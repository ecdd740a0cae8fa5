"""What the frames around one show, and rows of frames that are drawn towards it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.ndimage import median_filter

from restormer3d.views import FramesChanged

NORMAL_MEDIAN = 0.6744898
"""Of the magnitude of a normal number of deviation 1."""

_AROUND = 4  # frames on either side of a frame
_ROWS = 9  # of a band, that a row's offset is the median of
_SURE = 3.0  # standard errors, from which on what a row differs by as a whole counts


@dataclass(frozen=True)
class Steadied(FramesChanged):
    """A stack (T, H, W) of whose frames some rows are drawn towards frames around: their noise is as usual.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        As recorded, or without the light of a stimulus.
    kept : dict of int to numpy.ndarray
        By frame, what its rows differ by as a whole from the mean of the frames around, and what they keep of the rest
        of the difference, (2, H).
    usual : numpy.ndarray
        Numbers of the frames whose noise is as usual, increasing.
    """

    kept: dict[int, np.ndarray]
    usual: np.ndarray

    def change(self, frame: np.ndarray, t: int, crop: tuple[Any, ...]) -> None:
        """Draw a frame's rows towards the frames around."""
        if (kept := self.kept.get(t)) is not None:
            offset, share = kept[:, crop[0] if crop else slice(None), None]
            base = mean_around(self.stack, self.usual, t, crop) + offset
            frame[...] = base + share * (frame - base)


def mean_around(stack: Any, some: np.ndarray, t: int, crop: tuple[Any, ...] = ()) -> np.ndarray:
    """Mean of those among some frames that are next to frame `t`, four on either side, without it.

    `some` are their numbers, increasing, and `crop` says which rows and columns of them: (H, W) float64.
    """
    place = int(np.searchsorted(some, t))
    after = place + (place < len(some) and some[place] == t)
    around = [*some[max(0, place - _AROUND) : place], *some[after : after + _AROUND]]
    return np.stack([stack[(int(number), *crop)] for number in around]).mean(0, np.float64)


def middle_and_spread(apart: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Median and median absolute deviation of the rows of differences of frames (H, W), (H,) each."""
    middle = np.median(apart, axis=1)
    return middle, np.median(np.abs(apart - middle[:, None]), axis=1)


def sure_offset(middle: np.ndarray, spread: np.ndarray, width: int) -> np.ndarray:
    """What bands of rows differ by as a whole (H,), where noise does not explain it, by :func:`middle_and_spread`."""
    offset = median_filter(middle, _ROWS, mode="nearest")
    error = spread * np.pi / 2 / np.sqrt(_ROWS * width) / NORMAL_MEDIAN  # of a median of medians
    return np.where(np.abs(offset) > _SURE * error, offset, 0)
