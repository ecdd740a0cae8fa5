"""A few cells at 0.3 µm per pixel and 60 Hz: somata, dendrites with spines, an astrocyte, blinking puncta.

The field moves, by less than two pixels, with breath and heartbeat, and jerks; fluorescence is fast (GCaMP8).
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter1d, shift, uniform_filter1d

from benchmarks.simulators.astrocyte import astrocyte
from benchmarks.simulators.drawing import Field, smooth_noise, spot
from benchmarks.simulators.movie import Movie, Source, movie_of, summed
from benchmarks.simulators.neurons import FRAME_RATE_HZ, STEPS, neurons, responses

_MARGIN = 12  # pixels around the field that it may move to
_LARGEST_SHIFT = 1.5  # pixels


def spines_movie(seed: int, shape: tuple[int, int, int]) -> Movie:
    """Simulate a few cells so near that their spines show.

    Parameters
    ----------
    seed : int
        Of everything.
    shape : tuple of int
        Frames, rows and columns. How many somata and dendrites there are does not depend on it.

    Returns
    -------
    Movie
        Its ROIs are somata, dendrites and spines, where they are when the field has not moved.
    """
    frames, height, width = shape
    field = (height + 2 * _MARGIN, width + 2 * _MARGIN)
    rng = np.random.default_rng([303, seed])
    cells = neurons(rng, frames, field, _MARGIN)
    light = summed([*_haze(rng, frames, field), *cells.sources, *_puncta(rng, frames, field)])
    light += astrocyte(rng, frames, FRAME_RATE_HZ, cells.occupied, _MARGIN)
    inside = slice(_MARGIN, -_MARGIN)
    moved = [
        shift(frame, by, order=3, mode="nearest")[inside, inside]
        for frame, by in zip(light, _shifts(rng, frames), strict=True)
    ]
    footprints = np.stack(cells.footprints)[:, inside, inside]
    visible = footprints.sum((1, 2)) > 1
    return movie_of(np.stack(moved) + 0.02, footprints[visible], FRAME_RATE_HZ)


def _haze(rng: np.random.Generator, frames: int, field: Field) -> list[Source]:
    """Unresolved background of structure at all scales; its left and right follow different traces."""
    scales = ((1.2, 0.085), (3, 0.085), (9, 0.10), (24, 0.14))
    texture = sum(strength * smooth_noise(rng, field, width) for width, strength in scales)
    haze = np.maximum(0.6 + 0.4 * texture, 0.08)
    seconds = frames / FRAME_RATE_HZ + 1
    trains = [rng.uniform(-1, seconds - 1, int(9 * seconds)) for _ in range(2)]
    traces = 1 + gaussian_filter1d(responses(rng, trains, frames, 0.12, decay=0.12), 2, axis=1)
    ramp = np.clip(np.arange(field[1]) / field[1] + rng.normal(0, 0.1), 0, 1)
    return [Source(haze * ramp, traces[0]), Source(haze * (1 - ramp), traces[1])]


def _puncta(rng: np.random.Generator, frames: int, field: Field) -> list[Source]:
    """Small spots that blink; every fourth is a grain, like lipofuscin, that does not."""
    sources = []
    for number in range(rng.integers(14, 22)):
        center = rng.uniform(_MARGIN, np.subtract(field, _MARGIN))
        footprint = rng.uniform(0.8, 2.4) * spot(center, rng.uniform(0.8, 1.3), field)
        trace = np.ones(frames) if number % 4 == 3 else 0.12 + 0.88 * _blinking(rng, frames)
        sources.append(Source(footprint, trace))
    return sources


def _blinking(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Share of each frame in which a spot with two states is on."""
    mean_on, mean_off = rng.uniform(0.1, 0.6), rng.uniform(0.2, 1.5)  # seconds
    is_on = rng.random() < mean_on / (mean_on + mean_off)
    state = np.zeros(frames * STEPS)
    now = 0.0
    while now < len(state):
        end = now + rng.exponential(mean_on if is_on else mean_off) * FRAME_RATE_HZ * STEPS
        state[int(now) : int(end)] = is_on
        now, is_on = end, not is_on
    return state.reshape(frames, STEPS).mean(1)


def _shifts(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Rows and columns (T, 2) that each frame is displaced by."""
    time = np.arange(frames) / FRAME_RATE_HZ
    shifts = np.stack([_wander(rng, time) for _ in range(2)], 1)
    seconds = frames / FRAME_RATE_HZ
    for start in rng.uniform(min(0.2, seconds / 2), seconds, 2 + rng.poisson(0.5 * seconds)):
        since = np.maximum(time - start, 0)
        recovery = np.exp(-since / rng.uniform(0.05, 0.25)) * (time >= start)
        shifts += recovery[:, None] * rng.choice([-1, 1], 2) * rng.uniform(0.2, 1.2, 2)
    return np.clip(shifts, -_LARGEST_SHIFT, _LARGEST_SHIFT)


def _wander(rng: np.random.Generator, time: np.ndarray) -> np.ndarray:
    """Slow drift that returns, breath, heartbeat and jitter, along one axis."""
    drift = np.cumsum(rng.normal(0, 0.03, len(time)))
    drift -= uniform_filter1d(drift, max(1, 2 * len(time) // 3))
    breath_hz, heart_hz = rng.uniform(1.8, 2.6), rng.uniform(7, 10)
    breath = rng.uniform(0.15, 0.35) * np.sin(2 * np.pi * (breath_hz * time + rng.random()))
    heart = 0.08 * np.sin(2 * np.pi * heart_hz * time)
    return drift + breath + heart + rng.normal(0, 0.05, len(time))
