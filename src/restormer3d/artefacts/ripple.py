"""Electrical ripple: waves that mains and power supplies add to the signal of the detector.

However weak in a single voxel, such a wave is the same all over the field, and where its phase turns slowly from frame
to frame, an average along time leaves it in. From row to row of a scan its phase turns by the same angle, hence at one
frequency along y all columns tell of it. What it is like along a row is left open: a resonant mirror makes a chirp of
it. A complex number in every frame then says how strong it is and with which phase it starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.fft
from scipy.ndimage import convolve1d, median_filter

from restormer3d.artefacts.differences import close_differences
from restormer3d.threads import thread_count
from restormer3d.views import FramesChanged, each_frame

_LEAST_FRAMES, _LEAST_SIDE = 48, 32  # that tell of it
_SLOWEST, _SLOW = 2, 8  # halves of a cycle in the field along y: from which on, and below which tissue differs as well
_AROUND = 21  # halves of a cycle, whose median is what is usual
_STANDS_OUT = 1.5  # by which the variance of a wave exceeds that
_NOISY, _TISSUE = 1.5, 5.0  # times what is usual at most frequencies: tissue differs as well, or more than anything
_OFTEN, _ALWAYS = 0.45, 0.6  # of all pairs of frames, that a wave is in; at any phase it is in two thirds
_MOST = 8  # waves
_STEPS = 20  # of looking for a frequency more closely
_ONE_WAY = 0.3  # of a wave's strength, that it has less of at the opposite frequency in time
_BAND = 51  # frames, over which a slow wave keeps its phase
_STILL = 101  # frames, over which what does not turn is of the image
_ALIKE = 1e-2  # of the largest, from which on singular values count: waves may be the same but for a conjugation
_AT_ONCE = 64  # columns


@dataclass(frozen=True)
class Ripple:
    """Waves that are in every frame: twice the real part of their products is what they add to it.

    Attributes
    ----------
    amplitudes : numpy.ndarray
        Strength and phase of each in every frame, (T, waves) complex64.
    rows : numpy.ndarray
        Each from row to row, (H, waves) complex64.
    columns : numpy.ndarray
        Each along a row, (waves, W) complex64.
    """

    amplitudes: np.ndarray
    rows: np.ndarray
    columns: np.ndarray

    def added(self, t: int, rows: slice = slice(None), columns: slice = slice(None)) -> np.ndarray:
        """What they add to some rows and columns of frame `t`, (h, w) float32."""
        return 2 * ((self.rows[rows] * self.amplitudes[t]) @ self.columns[:, columns]).real

    @property
    def deviation(self) -> float:
        """Standard deviation of what they add to voxels, in intensities."""
        power = np.square(np.abs(self.amplitudes)).mean(0) * np.square(np.abs(self.columns)).mean(1)
        return float(np.sqrt(2 * power.sum()))


@dataclass(frozen=True)
class WithoutRipple(FramesChanged):
    """A stack (T, H, W) less the waves of electrical ripple.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        As recorded.
    ripple : Ripple
        Of it.
    """

    ripple: Ripple

    def change(self, frame: np.ndarray, t: int, crop: tuple[Any, ...]) -> None:
        """Take waves away from frame `t`, or from the part of it that `crop` says, in place."""
        frame -= self.ripple.added(t, *crop)


def electrical_ripple(stack: Any) -> Ripple | None:
    """Find waves whose phase turns by the same angle from row to row, in most of the frames.

    Differences of frames that are close in time are looked at: the image is not in them, and hardly any activity. At
    the frequency of a wave along y they have half as much again in common along rows as at the frequencies around.
    Where tissue differs as well, its phase has to turn by the same angle from frame to frame, too. What stays the same
    from frame to frame is left to the image.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        Recorded intensities, of one image.

    Returns
    -------
    Ripple or None
        None if there is none of at least one cycle in the field along y, and of fewer than 48 frames or 32 pixels.
    """
    frames, height, width = stack.shape
    if frames < _LEAST_FRAMES or min(height, width) < _LEAST_SIDE:
        return None
    left = close_differences(stack)
    rows, columns = np.empty((height, 0), np.complex64), np.empty((0, width), np.complex64)
    among_tissue: list[bool] = []
    while len(columns) < _MOST and (strongest := _strongest_wave(left)) is not None:
        wave, of_tissue = strongest
        for frame, amplitude in zip(left, _amplitudes(wave[0].conj().T @ left, *wave), strict=True):
            frame -= Ripple(amplitude[None], *wave).added(0)
        rows, columns = np.hstack([rows, wave[0]]), np.vstack([columns, wave[1]])
        among_tissue.append(of_tissue)
    if not len(columns):
        return None
    along = np.stack([rows.conj().T @ frame.astype(np.float32) for _, frame in each_frame(stack)])  # (T, waves, W)
    tissue = np.array(among_tissue)
    amplitudes, _ = _that_turns(_amplitudes(along, rows, columns), tissue)
    # All frames tell better than differences of some what a wave is like that turns slowly from frame to frame.
    columns = np.einsum("tk,tkw->kw", amplitudes.conj(), along - along.mean(0))
    columns /= np.linalg.norm(columns, axis=1, keepdims=True)
    amplitudes, are_waves = _that_turns(_amplitudes(along, rows, columns), tissue)
    return Ripple(amplitudes[:, are_waves], rows[:, are_waves], columns[are_waves]) if are_waves.any() else None


def _strongest_wave(differences: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], bool] | None:
    """Rows (H, 1) and columns (1, W) of a wave that stands out at its frequency along y, if there is one.

    And whether tissue differs at that frequency, too.
    """
    height = differences.shape[1]
    products = _products_along_rows(differences)
    strongest = np.linalg.eigvalsh(products)[_SLOWEST:, -1]
    usual = np.maximum(median_filter(strongest, _AROUND, mode="reflect"), np.finfo(np.float32).tiny)
    noisy = usual / np.maximum(np.median(strongest), np.finfo(np.float32).tiny)
    stands_out = np.where(noisy < _TISSUE, strongest / usual, 0.0)
    for place in np.argsort(-stands_out)[: int((stands_out >= _STANDS_OUT).sum())]:
        number = int(place) + _SLOWEST
        among_tissue = number < _SLOW or bool(noisy[place] > _NOISY)
        courses = np.linalg.eigh(products[number])[1][:, -1]
        often = 1 / np.square(np.square(np.abs(courses))).sum() / len(courses)
        if often >= (_ALWAYS if among_tissue else _OFTEN):
            return _wave(differences, courses, number / (2 * height)), among_tissue
    return None


def _wave(differences: np.ndarray, courses: np.ndarray, frequency: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of a wave of about so many cycles per row, that is in differences as `courses` (pairs,) say."""
    seen = np.einsum("t,thw->hw", courses.conj(), differences, optimize=True)
    about = _turning(frequency, len(seen)).conj().T @ seen
    rows = _turning(_closer(frequency, seen @ about[0].conj()), len(seen))
    columns = rows.conj().T @ seen
    return rows, columns / np.linalg.norm(columns)


def _products_along_rows(differences: np.ndarray) -> np.ndarray:
    """Products of differences with one another, (frequencies, pairs, pairs), by halves of a cycle along y."""
    pairs, height, width = differences.shape
    products = np.zeros((height + 1, pairs, pairs), np.complex64)
    window = _window(height)[:, None]
    for first in range(0, width, _AT_ONCE):
        some = differences[:, :, first : first + _AT_ONCE] * window
        waves = np.asarray(scipy.fft.rfft(some, 2 * height, axis=1, workers=thread_count())).transpose(1, 0, 2)
        products += waves @ waves.conj().transpose(0, 2, 1)
    return products


def _closer(frequency: float, course: np.ndarray) -> float:
    """Cycles per row at which a wave (H,) is strongest, near those that are given."""
    windowed, step = course * _window(len(course)), 0.25 / len(course)
    for _ in range(_STEPS):
        near = frequency + step * np.array([-1, 0, 1])
        best = int(np.abs(_turning(near, len(course)).conj().T @ windowed).argmax())
        frequency, step = float(near[best]), step * (0.5 if best == 1 else 0.8)
    return frequency


def _window(height: int) -> np.ndarray:
    return np.hanning(height + 2)[1:-1].astype(np.float32)


def _turning(frequencies: Any, height: int) -> np.ndarray:
    """Waves from row to row of some cycles per row, (height, frequencies) complex64."""
    return np.exp(2j * np.pi * np.outer(np.arange(height), frequencies)).astype(np.complex64)


def _amplitudes(along: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Strength and phase of waves by least squares, (n, waves) complex64, in frames turned back along y and added up.

    These are (n, waves, W). Waves and their conjugates are in them.
    """
    seen = np.einsum("tkw,kw->tk", along, columns.conj())
    rows, columns = np.hstack([rows, rows.conj()]), np.vstack([columns, columns.conj()])
    products = (rows.conj().T @ rows) * (columns.conj() @ columns.T)
    apart = np.linalg.pinv(products, rcond=_ALIKE, hermitian=True)[: along.shape[1]]
    return (np.hstack([seen, seen.conj()]) @ apart.T).astype(np.complex64)


def _that_turns(amplitudes: np.ndarray, among_tissue: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Amplitudes (T, waves) less their means over the frames around, and which of them are those of waves.

    Where most turns by the same angle from frame to frame, only that is taken. Where tissue differs as well, no other
    waves are believed, for its activity does not go on in one direction.
    """
    turning = amplitudes - _running_mean(amplitudes, np.ones(_STILL))
    times = np.arange(len(amplitudes))[:, None]
    spectrum = np.abs(np.fft.fft(turning * np.hanning(len(times) + 2)[1:-1, None], 8 * len(times), axis=0))
    peaks = spectrum.argmax(0)
    one_way = np.take_along_axis(spectrum, -peaks[None], 0)[0] < _ONE_WAY * spectrum.max(0)
    turns = np.exp(2j * np.pi * np.fft.fftfreq(8 * len(times))[peaks] * times)
    steady = turns * _running_mean((amplitudes - amplitudes.mean(0)) * turns.conj(), np.hanning(_BAND + 2)[1:-1])
    most = np.square(np.abs(steady)).sum(0) > np.square(np.abs(turning)).sum(0) / 2
    return np.where(most, steady, turning).astype(np.complex64), ~among_tissue | (most & one_way)


def _running_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted means (T, ...) over the frames around each, where there are any."""
    sums = [convolve1d(x, weights, axis=0, mode="constant") for x in (values, np.ones((len(values), 1)))]
    return sums[0] / sums[1]
