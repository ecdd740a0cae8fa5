"""A wide field at 5 µm per pixel and 8 Hz: many small cells with slow transients (GCaMP6s) under a tree of vessels.

Light bleaches, drifts and falls off toward the edges; neuropil is a texture that patches of activity light up.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter, gaussian_filter1d
from scipy.special import expit

from benchmarks.simulators.drawing import Field, entry, nearest, offsets, smooth_noise, spot, walk
from benchmarks.simulators.movie import Movie, Source, movie_of, summed

FRAME_RATE_HZ = 8.0
_WARM_UP_SECONDS = 6.0  # events that long before the first frame still show in it


def mesoscope_movie(seed: int, shape: tuple[int, int, int]) -> Movie:
    """Simulate a field of cells, a few pixels wide each.

    Parameters
    ----------
    seed : int
        Of everything.
    shape : tuple of int
        Frames, rows and columns; there are up to 210 cells in 128 x 128 pixels.

    Returns
    -------
    Movie
        Its ROIs are the cells.
    """
    frames, field = shape[0], shape[1:]
    rng = np.random.default_rng([202, seed])
    time = (np.arange(frames) + 0.5) / FRAME_RATE_HZ
    footprints = _footprints(rng, field)
    traces = _traces(rng, len(footprints), time)
    overexpressing = rng.random(len(footprints)) < 0.05  # bright and hardly responsive
    footprints[overexpressing] *= 2.2
    traces[overexpressing] *= 0.08
    cells = (1 + traces) * _drifts(rng, len(footprints), frames) * _bleaching(time, (0.09, 6), (0.05, 25))
    neuropil_bleaching = _bleaching(time, (0.12, 9), (0.08, 30))
    sources = [Source(*cell) for cell in zip(footprints, cells, strict=True)]
    sources += [
        Source(footprint, trace * neuropil_bleaching)
        for footprint, trace in _neuropil(rng, frames, field, traces.mean(0))
    ]
    transmission = (_vignette(rng, field) * _shadow_of_vessels(rng, field)).astype(np.float32)
    light = summed(sources) * transmission * _laser_power(rng, time)[:, None, None]
    return movie_of(light + 0.03, footprints * transmission, FRAME_RATE_HZ)


def _footprints(rng: np.random.Generator, field: Field) -> np.ndarray:
    """Cells at rest (n, H, W)."""
    drawn = np.stack([_footprint(rng, center, radius, field) for center, radius in _placed(rng, field)])
    drawn[drawn < 1e-3] = 0
    return drawn


def _placed(rng: np.random.Generator, field: Field) -> list[tuple[np.ndarray, float]]:
    """Centers and radii: denser in some places than in others, with little overlap."""
    density = expit(1.2 * _cloud(rng, field, power=4, corner=0.02))
    wanted = int(210 * field[0] * field[1] / 128**2)
    centers, radii = np.empty((0, 2)), np.empty(0)
    for _ in range(100 * wanted):
        center, radius = rng.uniform(0, field), rng.uniform(1.5, 3.0)
        y, x = center.astype(int)
        overlaps = ((center - centers) ** 2).sum(1) < (0.85 * (radius + radii)) ** 2
        if len(radii) < wanted and rng.random() < density[y, x] and not overlaps.any():
            centers, radii = np.vstack([centers, center]), np.append(radii, radius)
    return list(zip(centers, radii.tolist(), strict=True))


def _footprint(rng: np.random.Generator, center: np.ndarray, radius: float, field: Field) -> np.ndarray:
    """An elliptic cell, more or less in focus; some of the large ones show a nucleus."""
    stretch, angle, blur = rng.uniform(0.85, 1.18), rng.uniform(0, np.pi), rng.uniform(0, 1)
    y, x = offsets(center, field)
    along = (x * np.cos(angle) + y * np.sin(angle)) * stretch
    across = (y * np.cos(angle) - x * np.sin(angle)) / stretch
    distance = np.hypot(along, across) / radius
    footprint = (1 - blur) * np.exp(-0.7 * distance**4) + blur * np.exp(-0.9 * distance**2)
    if radius > 2.5 and rng.random() < 0.5:
        footprint *= 1 - 0.35 * np.exp(-((distance / 0.45) ** 2))
    return footprint * rng.lognormal(-0.15, 0.55)


def _traces(rng: np.random.Generator, count: int, time: np.ndarray) -> np.ndarray:
    """Changes of fluorescence relative to rest, (count, T): own events and those of an assembly."""
    seconds = time[-1] + _WARM_UP_SECONDS
    rates_hz = np.clip(0.06 * rng.lognormal(0, 0.9, count), 0.004, 0.5)
    assembly = rng.uniform(-_WARM_UP_SECONDS, time[-1], rng.poisson(0.07 * seconds))
    joins = np.where(rng.random(count) < 0.4, 0.45, 0.03)
    traces = []
    for rate_hz, chance in zip(rates_hz, joins, strict=True):
        own = rng.uniform(-_WARM_UP_SECONDS, time[-1], rng.poisson(rate_hz * seconds))
        shared = assembly[rng.random(len(assembly)) < chance]
        events = np.concatenate([own, shared + rng.normal(0, 0.15, len(shared))])
        traces.append(_response(rng, events, time))
    return np.stack(traces)


def _response(rng: np.random.Generator, events: np.ndarray, time: np.ndarray) -> np.ndarray:
    """What events of different size add up to, as the indicator saturates."""
    decay, rise = rng.uniform(0.8, 2.0), rng.uniform(0.10, 0.22)
    peak = decay / (decay + rise) * (rise / (decay + rise)) ** (rise / decay)
    since = np.maximum(time - events[:, None], 0)
    course = np.exp(-since / decay) * (1 - np.exp(-since / rise)) / peak
    change = rng.gamma(2.2, 0.4, len(events)) @ course
    return change / (1 + change / 4.5)


def _drifts(rng: np.random.Generator, count: int, frames: int) -> np.ndarray:
    """Slow changes of each cell's brightness by some percent, (count, frames), 1 in the first frame."""
    steps = rng.standard_normal((count, frames + 200))
    drift = gaussian_filter1d(np.cumsum(steps, 1), 40, axis=1)[:, 100:-100]
    drift -= drift[:, :1]
    largest = np.abs(drift).max(1, keepdims=True) + 1e-6
    return 1 + 0.06 * rng.uniform(0.2, 1.5, (count, 1)) * drift / largest


def _bleaching(time: np.ndarray, *parts: tuple[float, float]) -> np.ndarray:
    """Brightness (T,) of which shares are lost, each exponentially in its number of seconds."""
    return 1 - np.sum([share * (1 - np.exp(-time / seconds)) for share, seconds in parts], 0)


def _neuropil(rng: np.random.Generator, frames: int, field: Field, cells: np.ndarray) -> list[Source]:
    """A texture that follows the mean trace of the cells a little, and patches of it that change by themselves."""
    coarse, fine = _cloud(rng, field, power=3.2, corner=0.03), _cloud(rng, field, power=1.2, corner=0.12)
    texture = 0.85 * gaussian_filter(np.maximum(1 + 0.28 * coarse + 0.10 * fine, 0.15), 0.7)
    drive = gaussian_filter1d(cells, 3)
    sources = [Source(texture, 1 + 0.14 * drive / (drive.max() + 1e-6))]
    for _ in range(8):
        patch = spot(rng.uniform(0, field), rng.uniform(12, 30), field)
        sources.append(Source(0.07 * patch * texture, smooth_noise(rng, (frames,), rng.uniform(4, 14))))
    return sources


def _cloud(rng: np.random.Generator, field: Field, power: float, corner: float) -> np.ndarray:
    """Noise of mean 0 and variance 1 whose spectrum falls with a power of the frequency, flat below a corner."""
    height, width = 2 * field[0], 2 * field[1]  # what is cut off keeps opposite edges apart
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    spectrum = np.fft.rfft2(rng.standard_normal((height, width))) * np.hypot(frequency, corner) ** (-power / 2)
    noise = np.fft.irfft2(spectrum, (height, width))[: field[0], : field[1]]
    return (noise - noise.mean()) / noise.std()


def _laser_power(rng: np.random.Generator, time: np.ndarray) -> np.ndarray:
    period = rng.uniform(18, 40)  # seconds
    swing = np.sin(2 * np.pi * (time / period + rng.random()))
    return (1 + 0.012 * swing + 0.0015 * smooth_noise(rng, time.shape, 2)).astype(np.float32)


def _vignette(rng: np.random.Generator, field: Field) -> np.ndarray:
    """Light that falls off from a point near the center, and a slope."""
    height, width = field
    y, x = offsets(rng.uniform(0.38, 0.62, 2) * field, field)
    slope = 0.12 * rng.choice([-1, 1]) * (np.arange(width) / width - 0.5)
    return (1 + slope) / (1 + 1.15 * ((x / width) ** 2 + (y / height) ** 2)) ** 2.4


class _Vessel(NamedTuple):
    start: np.ndarray
    heading: float
    radius: float
    length: int


def _shadow_of_vessels(rng: np.random.Generator, field: Field) -> np.ndarray:
    """Share of the light that pial vessels let pass: trees that enter at the edges."""
    covered = np.zeros(field)
    growing = []
    for _ in range(rng.integers(2, 4)):
        start, heading = entry(rng, field, margin=2)
        length = int(1.5 * max(field))
        growing.append(_Vessel(start, heading + rng.normal(0, 0.35), rng.uniform(2.2, 4.2), length))
    while growing:
        cover, branches = _grown(rng, growing.pop(), field)
        covered = np.maximum(covered, cover)
        growing += branches
    return (1 - 0.72 * gaussian_filter(covered, 0.9)) * (1 - 0.25 * gaussian_filter(covered, 4))


def _grown(rng: np.random.Generator, vessel: _Vessel, field: Field) -> tuple[np.ndarray, list[_Vessel]]:
    """What a vessel covers (H, W) as it gets thinner, and its branches."""
    radii = vessel.radius * 0.9985 ** np.arange(vessel.length)
    radii = radii[radii > 0.7]
    if not len(radii):
        return np.zeros(field), []
    turns = rng.normal(0, 0.07, len(radii))
    path, headings = walk(vessel.start, vessel.heading, turns), vessel.heading + np.cumsum(turns)
    branches = []
    for place in np.flatnonzero(rng.random(len(radii)) < 0.022):
        heading = headings[place] + rng.choice([-1, 1]) * rng.uniform(0.5, 1.1)
        length = int(0.7 * (vessel.length - place))
        branches.append(_Vessel(path[place], heading, radii[place] * rng.uniform(0.45, 0.7), length))
    gap, index = nearest(path, field)
    return np.clip(radii[index] - gap + 0.5, 0, 1), branches
