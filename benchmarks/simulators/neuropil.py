"""A plane of cortex at 1 µm per pixel and 30 Hz: dark-centered somata in dense neuropil, between vessels.

Every axon and dendrite is drawn by itself, with spikes of its own beside those that a region shares.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.special import expit

from benchmarks.simulators.drawing import Field, entry, nearest, offsets, smooth_noise, spot, walk
from benchmarks.simulators.firing import CELLS, FRAME_RATE_HZ, POPULATIONS, PROCESSES, firing_traces
from benchmarks.simulators.movie import Movie, Source, movie_of, summed

_REGIONS = 9  # of neuropil that is active together


class _Soma(NamedTuple):
    center: np.ndarray
    radius: float
    body: np.ndarray  # (H, W), 0 outside to 1 inside: where there is no room for neuropil
    footprint: np.ndarray


def neuropil_movie(seed: int, shape: tuple[int, int, int]) -> Movie:
    """Simulate somata, their dendrites, and the axons and dendrites of others around them.

    Parameters
    ----------
    seed : int
        Of everything.
    shape : tuple of int
        Frames, rows and columns; there are about 26 somata in 128 x 128 pixels.

    Returns
    -------
    Movie
        Its ROIs are the somata in focus that the edge does not cut.
    """
    frames, field = shape[0], shape[1:]
    rng = np.random.default_rng([101, seed])
    somata = _somata(rng, field)
    traces = firing_traces(rng, len(somata), frames, CELLS)
    sources = [Source(soma.footprint, 1 + trace) for soma, trace in zip(somata, traces, strict=True)]
    sources += [
        Source(_dendrites(rng, soma, field), 1 + 0.8 * trace) for soma, trace in zip(somata, traces, strict=True)
    ]
    bodies = np.max([np.zeros(field), *(soma.body for soma in somata)], 0)
    sources += _neuropil(rng, frames, field, 1 - 0.88 * gaussian_filter(bodies, 0.5))
    sources += _unfocused_somata(rng, frames, field) + _apical_dendrites(rng, frames, field)
    transmission = _shadow_of_vessels(rng, field) * (1 + 0.07 * smooth_noise(rng, field, 22))
    whole = [soma.footprint for soma in somata if _is_whole(soma, field)]
    footprints = np.reshape(whole, (-1, *field)) * transmission
    return movie_of(summed(sources) * transmission.astype(np.float32) + 0.06, footprints, FRAME_RATE_HZ)


def _count(density: float, field: Field) -> int:
    """How many there are, of a number in 128 x 128 pixels."""
    return int(density * field[0] * field[1] / 128**2)


def _is_whole(soma: _Soma, field: Field) -> bool:
    return bool(((soma.center >= 4) & (soma.center < np.subtract(field, 4))).all())


def _somata(rng: np.random.Generator, field: Field) -> list[_Soma]:
    """Somata in focus, none within another."""
    wanted, centers = _count(26, field), []
    for _ in range(150 * wanted):
        center = rng.uniform(-3, np.add(field, 3))
        if len(centers) < wanted and all(np.hypot(*(center - other)) > 12.5 for other in centers):
            centers.append(center)
    return [_focused_soma(rng, center, field) for center in centers]


def _focused_soma(rng: np.random.Generator, center: np.ndarray, field: Field) -> _Soma:
    radius, depth = rng.normal(5.8, 0.7), rng.uniform(0, 1)
    has_nucleus = rng.random() > 0.06
    body, footprint = _drawn_soma(rng, center, radius, field, has_nucleus)
    brightness = rng.lognormal(0.6, 0.45) * (1.1 - 0.35 * depth)
    footprint = brightness * gaussian_filter(footprint, 0.6 + 0.9 * depth)
    return _Soma(center, radius, body * (1 - 0.35 * depth), footprint)


def _drawn_soma(
    rng: np.random.Generator, center: np.ndarray, radius: float, field: Field, has_nucleus: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Where the body is, and its light: grainy, less of it from the nucleus."""
    y, x = offsets(center, field)
    outline = np.full(field, radius)
    for lobes, size in ((1, 0.05), (2, 0.13), (3, 0.07), (4, 0.04)):
        outline *= 1 + rng.normal(0, size) * np.cos(lobes * np.arctan2(y, x) + rng.uniform(0, 2 * np.pi))
    body = expit((outline - np.hypot(y, x)) / 0.35)
    y, x = offsets(center + rng.normal(0, 0.07 * radius, 2), field)
    within = rng.uniform(0.55, 0.7) * radius - np.hypot(y, x * rng.uniform(0.9, 1.1))
    nucleus = rng.uniform(0.55, 0.85) * expit(within / 0.4) * has_nucleus
    grain = np.clip(1 + 0.34 * smooth_noise(rng, field, 1), 0.4, 1.7)
    return body, body * grain * (1 - nucleus)


def _dendrites(rng: np.random.Generator, soma: _Soma, field: Field) -> np.ndarray:
    """Dendrites that leave a soma and fade."""
    drawn = np.zeros(field)
    for _ in range(rng.integers(2, 5)):
        heading, length = rng.uniform(0, 2 * np.pi), int(rng.integers(40, 130))
        start = soma.center + soma.radius * np.array([np.sin(heading), np.cos(heading)])
        path = walk(start, heading, rng.normal(0, 0.06, length), step=0.5)
        drawn += _deposited(path, 1.5 * np.exp(-np.arange(length) / (0.6 * length)), field)
    return 0.55 * soma.footprint.max() * gaussian_filter(drawn, 0.9)


def _deposited(path: np.ndarray, weights: np.ndarray, field: Field) -> np.ndarray:
    """Put the weights of a path's points on the four pixels around each, by how near they are."""
    image = np.zeros(field)
    for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
        pixels = np.floor(path).astype(int) + corner
        shares = weights * np.prod(1 - np.abs(path - pixels), 1)
        inside = ((pixels >= 0) & (pixels < field)).all(1)
        np.add.at(image, tuple(pixels[inside].T), shares[inside])
    return image


def _neuropil(rng: np.random.Generator, frames: int, field: Field, room: np.ndarray) -> list[Source]:
    """Axons and dendrites that follow their regions and, each, spikes of their own; and haze of every region."""
    centers = rng.uniform(0, field, (_REGIONS, 2))
    common = firing_traces(rng, _REGIONS + 1, frames, POPULATIONS, calcium_per_spike=0.012)
    common += 0.05 * np.stack([smooth_noise(rng, (frames,), 25) for _ in common])
    *regional, everywhere = common
    sources = []
    for own in firing_traces(rng, _count(750, field), frames, PROCESSES):
        path, footprint = _process(rng, field)
        shares = np.exp(-((path.mean(0) - centers) ** 2).sum(1) / (2 * 24.0**2))
        shares /= shares.sum() + 0.05  # far from all regions, little is shared
        trace = 0.7 * (shares @ regional) + 0.35 * everywhere + rng.uniform(0.2, 0.9) * own
        sources.append(Source(footprint * room, 1 + trace))
    scale = 0.75 / np.mean([source.footprint for source in sources], (1, 2)).sum()
    sources = [Source(scale * footprint, trace) for footprint, trace in sources]
    haze = [Source(0.1 * spot(center, 30, field), 1 + trace) for center, trace in zip(centers, regional, strict=True)]
    return sources + haze


def _process(rng: np.random.Generator, field: Field) -> tuple[np.ndarray, np.ndarray]:
    """Path and footprint of an axon with boutons or of a thicker, straighter dendrite, in or out of focus."""
    is_axon = rng.random() < 0.7
    curl, thickness = (0.10, 0.55) if is_axon else (0.05, 0.85)
    length, start = int(rng.integers(80, 320)), rng.uniform(-10, np.add(field, 10))
    path = walk(start, rng.uniform(0, 2 * np.pi), rng.normal(0, curl, length), step=0.5)
    weights = _boutons(rng, length) if is_axon else 0.8 + 0.19 * smooth_noise(rng, (length,), 4)
    drawn = _deposited(path, np.maximum(weights, 0.05) * rng.lognormal(0, 0.5), field)
    return path, gaussian_filter(drawn, thickness + 0.9 * abs(rng.normal()))


def _boutons(rng: np.random.Generator, length: int) -> np.ndarray:
    """Brightness along an axon."""
    weights = np.full(length, 0.35)
    for bouton in rng.integers(0, length, max(1, length // 14)):
        weights[max(0, bouton - 1) : bouton + 2] += rng.gamma(2.0, 0.55)
    return weights


def _unfocused_somata(rng: np.random.Generator, frames: int, field: Field) -> list[Source]:
    """Somata above and below the plane."""
    sources = []
    for trace in firing_traces(rng, _count(34, field), frames, CELLS):
        depth = rng.uniform(1, 4)
        _, soma = _drawn_soma(rng, rng.uniform(-12, np.add(field, 12)), rng.normal(5.8, 0.8), field)
        brightness = rng.lognormal(0, 0.4) / (1 + 0.25 * depth)
        sources.append(Source(brightness * gaussian_filter(soma, 1.6 * depth), 1 + trace))
    return sources


def _apical_dendrites(rng: np.random.Generator, frames: int, field: Field) -> list[Source]:
    """Dendrites that pass through the plane: small discs."""
    return [
        Source(rng.lognormal(-0.2, 0.4) * spot(rng.uniform(0, field), rng.uniform(0.9, 1.5), field), 1 + trace)
        for trace in firing_traces(rng, _count(22, field), frames, CELLS)
    ]


def _shadow_of_vessels(rng: np.random.Generator, field: Field) -> np.ndarray:
    """Share of the light that a wide vessel above the plane and sharp, dark capillaries in it let pass."""
    steps = 16 * max(field)  # enough to cross the field, winding
    light = 1 - 0.5 * gaussian_filter(_vessel(rng, rng.uniform(5, 8), steps, field), 4)
    radius = rng.uniform(2.2, 3.2)
    for _ in range(rng.integers(2, 4)):
        light *= 1 - 0.9 * gaussian_filter(_vessel(rng, radius, int(rng.integers(120, 420)), field), 0.9)
    return light


def _vessel(rng: np.random.Generator, radius: float, steps: int, field: Field) -> np.ndarray:
    """Where a vessel is, (H, W) of 0 and 1."""
    start, heading = entry(rng, field, margin=5, corner=0.15)
    path = walk(start, heading + rng.normal(0, 0.3), rng.normal(0, 0.035, steps), step=0.5)
    gap, index = nearest(path, field)
    return (gap < radius * (1 + 0.1 * np.sin(index / 35))).astype(float)
