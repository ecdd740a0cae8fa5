"""Voxels of single frames without a recording: a frame was broken off, or data were lost on their way.

Rows of them hold one value, far from what other frames show there; or they are far below all that is recorded, as zeros
are where darkness is an offset; or they hold garbled data, which look like noise far stronger than any other. One frame
of them costs all others some of the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from restormer3d.artefacts.frames_around import mean_around
from restormer3d.artefacts.idle_frames import rows_of_one_value
from restormer3d.artefacts.noisy_rows import GARBLED
from restormer3d.noise import NoiseEstimate
from restormer3d.normalization import sample_frames
from restormer3d.views import FramesChanged, each_frame

_LEAST_FRAMES = 16  # without lost voxels
_SAMPLE = 100  # frames that tell what is usual,
_PIXELS = 2**16  # and about so many pixels of each
_SURE = 6.0  # deviations, by which rows of one value differ from what others show there
_LOW = 0.001  # quantile of all intensities
_FAR = 4.0  # times as far below their median as that quantile: twelve deviations of normal noise
_MOST = 0.9  # of a frame, that is lost: what is all far below is darker, but there


@dataclass(frozen=True)
class WithoutLostVoxels(FramesChanged):
    """A stack (T, H, W) whose lost voxels hold the mean of what frames around show there.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        As recorded.
    lost : dict of int to numpy.ndarray
        By frame, which voxels are lost, (H, W) bool.
    whole : numpy.ndarray
        Numbers of the frames without lost voxels, increasing.
    """

    lost: dict[int, np.ndarray]
    whole: np.ndarray

    def change(self, frame: np.ndarray, t: int, crop: tuple[Any, ...]) -> None:
        """Put what frames around show where voxels are lost."""
        if (lost := self.lost.get(t)) is not None:
            np.copyto(frame, mean_around(self.stack, self.whole, t, crop), "same_kind", where=lost[crop])


def without_lost_voxels(stack: Any, noise: NoiseEstimate, kept: dict[int, np.ndarray]) -> Any:
    """Put the mean of frames around where voxels are lost.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        As recorded.
    noise : NoiseEstimate
        Of this stack: few photons leave whole rows at zero by chance.
    kept : dict of int to numpy.ndarray
        As `noisy_rows.noisy_rows` finds it. Garbled rows are lost; of other noisy ones single voxels may be far below
        all others by chance.

    Returns
    -------
    stack of shape (T, H, W)
        The same one where none are lost, or where fewer than 16 frames are whole.
    """
    frames = stack.shape[0]
    some, first = sample_frames(frames, _SAMPLE), np.asarray(stack[0])
    changes = reduce(np.logical_or, (stack[int(t)] != first for t in some))
    if not changes.any():
        return stack
    apart = -(-first.size // _PIXELS)
    low, usual = np.median([np.quantile(stack[int(t)][changes][::apart], (_LOW, 0.5)) for t in some], axis=0)
    least = usual - _FAR * (usual - low)
    candidates = []
    for t, frame in each_frame(stack):
        blank, below = rows_of_one_value(frame), changes & (frame < least)
        if t in kept or (blank.any() and not blank.all()) or 0 < below.mean() < _MOST:
            candidates.append(t)
    whole = np.setdiff1d(np.arange(frames), candidates)
    if not candidates or len(whole) < _LEAST_FRAMES:
        return stack
    some = whole[sample_frames(len(whole), _SAMPLE)]
    image = reduce(np.add, (stack[int(t)] / len(some) for t in some))
    deviation = np.sqrt(noise.variance(image).sum(1))
    lost: dict[int, np.ndarray] = {}
    for t in candidates:
        frame = np.asarray(stack[t], np.float64)
        blank, below = rows_of_one_value(frame), changes & (frame < least)
        blank &= ~blank.all() & (np.abs((image - frame).sum(1)) > _SURE * deviation)
        below &= below.mean() < _MOST
        if below.any():  # frames that fade pass the least intensity, too, but not far from those around
            below &= frame < mean_around(stack, whole, t) - _FAR / 2 * (usual - low)
        if t in kept:
            below &= (kept[t] == 1)[:, None]
            blank |= kept[t] < GARBLED
        if blank.any() or below.any():
            lost[t] = below | blank[:, None]
    return WithoutLostVoxels(stack, lost, whole) if lost else stack


def put_back(frames: Iterator[np.ndarray], recorded: WithoutLostVoxels) -> Iterator[np.ndarray]:
    """Leave lost voxels of denoised frames (H, W) as they were."""
    for t, frame in enumerate(frames):
        lost = recorded.lost.get(t)
        yield frame if lost is None else np.where(lost, recorded.stack[t], frame).astype(frame.dtype)
