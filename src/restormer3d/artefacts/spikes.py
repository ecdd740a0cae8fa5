"""Single voxels that a cosmic ray or a spark in the detector has hit: found, and replaced by what was there before.

Averages along time spread a voxel that is a thousand times too bright over many frames, and over its block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from restormer3d.noise import NoiseEstimate
from restormer3d.views import ChangedStack, each_frame

_SURE = 10.0  # deviations of the noise, and photons, by which a voxel is brighter than in the frames around
_ALONE = 0.3  # of that, by which the rows above and below it are at most
_MOST = 1e-3  # of all voxels: more are no accident


@dataclass(frozen=True)
class WithoutSpikes(ChangedStack):
    """A stack (T, H, W) in which some voxels have other values.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        As recorded.
    places : numpy.ndarray
        Frame, row and column of each voxel, (n, 3), by frame.
    values : numpy.ndarray
        What they hold instead, (n,).
    """

    places: np.ndarray
    values: np.ndarray

    @property
    def dtype(self) -> np.dtype:
        """As recorded."""
        return self.stack.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        """Slice as the stack does."""
        found = np.asarray(self.stack[index])
        axes = index if isinstance(index, tuple) else (index,)
        numbers = [np.arange(size)[axis] for size, axis in zip(self.shape, (*axes, *[slice(None)] * 3), strict=False)]
        wanted = [np.atleast_1d(each) for each in numbers]
        inside = np.logical_and.reduce([np.isin(self.places[:, axis], wanted[axis]) for axis in range(3)])
        if not inside.any():
            return found
        out = np.array(found).reshape([len(each) for each in wanted])
        where = [np.searchsorted(wanted[axis], self.places[inside, axis]) for axis in range(3)]
        out[tuple(where)] = self.values[inside]
        return out.reshape(found.shape)


def without_spikes(stack: Any, noise: NoiseEstimate) -> Any:
    """Replace voxels that are brighter than everything around by more than noise or cells ever are.

    In the frames before and after, and in the rows above and below: a spark may be as wide as the amplifier is slow
    along a row, and whatever the microscope resolves shows in more than one row.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        As recorded.
    noise : NoiseEstimate
        Of this stack.

    Returns
    -------
    stack of shape (T, H, W)
        The same one where there are none, or so many that they are no accident.
    """
    frames, height, width = stack.shape
    least = _SURE * noise.gain + _SURE * float(noise.variance(np.array(noise.offset))) ** 0.5
    if frames < 3 or height < 3 or not least:
        return stack
    places, values = [], []
    for t, (before, frame, after) in enumerate(_with_neighbors(stack)):
        found = _spikes(frame, np.maximum(before, after), least, noise)
        places += [(t, y, x) for y, x in found]
        values += [before[y, x] / 2 + after[y, x] / 2 for y, x in found]
    if not places or len(places) > _MOST * frames * height * width:
        return stack
    return WithoutSpikes(stack, np.array(places), np.array(values).astype(stack.dtype))


def _with_neighbors(stack: Any) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Read every frame of at least two between those before and after; at the ends, one is both."""
    before, frame = np.empty(0), np.empty(0)
    for t, after in each_frame(stack):
        if t:
            yield (before if t > 1 else after), frame, after
        before, frame = frame, after
    yield before, frame, before


def _spikes(frame: np.ndarray, around: np.ndarray, least: float, noise: NoiseEstimate) -> list[tuple[int, int]]:
    """Rows and columns of a frame's voxels that stand out, given the brighter of the frames around."""
    found = []
    for y, x in np.argwhere(frame > around + least):
        usual = float(around[y, x])
        rise = float(frame[y, x]) - usual
        beside = slice(max(0, x - 1), x + 2)
        rows = [n for n in (y - 1, y + 1) if 0 <= n < len(frame)]
        rows_rise = max(float(np.max(frame[n, beside].astype(float) - around[n, beside])) for n in rows)
        deviation = float(noise.variance(np.array(usual))) ** 0.5
        if rise > _SURE * (noise.gain + deviation) and rows_rise < _ALONE * rise:
            found.append((int(y), int(x)))
    return found
