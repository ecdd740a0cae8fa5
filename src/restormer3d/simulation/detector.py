"""The noise of a microscope: Poisson-Gaussian, optionally correlated between neighboring pixels.

Every frame has its own random stream, keyed by (seed, frame): a recording is the same in whatever blocks it is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from restormer3d.simulation.scene import Scene, parse_index

INT16 = np.dtype(np.int16)
# gain in ADU per photon and read noise variance in ADU^2 of the three levels of the calcium imaging challenge
NOISE_LEVELS = {1: (28.4, 2490.0), 2: (248.7, 2700.0), 3: (990.5, 3730.0)}


def noise_parameters(level: int) -> tuple[float, float]:
    """Gain (ADU per photon) and read noise variance (ADU^2) of the challenge's noise level 1, 2 or 3."""
    if level not in NOISE_LEVELS:
        raise ValueError(f"noise level is {level!r}; expected 1, 2 or 3")
    return NOISE_LEVELS[level]


def add_noise(
    clean: np.ndarray,
    gain: float,
    read_noise_variance: float,
    rng: np.random.Generator,
    *,
    correlation: tuple[float, float] = (0.0, 0.0),
    line_noise: float = 0.0,
) -> np.ndarray:
    """Detect a clean block with shot noise and read noise: variance = gain * clean + read_noise_variance.

    Parameters
    ----------
    clean : ndarray, shape (..., H, W)
        Signal in ADU; what is below 0 emits no photons.
    gain : float
        ADU per photon, above 0.
    read_noise_variance : float
        Variance of the Gaussian part in ADU^2, not negative.
    rng : numpy.random.Generator
        Source of randomness.
    correlation : (float, float)
        Correlation of the noise of neighbors along x and along y, from 0 to below 0.5: a detector or amplifier
        slower than the pixel clock. The variance stays, pixels two apart are uncorrelated.
    line_noise : float
        Standard deviation in ADU of an offset that all pixels of a row share.

    Returns
    -------
    ndarray, shape (..., H, W), float32
        The noisy block, not rounded and not clipped.

    Raises
    ------
    ValueError
        If a parameter is out of range.
    """
    check_detector(gain, read_noise_variance, correlation, line_noise)
    photons = rng.poisson(np.maximum(clean, 0) / gain)
    noise = (gain * photons - clean).astype(np.float32)
    noise += np.float32(np.sqrt(read_noise_variance)) * rng.standard_normal(clean.shape, dtype=np.float32)
    for axis, lag_one in zip((-1, -2), correlation, strict=True):
        noise = correlate_neighbors(noise, lag_one, axis)
    if line_noise:
        noise += np.float32(line_noise) * rng.standard_normal((*clean.shape[:-1], 1), dtype=np.float32)
    return clean + noise


def check_detector(
    gain: float, read_noise_variance: float, correlation: tuple[float, float], line_noise: float
) -> None:
    """Raise ValueError if a detector with these properties cannot be simulated."""
    if gain <= 0 or read_noise_variance < 0 or line_noise < 0:
        raise ValueError(
            f"expected gain > 0, read_noise_variance >= 0 and line_noise >= 0, "
            f"got {gain}, {read_noise_variance} and {line_noise}"
        )
    if not all(0 <= value < 0.5 for value in correlation):
        raise ValueError(f"correlation is {correlation}; expected two numbers from 0 to below 0.5, for x and y")


def correlate_neighbors(noise: np.ndarray, correlation: float, axis: int) -> np.ndarray:
    """Mix each value with its predecessor along `axis` so that neighbors correlate and the variance stays.

    The filter (1, b) / sqrt(1 + b^2) has correlation b / (1 + b^2) at lag 1 and none beyond.
    """
    if not correlation:
        return noise
    b = (1 - np.sqrt(1 - 4 * correlation**2)) / (2 * correlation)
    return ((noise + b * np.roll(noise, 1, axis)) / np.sqrt(1 + b**2)).astype(np.float32)


@dataclass(frozen=True, eq=False)
class NoisyScene:
    """What a microscope records of a scene: a lazy stack (T, H, W), each frame with noise of its own.

    Attributes
    ----------
    scene : Scene
        The clean stack.
    gain, read_noise_variance : float
        ADU per photon and ADU^2; see `add_noise` and `noise_parameters`.
    seed : int
        Seed of the noise, independent of the scene's.
    correlation, line_noise : (float, float), float
        See `add_noise`.
    outlier_fraction : float
        Share of frames in which the light source or the sample jumps: brightness times 0.2 to 2.5.
    dtype : numpy dtype
        int16 (rounded and clipped, as a microscope writes it) or float32.

    Notes
    -----
    The noise of a frame is drawn for the whole frame even where only a region of it is asked for, so that the region
    gets the same noise as in the whole frame.
    """

    scene: Scene
    gain: float
    read_noise_variance: float
    seed: int
    correlation: tuple[float, float] = (0.0, 0.0)
    line_noise: float = 0.0
    outlier_fraction: float = 0.0
    dtype: np.dtype[Any] = INT16
    ndim = 3

    def __post_init__(self) -> None:
        check_detector(self.gain, self.read_noise_variance, self.correlation, self.line_noise)
        if not 0 <= self.outlier_fraction <= 1:
            raise ValueError(f"outlier_fraction is {self.outlier_fraction}; expected a share from 0 to 1")
        object.__setattr__(self, "dtype", np.dtype(self.dtype))
        if self.dtype not in (INT16, np.dtype(np.float32)):
            raise ValueError(f"dtype is {self.dtype}; expected int16 or float32")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, height and width."""
        return self.scene.shape

    def __len__(self) -> int:
        """Return the number of frames."""
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        """Record `noisy[t]`, `noisy[a:b]` or `noisy[a:b, y0:y1, x0:x1]`."""
        (times, rows, columns), squeeze = parse_index(index, self.shape)
        clean = self.scene[times.start : times.stop]
        block = np.empty((len(times), len(rows), len(columns)), dtype=self.dtype)
        for number, time in enumerate(times):
            frame = self.record(clean[number], time)
            block[number] = frame[rows.start : rows.stop, columns.start : columns.stop]
        return block[0] if squeeze else block

    def record(self, clean: np.ndarray, time: int) -> np.ndarray:
        """Frame number `time` as recorded, (H, W), from its clean signal."""
        rng = np.random.Generator(np.random.Philox(key=np.array([self.seed, time], dtype=np.uint64)))
        if rng.random() < self.outlier_fraction:
            clean = clean * np.float32(np.exp(rng.uniform(np.log(0.2), np.log(2.5))))
        frame = add_noise(
            clean,
            self.gain,
            self.read_noise_variance,
            rng,
            correlation=self.correlation,
            line_noise=self.line_noise,
        )
        return as_int16(frame) if self.dtype == INT16 else frame


def as_int16(block: np.ndarray) -> np.ndarray:
    """Round to the nearest integer and clip to the range of int16."""
    return np.clip(np.rint(block), -32768, 32767).astype(np.int16)
