"""Simulators of two-photon recordings that share nothing with the one that makes training data.

A denoiser that works on their scenes, too, has not merely learned what its own simulator draws.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.simulators.mesoscope import mesoscope_movie
from benchmarks.simulators.movie import Movie
from benchmarks.simulators.neuropil import neuropil_movie
from benchmarks.simulators.spines import spines_movie

__all__ = ["SIMULATORS", "Movie", "recorded"]

_GAIN, _OFFSET = 50.0, 200.0  # ADU per photon, and ADU without light
_READ_NOISE = 0.3  # standard deviation in photons
_PULSE_HEIGHT_CV = 0.45  # standard deviation of the height of a photon's pulse, as a share of its mean

SIMULATORS: dict[str, Callable[[int, tuple[int, int, int]], Movie]] = {
    "neuropil": neuropil_movie,
    "mesoscope": mesoscope_movie,
    "spines": spines_movie,
}


def recorded(clean_photons: np.ndarray, level_photons: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Record a movie: photons arrive by chance, their pulses differ in height, and electronics add noise.

    Parameters
    ----------
    clean_photons : ndarray, shape (T, H, W)
        Expected photons of each voxel, 1 on average.
    level_photons : float
        What they are multiplied by: the expected photons of a voxel of mean brightness.
    seed : int
        Of the noise.

    Returns
    -------
    noisy : ndarray of int16, shape (T, H, W)
        What is recorded, in ADU: whole numbers, clipped at the limits of int16.
    clean : ndarray of float32, shape (T, H, W)
        What is expected, in ADU.
    """
    rng = np.random.default_rng([777, seed])
    expected = level_photons * np.asarray(clean_photons, np.float64)
    pulses_per_unit = 1 / _PULSE_HEIGHT_CV**2  # a sum of gamma-distributed pulses is gamma-distributed
    light = rng.gamma(pulses_per_unit * rng.poisson(expected), 1 / pulses_per_unit)
    light += _READ_NOISE * rng.standard_normal(expected.shape)
    limits = np.iinfo(np.int16)
    noisy = np.clip(np.rint(_GAIN * light + _OFFSET), limits.min, limits.max).astype(np.int16)
    return noisy, (_GAIN * expected + _OFFSET).astype(np.float32)
