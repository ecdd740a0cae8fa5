"""Rows of single frames without a recording: of a frame that was broken off, or whose data were lost on their way.

They hold one value, far from what other frames show there, and one frame of them costs all others some of the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from restormer3d.artefacts.idle_frames import rows_of_one_value
from restormer3d.artefacts.stimulus_light import mean_around
from restormer3d.noise import NoiseEstimate
from restormer3d.normalization import sample_frames
from restormer3d.views import FramesChanged, each_frame

_LEAST_FRAMES = 16  # without blank rows
_SAMPLE = 100  # of them, whose mean is what frames show
_SURE = 6.0  # deviations, by which blank rows differ from that


@dataclass(frozen=True)
class WithoutBlankRows(FramesChanged):
    """A stack (T, H, W) whose blank rows hold the mean of what frames around show there.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        As recorded.
    fills : dict of int to numpy.ndarray
        By frame, the value of each blank row, NaN for others, (H,) float64.
    whole : numpy.ndarray
        Numbers of the frames without blank rows, increasing.
    """

    fills: dict[int, np.ndarray]
    whole: np.ndarray

    def change(self, frame: np.ndarray, t: int, crop: tuple[Any, ...]) -> None:
        """Put what frames around show into its blank rows."""
        if (fill := self.fills.get(t)) is not None:
            rows = np.isfinite(fill[crop[0] if crop else slice(None)])
            frame[rows] = mean_around(self.stack, self.whole, t, crop)[rows]


def without_blank_rows(stack: Any, noise: NoiseEstimate) -> Any:
    """Put the mean of frames around where a frame has rows of one value, which in most frames have many.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        As recorded.
    noise : NoiseEstimate
        Of this stack: few photons leave whole rows at zero by chance.

    Returns
    -------
    stack of shape (T, H, W)
        The same one where there are no such rows, or fewer than 16 frames without.
    """
    fills: dict[int, np.ndarray] = {}
    for t, frame in each_frame(stack):
        if (blank := rows_of_one_value(frame)).any():
            fills[t] = np.where(blank, frame[:, 0], np.nan)
    whole = np.setdiff1d(np.arange(stack.shape[0]), list(fills))
    if not fills or len(whole) < _LEAST_FRAMES:
        return stack
    shown = np.stack([stack[int(whole[n])] for n in sample_frames(len(whole), _SAMPLE)])
    image = np.asarray(shown.mean(0, np.float64))
    variance = noise.variance(image).sum(1)
    sure = {}
    for t, fill in fills.items():
        apart = np.abs((image - fill[:, None]).sum(1))
        if (rows := apart > _SURE * np.sqrt(variance)).any():  # NaN is not
            sure[t] = np.where(rows, fill, np.nan)
    return WithoutBlankRows(stack, sure, whole) if sure else stack


def put_back(frames: Iterator[np.ndarray], fills: dict[int, np.ndarray]) -> Iterator[np.ndarray]:
    """Make rows of denoised frames (H, W) blank as they were."""
    for t, frame in enumerate(frames):
        fill = fills.get(t)
        yield frame if fill is None else np.where(np.isfinite(fill)[:, None], fill[:, None], frame).astype(frame.dtype)
